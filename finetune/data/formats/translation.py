"""Pairs of sentences: a source and its translation, as one question and one answer.

With a chat template, the pair is a chat turn. The instruction is a short system message of its own
("Translate English to French."). It replaces the default one that many templates insert, which
costs 25 tokens in every pair with SmolLM2. If the template knows no system message, the instruction
is written above the sentence in the user's turn.

Without a chat template, the pair is plain text: "English: ...", a line break, "French: ..." and
EOS.
"""

import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

from finetune.data.encoding.drafts import Draft, TextEncoder
from finetune.data.formats.columns import column, require_some_text, unused_columns, unused_notes
from finetune.data.formats.control import ControlTokens, encode_typed
from finetune.data.formats.languages import base_language, language_name
from finetune.data.formats.rendering import (
    PLAIN,
    ChatTemplate,
    PlainText,
    TemplateSettings,
    first_tokens,
)
from finetune.data.formats.written import require_options
from finetune.data.types import Example, Message, Prompt, Record, Tokenizer
from finetune.errors import UserError

INSTRUCTION = "Translate {source_name} to {target_name}."
PLAIN_TEMPLATE = "{source_name}: {source}\n{target_name}:"
_PLACE = "Zwqxzwqx"  # of the sentence, in the text of a prompt
_FIELDS = ("source", "source_name", "target_name", "source_language", "target_language")


