"""Tokenizers for the tests, and a cache folder of their own."""

import datasets
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from tests.data.stock import CHATML, SPECIAL, MakeTokenizer, byte_level, metaspace


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    built = {"byte_level": byte_level(), "metaspace": metaspace()}

    def make(
        template: str | None = CHATML, *, kind: str = "byte_level", adds_bos: bool = False
    ) -> PreTrainedTokenizerFast:
        backend = Tokenizer.from_str(built[kind].to_str())
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            extra_special_tokens=SPECIAL[3:],
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return
