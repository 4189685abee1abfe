"""The vocabulary of a GGUF file: tokens, their kinds, merges or scores, and the special ids."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from finetune.data.formats.rendering import ChatTemplate
from finetune.data.types import Message
from finetune.errors import UserError
from finetune.models.llama_cpp.pre_tokenizers import llama_cpp_name
from finetune.models.trim.merges import Bpe, read_bpe

_Part = Mapping[str, Any]  # of a normalizer or a pre-tokenizer, as tokenizer.json has it

_TURN: list[Message] = [{"role": "user", "content": "Yes."}]
NO_SCORE = -1e9  # of a token that no merge makes
_BLANK = "▁"  # sentencepiece's


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
    changes, cuts = _parts(tree["normalizer"]), _parts(tree["pre_tokenizer"])
    if bpe.byte_fallback:
        return Words(bpe, None, _prefix(changes, cuts), special)
    others = sorted({part["type"] for part in changes} - {"NFC"})
    if others:
        raise UserError(
            f"the tokenizer changes texts before it cuts them ({', '.join(others)}), and "
            "llama.cpp does not. Leave out --gguf"
        )
    whole = bool(tree["model"].get("ignore_merges"))
    return Words(bpe, llama_cpp_name(tree["pre_tokenizer"], ignore_merges=whole), "never", special)


def _prefix(changes: Sequence[_Part], cuts: Sequence[_Part]) -> str:
    """Return before which texts a blank comes. Raises UserError for what sentencepiece does not do.

    `changes` and `cuts` are the parts of the normalizer and of the pre-tokenizer.
    """
    parts = [*changes, *cuts]
    odd = sorted({part["type"] for part in parts if not _is_of_blanks(part)})
    if odd or not {part["type"] for part in parts} & {"Replace", "Metaspace"}:
        which = f" ({', '.join(odd)})" if odd else ""
        raise UserError(
            f"the tokenizer has byte fallback and is not sentencepiece's{which}, which llama.cpp "
            "cannot read. Leave out --gguf"
        )
    if any(part["type"] == "Prepend" for part in changes):
        return "always"
    schemes = [part["prepend_scheme"] for part in cuts if part["type"] == "Metaspace"]
    return schemes[0] if schemes else "never"


def _is_of_blanks(part: _Part) -> bool:
    """Return whether a part writes blanks as sentencepiece does, or cuts texts at them (Gemma)."""
    at_blanks = part.get("pattern") in ({"String": " "}, {"Regex": " "})
    return {
        "Prepend": part.get("prepend") == _BLANK,
        "Replace": at_blanks and part.get("content") == _BLANK,
        "Metaspace": part.get("replacement") == _BLANK,
        "Split": at_blanks,
    }.get(part["type"], False)


def _parts(tree: _Part | None) -> list[_Part]:
    """Return the parts of a normalizer or a pre-tokenizer, taken out of their sequences."""
    if tree is None:
        return []
    inner = tree.get("normalizers", tree.get("pretokenizers"))
    return [tree] if inner is None else [part for each in inner for part in _parts(each)]


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
    writer.add_token_list(_as_read(tokens, kinds) if words.pre is None else tokens)
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


def _as_read(tokens: list[str], kinds: list[TokenType]) -> list[str]:
    """Return the texts of sentencepiece's tokens as llama.cpp takes them.

    It looks for added tokens in the text itself, and writes them as they are. In others it turns
    blanks into sentencepiece's, and back. llama.cpp's own converter does the same, for Gemma's
    tokens of several blanks.
    """
    return [
        token.replace(_BLANK, " ") if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(tokens, kinds, strict=True)
    ]


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
    if any(part["type"] == "NFC" for part in _parts(tree["normalizer"])):
        found.append("give llama.cpp composed characters (NFC), which transformers makes itself")
    return found
