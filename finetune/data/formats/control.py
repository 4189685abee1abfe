"""Control tokens in the text of records: an answer that says "<|im_end|>" teaches to stop there.

Runtimes that serve a model read such text as control tokens, so training does too. They are
counted, or refused.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from finetune.data.types import Tokenizer
from finetune.errors import UserError

_BETWEEN = "\0"  # no control token has it


class ControlTokens:
    """The special tokens of a tokenizer, as text, and how many records had some in their text.

    `refuse`: whether a record with one is a bad record.
    """

    def __init__(self, tokenizer: Tokenizer, *, refuse: bool = False) -> None:
        added, end = tokenizer.added_tokens_decoder, tokenizer.eos_token_id  # made anew each time
        marks = [
            str(token)
            for i, token in added.items()
            if (token.special or i == end) and str(token).strip()
        ]
        longest_first = sorted(marks, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first))) if marks else None
        self._end = "" if end is None or end not in added else str(added[end])
        self.refuse = refuse
        self.records = 0  # with a control token in their text, since the last note
        self._example = ""

    def find(self, value: object) -> str | None:
        """Return a control token in a text, or in the texts of a list or an object."""
        if self._any is None:
            return None
        texts: list[str] = []
        _collect(value, texts, [])
        match = self._any.search(_BETWEEN.join(texts))
        return match[0] if match else None

    def find_typed(self, value: object) -> str | None:
        """Return what `find` does, for what someone typed, which is to be read as plain text.

        Raises UserError for a key of an object with a control token: keys cannot be read so.
        """
        keys: list[str] = []
        _collect(value, [], keys)
        if found := self.find(keys):
            raise UserError(
                f"the name of a key has the control token {found!r}, and only texts may have one. "
                "Rename the key"
            )
        return self.find(value)

    def sanitizing(self, template: str) -> str:
        """Return a chat template whose text has the token at which generation stops.

        transformers takes special tokens for control tokens, and added ones in the template's text.
        """
        end = json.dumps(self._end, ensure_ascii=False)
        return "{%- set token_of_the_end = " + end + " +%}" + template

    def check(self, texts: Iterable[object]) -> None:
        """Count a record by its texts.

        Raises UserError if it is to be refused, or has what is no character.
        """
        texts = list(texts)
        _require_characters(texts)
        found = self.find(texts)
        if found is None:
            return
        if self.refuse:
            raise UserError(
                f"the text has the control token {found!r}, and data.control_tokens is refuse. "
                "Change the text, or set data.control_tokens to parse"
            )
        self.records += 1
        self._example = found

    def state(self) -> list[int | str]:
        """Return what was counted since the last note."""
        return [self.records, self._example]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on from `state`."""
        self.records, self._example = state

    def notes(self) -> list[str]:
        """Return a sentence about the records counted since the last call, if there are any."""
        count, self.records = self.records, 0
        if not count:
            return []
        return [
            f"{count:,} record{'s have' if count > 1 else ' has'} a control token such as "
            f"{self._example!r} in the text. It is learnt as a control token, as servers read it "
            "(data.control_tokens)"
        ]


def _require_characters(value: object) -> None:
    """Raise UserError for half of a surrogate pair, which JSON within a text may have."""
    texts: list[str] = []
    _collect(value, texts, texts)
    try:
        _BETWEEN.join(texts).encode()
    except UnicodeEncodeError as error:
        half = _BETWEEN.join(texts)[error.start].encode("ascii", "backslashreplace").decode()
        raise UserError(
            f"the text has {half}, half of a surrogate pair, which is no character. Remove it, or "
            "write the pair"
        ) from error


def not_as_text(error: ValueError) -> UserError:
    """Return what to raise if transformers cannot encode a control token as plain text."""
    return UserError(
        "a text has a control token that this tokenizer cannot read as plain text "
        f"({error}). Remove it from the text"
    )


def encode_typed(
    tokenizer: Tokenizer, control: ControlTokens, pieces: Sequence[str], typed: str
) -> list[int]:
    """Return the token ids of `pieces` joined by `typed`, whose control tokens are plain text.

    Those of `pieces` are control tokens. Nothing is added. `control` is the tokenizer's. Raises
    UserError if the tokenizer cannot read a control token as plain text.
    """
    said = ["{{ " + json.dumps(piece, ensure_ascii=False) + " }}" for piece in pieces]
    try:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": typed}],
            chat_template=control.sanitizing("{{ messages[0]['content'] }}".join(said)),
            return_dict=False,
            sanitize_control_tokens=True,
        )
    except ValueError as error:
        raise not_as_text(error) from error
    return list(ids)


def _collect(value: object, texts: list[str], keys: list[str]) -> None:
    """Add a text, or the texts of a list or an object, to `texts`, and its keys to `keys`."""
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        keys.extend(key for key in value if isinstance(key, str))
        for part in value.values():
            _collect(part, texts, keys)
    elif isinstance(value, list | tuple):
        for part in value:
            _collect(part, texts, keys)
