"""A learning rate or a warm-up that does not fit the run is said."""

import pytest

from finetune.config.loading import make_config
from finetune.recipes.build.optimizer import longer_warmup, low_rate

LORA = {"model": {"name": "a", "lora": {"rank": 8}}}

LOW = {
    # the change of the config -> whether LoRA's rate is called low
    "the default": (LORA, False),
    "full training's rate": (LORA | {"optimizer": {"lr": 5e-5}}, True),
    "just above it": (LORA | {"optimizer": {"lr": 6e-5}}, False),
    "by adamw": (LORA | {"optimizer": {"name": "adamw", "lr": 2e-5}}, True),
    "by adamw in another spelling": (LORA | {"optimizer": {"name": "AdamW"}}, False),
    "by adamw in Hugging Face's spelling": (LORA | {"optimizer": {"name": "adamw_torch"}}, False),
    "by lazy adamw in another spelling": (LORA | {"optimizer": {"name": "Lazy-AdamW"}}, False),
    "of lion, which wants less": (LORA | {"optimizer": {"name": "lion", "lr": 2e-5}}, False),
    "without LoRA": ({"optimizer": {"lr": 2e-5}}, False),
}


@pytest.mark.parametrize("case", LOW)
def test_a_rate_too_low_for_lora_is_said(tiny, case: str) -> None:
    changes, low = LOW[case]
    tree = {**tiny(), **changes}
    tree["optimizer"] = changes.get("optimizer", {})  # those of tiny() are for random weights
    said = low_rate(make_config(tree))
    assert (said is not None) == low
    assert said is None or "learns slowly" in said


def test_a_warmup_longer_than_the_run_is_said(tiny) -> None:
    config = make_config(tiny(scheduler={"warmup_steps": 30}))
    assert longer_warmup(config, 30) is None
    assert "is longer than the run: it is shortened to the run's 29" in str(
        longer_warmup(config, 29)
    )
    assert longer_warmup(make_config(tiny()), 1) is None
