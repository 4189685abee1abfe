"""What is looked at before anything large is imported."""

import pytest

from finetune.config.loading import make_config
from finetune.errors import UserError
from finetune.recipes.build.look import look_at


def test_a_trained_model_brings_its_template(tiny):
    config = make_config(tiny(model={"chat_template": "moved.jinja"}))
    look_at(config, trained=True)
    with pytest.raises(UserError, match=r"'moved\.jinja' is neither \"chatml\" nor a file"):
        look_at(config)
