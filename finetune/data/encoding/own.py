"""A format that someone registered, as the encoding of records sees it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from finetune.data.types import Example, Prompt, Record
from finetune.errors import UserError


class Registered(Protocol):
    """What a format of one's own has: its examples, prompts and notes, as `Format` says."""

    name: str

    @property
    def common_system_prompt(self) -> str | None: ...
    def examples(self, record: Record) -> list[Example]: ...
    def prompts(self, record: Record) -> list[Prompt]: ...
    def notes(self) -> list[str]: ...


class OwnFormat:
    """A registered format, whose records are encoded one by one, and at each start anew.

    Its code may change from start to start, so nothing of it is kept on disk.
    """

    def __init__(self, own: Registered) -> None:
        self._own, self.name, self.texts = own, own.name, self

    @property
    def common_system_prompt(self) -> str | None:
        return self._own.common_system_prompt

    def examples(self, record: Record) -> list[Example]:
        return self._own.examples(record)

    def drafts(self, record: Record) -> list[list[Example]]:
        """Return the examples themselves, as the one draft of a record."""
        return [self._own.examples(record)]

    def encode(self, given: Sequence[Any]) -> list[list[Example] | UserError]:
        """Return the examples of each record's draft. What is an error already stays one."""
        return [drafts if isinstance(drafts, UserError) else drafts[0] for drafts in given]

    def prompts(self, record: Record) -> list[Prompt]:
        return self._own.prompts(record)

    def notes(self) -> list[str]:
        return self._own.notes()

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass
