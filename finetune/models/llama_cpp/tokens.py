"""The vocabulary of a GGUF file: tokens, their kinds, merges or scores, and the special ids."""

import json
import re
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from finetune.data.formats.rendering import ChatTemplate
from finetune.data.types import Message
from finetune.errors import UserError
from finetune.models.llama_cpp.pre_tokenizers import llama_cpp_name
from finetune.models.trim.merges import Bpe, read_bpe

_TURN: list[Message] = [{"role": "user", "content": "Yes."}]
NO_SCORE = -1e9  # of a token that no merge makes
_READ = {False: ("NFC",), True: ("Prepend", "Replace")}
"""Byte fallback or not -> the normalizers with which a file can be written."""


@dataclass(frozen=True)
class Words:
    """How llama.cpp reads a tokenizer: by merges of bytes, or as sentencepiece."""

    bpe: Bpe
    pre: str | None  # llama.cpp's name of the words; None: sentencepiece
    prefix: str  # of sentencepiece: a blank comes before no text, the first, or each (always)
    special: dict[str, bool]  # added token -> whether it is a special one


def read_words(tokenizer: PreTrainedTokenizerBase) -> Words:
    """Return what is to be written. Raises UserError for a tokenizer that llama.cpp cannot read."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = read_bpe(tree["model"])
    special = {token["content"]: token["special"] for token in tree["added_tokens"]}
    words = tree["pre_tokenizer"]
    changes = _kinds(tree["normalizer"]) - {"Sequence", *_READ[bpe.byte_fallback]}
    if changes:
        raise UserError(
            f"the tokenizer changes texts before it cuts them ({', '.join(sorted(changes))}), and "
            "llama.cpp does not. Leave out --gguf"
        )
    if not bpe.byte_fallback:
        whole = bool(tree["model"].get("ignore_merges"))
        return Words(bpe, llama_cpp_name(words, ignore_merges=whole), "never", special)
    makes_blanks = "▁" in json.dumps([tree["normalizer"], words], ensure_ascii=False)
    if not makes_blanks:
        raise UserError(
            "the tokenizer has byte fallback and is not sentencepiece's, which llama.cpp cannot "
            "read. Leave out --gguf"
        )
    is_prepended = "Prepend" in _kinds(tree["normalizer"])
    prefix = "always" if is_prepended else (words or {}).get("prepend_scheme", "never")
    return Words(bpe, None, prefix, special)


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
        # llama.cpp also puts it behind each special token, and there are many in a chat
        is_first = words.prefix == "first" and tokenizer.chat_template
        writer.add_add_space_prefix(words.prefix != "never" and not is_first)
    else:
        writer.add_token_merges([f"{left} {right}" for left, right in words.bpe.ranks])
    _add_special_ids(writer, tokenizer, rows)
    blank = "{{ ' ' }}" if begins_with_blank(tokenizer) else ""
    if isinstance(tokenizer.chat_template, dict):
        named = tokenizer.chat_template.items()
        writer.add_chat_template([{"name": name, "template": blank + text} for name, text in named])
    elif tokenizer.chat_template:
        writer.add_chat_template(blank + tokenizer.chat_template)


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


def begins_with_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the file's chat template has to write the blank before the first text."""
    words = read_words(tokenizer)
    if words.prefix != "first" or not tokenizer.chat_template:
        return False
    text = ChatTemplate(tokenizer).render(_TURN, add_generation_prompt=True)
    return not text.startswith(tuple(words.special))


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the runtime is to put the BOS token before a text.

    It is if the tokenizer does so, unless there is a chat template that begins without it: the
    runtime adds it to prompts of the template too.
    """
    ids = tokenizer("a", verbose=False).input_ids
    found = bool(ids) and ids[0] == tokenizer.bos_token_id
    if found and tokenizer.chat_template:
        return ChatTemplate(tokenizer).prompt(_TURN)[0] == tokenizer.bos_token_id
    return found


def unlike_transformers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return sentences on texts that llama.cpp encodes in another way than transformers does."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    flags = ("lstrip", "rstrip", "single_word")
    odd = [token["content"] for token in tree["added_tokens"] if any(token[f] for f in flags)]
    found = []
    if read_words(tokenizer).prefix == "first" and tokenizer.chat_template:
        found.append(
            "llama.cpp encodes conversations as transformers does, and other text without the "
            "blank before its first word"
        )
    if odd:
        found.append(
            f"{', '.join(odd)}: transformers looks at the blanks and letters beside it, and "
            "llama.cpp does not"
        )
    if "NFC" in _kinds(tree["normalizer"]):
        found.append("give llama.cpp composed characters (NFC), which transformers makes itself")
    return found
