"""What a trimmed vocabulary keeps besides the tokens of the data: what any text needs."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.data.formats.rendering import PLAIN, ChatTemplate, TemplateSettings
from finetune.models.tokenizers import byte_tokens, template_tokens
from finetune.models.trim.merges import Bpe, read_bpe
from finetune.models.trim.renumber import tokens_of_processor

BLANK = "▁"  # of sentencepiece


def bpe_of(tokenizer: PreTrainedTokenizerBase) -> Bpe:
    """Return the byte-pair encoding of a tokenizer. Raises UserError if it is another kind."""
    return read_bpe(json.loads(tokenizer.backend_tokenizer.to_str())["model"])


def needed_tokens(
    tokenizer: PreTrainedTokenizerBase, settings: TemplateSettings = PLAIN
) -> set[int]:
    """Return the ids of special, added and byte tokens, and of those that the template writes.

    These include the system prompt that the template writes by itself. sentencepiece's blank is one
    too: written as bytes, it would not become a blank again. A tokenizer without all bytes spells a
    text by its characters, so there every token of one character is needed.
    """
    tree, vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab()
    ids = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    named = {tree["model"].get("unk_token"), BLANK} | tokens_of_processor(tree["post_processor"])
    ids |= {vocabulary[token] for token in named if token in vocabulary}
    ids |= byte_tokens(tokenizer) | template_tokens(tokenizer)
    if not _spells_bytes(tree):
        ids |= {number for token, number in vocabulary.items() if len(token) == 1}
    if tokenizer.chat_template:
        ids |= {*ChatTemplate(tokenizer, settings).prompt([{"role": "user", "content": "Yes."}])}
    return ids


def _spells_bytes(tree: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json can spell any text by its bytes."""
    vocabulary = tree["model"]["vocab"]
    if tree["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return '"ByteLevel"' in json.dumps([tree["normalizer"], tree["pre_tokenizer"]])


def tokens_of_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> set[int]:
    """Return the ids of the tokens of `texts`, at the start of a line and after a blank."""
    lines = [line for text in texts for line in (text, " " + text)]
    if not lines:
        return set()
    encoded = tokenizer(lines, add_special_tokens=False, verbose=False).input_ids
    return {token for ids in encoded for token in ids}


def frequent_tokens(bpe: Bpe, count: int) -> set[int]:
    """Return the ids of the `count` tokens that the tokenizer's own training made first."""
    return {bpe.ids[token] for token in bpe.most_frequent(count)}