class TranslationFormat:
    """Records become pairs, and pairs become examples.

    `languages` is (source, target), as codes ("en") or names ("English").
    `direction` is "forward", "backward" or "both" (two examples a record).
    `template` is the wording of the question, with {source} in it; None for the default wording.
    `targets` is "assistant" (the translation with its end mark) or "all".
    `system_prompt` is the system message; None for the instruction.
    `pair_column` is the column with {language: text}; None if each side is a column of its own.
    `settings` are those of the chat template. `control` counts or refuses control tokens in texts.
    `sides` names the keys or columns of (source, target); None if they are named by the languages.
    """

    name = "translation"

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        languages: tuple[str, str],
        direction: str,
        template: str | None,
        targets: str,
        system_prompt: str | None,
        pair_column: str | None = "translation",
        sides: tuple[str, str] | None = None,
        settings: TemplateSettings = PLAIN,
        control: ControlTokens | None = None,
    ) -> None:
        if template is not None:
            _check_template(template)
        self.control = control or ControlTokens(tokenizer)
        self.languages = languages
        self.sides = sides if sides is not None else languages
        self.pair_column = pair_column
        self.template = template
        self.targets = targets
        self.system_prompt = system_prompt
        backward = {"forward": [False], "backward": [True], "both": [False, True]}
        self.directions = backward[direction]  # whether reversed
        self._chat = ChatTemplate(tokenizer, settings) if tokenizer.chat_template else None
        if self._chat is not None:
            require_options(self._chat, settings.options)
        self._plain = PlainText(tokenizer) if self._chat is None else None
        self.texts = TextEncoder(tokenizer)
        self._unused: Counter[str] = Counter()  # what is not used -> records that have it
        self._has_system_role = self._chat is not None and self._chat.writes("system")
        if system_prompt is not None and not self._has_system_role:
            raise UserError(
                "a system prompt is given, but "
                + (
                    "there is no chat template"
                    if self._chat is None
                    else "the chat template takes none"
                )
                + ". Leave it out, or write it into data.translation.template"
            )

    def examples(self, record: Record) -> list[Example]:
        return self.texts.examples(self.drafts(record))

    def drafts(self, record: Record) -> list[Draft]:
        source, target = self._pair(record)
        self.control.check((source, target))
        self._unused.update(self._unused_of(record))
        return [
            draft for reverse in self.directions for draft in self._drafts(source, target, reverse)
        ]

    def prompts(self, record: Record) -> list[Prompt]:
        """Return one prompt for each direction trained."""
        source, target = self._pair(record)
        return [
            self.prompt(target, reverse=True, reference=source)
            if reverse
            else self.prompt(source, reverse=False, reference=target)
            for reverse in self.directions
        ]

    @property
    def common_system_prompt(self) -> str | None:
        """The system message of every pair; None if the directions have different ones."""
        if self._chat is None or len(self.directions) > 1:
            return self.system_prompt
        first = self._question("", self.directions[0])[0]
        return first["content"] if first["role"] == "system" else None

    def state(self) -> dict[str, Any]:
        """Return what records have changed so far, as plain values for JSON."""
        return {"unused": dict(self._unused), "control": self.control.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as after the records that led to `state`."""
        self._unused = Counter(state["unused"])
        self.control.restore(state["control"])

    def notes(self) -> list[str]:
        """Return a sentence for each thing that is not used, and about control tokens."""
        unused, self._unused = self._unused, Counter()
        return unused_notes(unused) + self.control.notes()

    def _unused_of(self, record: Record) -> set[str]:
        """Return the columns and the languages of a pair that are not used."""
        if self.pair_column is None:
            return unused_columns(record, self.sides)
        others = set(record[self.pair_column]) - set(self.sides)
        return unused_columns(record, {self.pair_column}) | {
            f"{name!r} of the pairs" for name in others if record[self.pair_column][name]
        }

    def by_language(self, record: Record) -> dict[str, str]:
        """Return the text of a record in each language. Raises UserError if it is no pair."""
        return dict(zip(self.languages, self._pair(record)))

    def prompt(
        self,
        text: str,
        *,
        reverse: bool,
        reference: str = "",
        parse_control_tokens: bool = True,
    ) -> Prompt:
        """Return the prompt that asks for the translation of `text`.

        `reverse` asks for a translation from the target language to the source language.
        `parse_control_tokens`: False reads a control token in `text` as plain text. One in the
        wording of the question stays a control token.
        """
        language = self.languages[0 if reverse else 1]
        if not parse_control_tokens and self.control.find(text):
            ids = self._typed(text, reverse)
        elif self._chat is not None:
            ids = self._chat.prompt(self._question(text, reverse))
        else:
            assert self._plain is not None
            ids = self._plain.prompt(self._fill(self.template or PLAIN_TEMPLATE, text, reverse))
        return Prompt(ids, text, reference, language=language)

    def _typed(self, text: str, reverse: bool) -> list[int]:
        """Return the ids of the prompt, with the control tokens of `text` as plain text."""
        if self._chat is not None:
            question = self._question(_PLACE, reverse)
            first, asked = [], self._chat.render(question, add_generation_prompt=True)
        else:
            first = first_tokens(self.texts.tokenizer)
            asked = self._fill(self.template or PLAIN_TEMPLATE, _PLACE, reverse).rstrip()
        if _PLACE not in asked:
            raise UserError(
                "the chat template does not write the sentence as it is. Use a template that does "
                "(model.chat_template)"
            )
        pieces = asked.split(_PLACE)
        return [*first, *encode_typed(self.texts.tokenizer, self.control, pieces, text)]

    def _drafts(self, source: str, target: str, reverse: bool) -> list[Draft]:
        text, answer = (target, source) if reverse else (source, target)
        if self._chat is not None:
            return self._chat.drafts(
                [*self._question(text, reverse), {"role": "assistant", "content": answer}],
                targets=self.targets,
            )
        assert self._plain is not None
        prompt = self._fill(self.template or PLAIN_TEMPLATE, text, reverse)
        gap = "" if prompt[-1].isspace() else " "
        return [self._plain.draft(prompt, gap + answer, targets=self.targets)]

    def _question(self, text: str, reverse: bool) -> list[Message]:
        """Return the messages before the answer."""
        system, user = self.system_prompt, text
        if self.template is not None:
            user = self._fill(self.template, text, reverse)
        elif system is None and self._has_system_role:
            system = self._fill(INSTRUCTION, text, reverse)
        else:
            user = self._fill(INSTRUCTION, text, reverse) + "\n" + text
        question = {"role": "user", "content": user}
        return [question] if system is None else [{"role": "system", "content": system}, question]

    def _fill(self, template: str, text: str, reverse: bool) -> str:
        first, second = self.languages[::-1] if reverse else self.languages
        same = base_language(first) == base_language(second)  # zh-Hans and zh-Hant
        names = {
            "source_name": language_name(first, full=same),
            "target_name": language_name(second, full=same),
        }
        return template.format(source=text, source_language=first, target_language=second, **names)

    def _pair(self, record: Record) -> tuple[str, str]:
        require_some_text(record)
        sides = record if self.pair_column is None else column(record, self.pair_column, {})
        if not isinstance(sides, Mapping):
            raise UserError(
                f"column {self.pair_column!r} must hold an object such as {{'en': ..., 'fr': ...}}"
                f", not {sides!r:.80}"
            )
        return _side(sides, self.sides[0]), _side(sides, self.sides[1])


def _side(sides: Record, key: str) -> str:
    text = column(sides, key, {})
    if text is None or (isinstance(text, str) and not text.strip()):
        raise UserError(f"the pair has an empty side: {key!r}")
    if not isinstance(text, str):
        raise UserError(f"the side {key!r} must be text, not {text!r:.80}")
    return text


def _check_template(template: str) -> None:
    """Raise UserError for a template without {source}, or with an unknown field."""
    try:
        parsed = list(string.Formatter().parse(template))
        fields = {field for _, field, _, _ in parsed if field is not None}
        formed = [field for _, field, form, conversion in parsed if form or conversion]
    except ValueError as error:
        raise UserError(f"data.translation.template {template!r} is broken: {error}") from error
    known = ", ".join(f"{{{field}}}" for field in _FIELDS)
    if unknown := fields - set(_FIELDS):
        raise UserError(
            f"data.translation.template has the unknown field {{{min(unknown)}}}; known are {known}"
        )
    if formed:
        raise UserError(
            f"data.translation.template has a format behind the name {formed[0]}. "
            f"Write {{{formed[0]}}} alone"
        )
    if "source" not in fields:
        raise UserError(
            f"data.translation.template {template!r} must contain {{source}}; known fields are "
            f"{known}"
        )
