"""What cuts a text into words before byte-pair encoding, by llama.cpp's names."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.errors import UserError

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES_ALONE = "bytes"  # after a pattern that cuts the words

PATTERNS: Mapping[tuple[str, ...], str] = {
    ("words of GPT-2",): "gpt-2",
    ("single digits", "words of GPT-2"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, _BYTES_ALONE): "dbrx",
    (_WORDS + r"\p{N}" + _REST, _BYTES_ALONE): "qwen2",
}
"""The parts of a pre-tokenizer -> the name that llama.cpp has for them.

Its "gpt-4o" is left out: it cuts words with combining marks (Hindi) at other places.
"""

WHOLE_WORDS = {"dbrx": "llama-bpe"}
"""The name of the same words if a word that is a token is taken without merges."""


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


def _parts(tree: Mapping[str, Any]) -> Iterator[str]:
    kind = tree.get("type")
    if kind == "Sequence":
        for inner in tree["pretokenizers"]:
            yield from _parts(inner)
    elif kind == "Split" and "Regex" in tree["pattern"]:
        yield tree["pattern"]["Regex"]
    elif kind == "Digits" and tree["individual_digits"]:
        yield "single digits"
    elif kind == "ByteLevel" and not tree["add_prefix_space"]:
        yield "words of GPT-2" if tree["use_regex"] else _BYTES_ALONE
    elif kind is not None:
        yield str(kind)
