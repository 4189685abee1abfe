"""Control tokens in the text of records: an answer that says "<|im_end|>" teaches to stop there.

Runtimes that serve a model read such text as control tokens, so training does too. They are
counted, or refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune.data.types import Tokenizer
from finetune.errors import UserError


class ControlTokens:
    """The special tokens of a tokenizer, as text, and how many records had some in their text.

    `refuse`: whether a record with one is a bad record.
    """

    def __init__(self, tokenizer: Tokenizer, *, refuse: bool = False) -> None:
        marks = [
            str(token)
            for i, token in tokenizer.added_tokens_decoder.items()
            if (token.special or i == tokenizer.eos_token_id) and str(token).strip()
        ]
        longest_first = sorted(marks, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first))) if marks else None
        self.refuse = refuse
        self.records = 0  # with a control token in their text, since the last note
        self._example = ""

    def find(self, value: object) -> str | None:
        """Return a control token in a text, or in the texts of a list or an object."""
        if isinstance(value, str):
            match = self._any.search(value) if self._any is not None else None
            return match[0] if match else None
        if isinstance(value, Mapping):
            return self.find(list(value.values()))
        parts = value if isinstance(value, list | tuple) else ()
        return next((found for part in parts if (found := self.find(part))), None)

    def check(self, texts: Iterable[object]) -> None:
        """Count a record by its texts. Raises UserError if it is to be refused."""
        found = self.find(list(texts))
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
