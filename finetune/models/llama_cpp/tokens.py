"""The vocabulary of a GGUF file: tokens, their kinds, merges or scores, and the special ids."""

import json
import re
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from finetune.errors import UserError
from finetune.models.llama_cpp.pre_tokenizers import llama_cpp_name
from finetune.models.trim.merges import Bpe, read_bpe

NO_SCORE = -1e9  # of a token that no merge makes


@dataclass(frozen=True)
class Words:
    """How llama.cpp reads a tokenizer: by merges of bytes, or as sentencepiece."""

    bpe: Bpe
    pre: str | None  # llama.cpp's name of the words; None: sentencepiece
    space_prefix: bool  # of sentencepiece: a blank is put before a text
    special: dict[str, bool]  # added token -> whether it is a special one


def read_words(tokenizer: PreTrainedTokenizerBase) -> Words:
    """Return what is to be written. Raises UserError for a tokenizer that llama.cpp cannot read."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = read_bpe(tree["model"])
    special = {token["content"]: token["special"] for token in tree["added_tokens"]}
    words = tree["pre_tokenizer"]
    if not bpe.byte_fallback:
        whole = bool(tree["model"].get("ignore_merges"))
        return Words(bpe, llama_cpp_name(words, ignore_merges=whole), False, special)
    makes_blanks = "▁" in json.dumps([tree["normalizer"], words], ensure_ascii=False)
    if not makes_blanks:
        raise UserError(
            "the tokenizer has byte fallback and is not sentencepiece's, which llama.cpp cannot "
            "read. Leave out --gguf"
        )
    prefix = _kinds(tree["normalizer"]) & {"Prepend"} or (
        (words or {}).get("prepend_scheme", "never") != "never"
    )
    return Words(bpe, None, bool(prefix), special)


def _kinds(normalizer: Any) -> set[str]:
    if normalizer is None:
        return set()
    inner = normalizer.get("normalizers", [])
    return {normalizer["type"], *(kind for each in inner for kind in _kinds(each))}


def add_tokens(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Write the vocabulary, with a name for each of the `rows` that has no token.

    Raises UserError for a tokenizer that llama.cpp cannot read, and for one with more tokens than
    rows.
    """
    words = read_words(tokenizer)
    ids = tokenizer.get_vocab()
    names = {number: token for token, number in ids.items()}
    if max(names) >= rows:
        # such as Gemma's <image_soft_token>, which the text model has no row for
        names = {number: token for number, token in names.items() if number < rows}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(rows)]
    unknown = tokenizer.unk_token if words.pre is None else None
    kinds = [
        _kind(token, number in names, words.special, unknown) for number, token in enumerate(tokens)
    ]
    writer.add_tokenizer_model("llama" if words.pre is None else "gpt2")
    writer.add_tokenizer_pre(words.pre or "default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if words.pre is None:
        writer.add_token_scores(_scores(words.bpe, tokens))
        writer.add_add_space_prefix(words.space_prefix)
    else:
        writer.add_token_merges([f"{left} {right}" for left, right in words.bpe.ranks])
    _add_special_ids(writer, tokenizer, rows)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _kind(token: str, known: bool, special: dict[str, bool], unknown: str | None) -> TokenType:
    if not known:
        return TokenType.UNUSED
    if token == unknown:
        return TokenType.UNKNOWN
    if token in special:
        return TokenType.CONTROL if special[token] else TokenType.USER_DEFINED
    return TokenType.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else TokenType.NORMAL


def _scores(bpe: Bpe, tokens: list[str]) -> list[float]:
    """Return a score for each token: sentencepiece joins the pair with the best one first."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(bpe.ranks):
        first.setdefault(left + right, rank)
    return [-float(first[token]) if token in first else NO_SCORE for token in tokens]


def _add_special_ids(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    for token, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None and token < rows:
            add(token)
    ids = tokenizer("a", verbose=False).input_ids
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the runtime puts the BOS token before a text."""
    ids = tokenizer("a", verbose=False).input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id
