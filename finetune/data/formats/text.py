"""Plain text: each record is one text, and every token of it is learnt."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from finetune.data.encoding.drafts import Draft
from finetune.data.formats.columns import other_case, text_column, unused_columns, unused_notes
from finetune.data.formats.control import ControlTokens
from finetune.data.formats.rendering import PlainText
from finetune.data.types import Example, Prompt, Record, Tokenizer


class TextFormat:
    """The column `text`, followed by EOS. A blank text gives no example; it is counted as blank."""

    name = "text"

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        columns: Mapping[str, str],
        control: ControlTokens | None = None,
    ) -> None:
        self._plain = PlainText(tokenizer)
        self.texts = self._plain.texts
        self.control = control or ControlTokens(tokenizer)
        self.columns = columns
        self._unused: Counter[str] = Counter()  # what is not used -> records that have it

    def examples(self, record: Record) -> list[Example]:
        return self.texts.examples(self.drafts(record))

    def drafts(self, record: Record) -> list[Draft]:
        name = self.columns.get("text", "text")
        if name not in record:  # sources may differ in capitals
            name = other_case(record, ["text"]).get("text", name)
        text = text_column(record, name, {})
        self.control.check([text])
        self._unused.update(unused_columns(record, {name}))
        return [self._plain.draft("", text, targets="all")] if text.strip() else []

    def prompts(self, record: Record) -> list[Prompt]:
        return []

    @property
    def common_system_prompt(self) -> None:
        return None

    def state(self) -> dict[str, Any]:
        """Return what records have changed so far, as plain values for JSON."""
        return {"unused": dict(self._unused), "control": self.control.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as after the records that led to `state`."""
        self._unused = Counter(state["unused"])
        self.control.restore(state["control"])

    def notes(self) -> list[str]:
        """Return a sentence for each column that is not used, and about control tokens."""
        unused, self._unused = self._unused, Counter()
        return unused_notes(unused) + self.control.notes()
