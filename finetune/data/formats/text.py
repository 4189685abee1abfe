"""Plain text: each record is one text, and every token of it is learnt."""

from collections.abc import Mapping

from finetune.data.formats.columns import text_column
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
        self.control = control or ControlTokens(tokenizer)
        self.columns = columns

    def examples(self, record: Record) -> list[Example]:
        text = text_column(record, "text", self.columns)
        self.control.check([text])
        return [self._plain.example("", text, targets="all")] if text.strip() else []

    def prompts(self, record: Record) -> list[Prompt]:
        return []

    @property
    def common_system_prompt(self) -> None:
        return None

    def notes(self) -> list[str]:
        return self.control.notes()
