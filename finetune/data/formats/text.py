"""Plain text: each row is one text, every token of it is learnt.

Floor 1.
"""

from collections.abc import Mapping

from finetune.data.formats.columns import text_column
from finetune.data.formats.rendering import PlainText, Tokenizer
from finetune.data.types import Example, Prompt, Row


class TextFormat:
    """The column `text`, followed by EOS. A blank text gives no example (it is counted)."""

    name = "text"

    def __init__(self, *, tokenizer: Tokenizer, columns: Mapping[str, str]) -> None:
        self._plain = PlainText(tokenizer)
        self.columns = columns

    def examples(self, row: Row) -> list[Example]:
        text = text_column(row, "text", self.columns)
        return [self._plain.example("", text, targets="all")] if text.strip() else []

    def prompts(self, row: Row) -> list[Prompt]:
        return []
