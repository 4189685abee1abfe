"""A raw prompt is where a text goes on: it begins as the tokenizer has it, and does not end."""

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from finetune.recipes.generate import _raw_prompt
from tests.data.stock import byte_level

ADDS = {"nothing": "$A", "a beginning": "<s> $A", "an end": "$A </s>", "both": "<s> $A </s>"}


@pytest.mark.parametrize("adds", ADDS)
def test_a_raw_prompt_has_no_end_mark_whatever_the_tokenizer_adds(adds: str) -> None:
    backend = Tokenizer.from_str(byte_level().to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=ADDS[adds], special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    begins = "<s>" in ADDS[adds]
    for text in ("Hello there", " Hello", "Hello ", "é"):
        ids = _raw_prompt(tokenizer)(text)
        assert tokenizer.decode(ids) == "<s>" * begins + text
        assert tokenizer.eos_token_id not in ids
