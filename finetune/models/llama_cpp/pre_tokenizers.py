"""What cuts a text into words before byte-pair encoding, by llama.cpp's names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from finetune.errors import UserError, visible

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS, _OF_GPT2 = "single digits", "words of GPT-2"
_BYTES_ALONE = "bytes"  # after a pattern that cuts the words

PATTERNS: Mapping[tuple[str, ...], str] = {
    (_OF_GPT2,): "gpt-2",
    (_DIGITS, _OF_GPT2): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, _BYTES_ALONE): "dbrx",
    (_WORDS + r"\p{N}" + _REST, _BYTES_ALONE): "qwen2",
}
"""The parts of a pre-tokenizer -> the name that llama.cpp has for them.

Its "gpt-4o" is left out: it cuts words with combining marks (Hindi) at other places.
"""

WHOLE_WORDS = {"dbrx": "llama-bpe"}
"""The name of the same words if a word that is a token is taken without merges."""

_LIKE = {
    "gpt-2": (
        *("phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "mellum", "exaone4"),
        *("a.x-4.0", "granite-docling"),
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "qwen2": ("stablelm2",),
}
SAME_WORDS = {name: known for known, names in _LIKE.items() for name in (known, *names)}
"""Other names that llama.cpp has for the words of `PATTERNS` (its src/llama-vocab.cpp)."""

TAKES_WHOLE_WORDS = frozenset(
    [
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("lfm2", "jina-v5-nano", "tekken"),
    ]
)
"""The names with which llama.cpp takes a word that is a token without merges."""


def llama_cpp_name(pre_tokenizer: Mapping[str, Any] | None, *, ignore_merges: bool) -> str:
    """Return llama.cpp's name of the words that a byte-level tokenizer cuts a text into.

    `pre_tokenizer` is that of tokenizer.json. Raises UserError if llama.cpp has no name for it.
    """
    parts = tuple(_parts(pre_tokenizer or {}))
    name = PATTERNS.get(parts)
    if name is not None and ignore_merges:
        name = WHOLE_WORDS.get(name)
    if name is None:
        raise UserError(
            "the words of this tokenizer have no name in llama.cpp that is known here "
            f"({' + '.join(parts) or 'none'!s:.200}); known are {', '.join(PATTERNS.values())}. "
            "Leave out --gguf"
        )
    return name


def cut_as_llama_cpp(tokenizer: Tokenizer, name: object, file: Path) -> None:
    """Let a byte-level tokenizer of a .gguf file cut texts into the words of that name, in place.

    transformers has read it from `file`. It cuts texts as GPT-2 does if it does not know the name.
    Raises UserError if the name is known neither there nor here.
    """
    known = SAME_WORDS.get(name) if isinstance(name, str) else None
    if known is not None:
        parts = next(parts for parts, each in PATTERNS.items() if each == known)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_made(part) for part in parts])
    elif not isinstance(name, str) or name not in GGUF_PRE_TOKENIZER_SPLITS:
        raise UserError(
            f"{file} cuts texts into words by the rule {visible(str(name or 'default'))!r} of "
            "llama.cpp, which is not known here. Take the model's Hugging Face folder"
        )
    if name in TAKES_WHOLE_WORDS:
        tokenizer.model.ignore_merges = True


def _made(part: str) -> pre_tokenizers.PreTokenizer:
    if part == _DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    if part in (_OF_GPT2, _BYTES_ALONE):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=part == _OF_GPT2)
    return pre_tokenizers.Split(Regex(part), behavior="isolated")


def _parts(tree: Mapping[str, Any]) -> Iterator[str]:
    kind = tree.get("type")
    if kind == "Sequence":
        for inner in tree["pretokenizers"]:
            yield from _parts(inner)
    elif kind == "Split" and "Regex" in tree["pattern"] and _keeps_matches(tree):
        yield tree["pattern"]["Regex"]
    elif kind == "Digits" and tree["individual_digits"]:
        yield _DIGITS
    elif kind == "ByteLevel" and not tree["add_prefix_space"]:
        yield _OF_GPT2 if tree["use_regex"] else _BYTES_ALONE
    elif kind is not None:
        yield str(kind)


def _keeps_matches(split: Mapping[str, object]) -> bool:
    """Return whether each match is a word. The patterns here leave nothing between them."""
    return (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))
