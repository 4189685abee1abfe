"""Conversations without their template: the text that it writes around messages, learnt once.

What most templates write around a message depends on roles alone. So a conversation with marks for
messages is rendered once for each order of roles, by prefixes (see `rendering`). Another
conversation of the same roles is put together from these texts.

If the code of the template shows that it does nothing with contents but write them, this is exact.
For other templates the text is compared with what the template writes: the whole conversation, and
the last prompt. A content that has text of the template's code is left to the template.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from finetune.data.formats.borders import Turn
from finetune.data.formats.jinja import Render, writes_content_as_it_is
from finetune.data.types import Message
from finetune.errors import UserError

Split = Callable[[Sequence[Message]], tuple[str, list[Turn]]]
"""What returns the whole of a conversation, and its answers in their places."""

_QUOTED = re.compile(r"'([^'\n]*[^\w\s'][^'\n]*)'|\"([^\"\n]*[^\w\s\"][^\"\n]*)\"")


class Patterns:
    """The patterns of one template. `render` and `split` do what it does, by the template itself.

    Both may raise UserError.
    """

    def __init__(self, template: str, render: Render, split: Split) -> None:
        self._render, self._split = render, split
        self._is_exact = writes_content_as_it_is(template)
        self._quoted = _quoted_texts(template)
        self._known: dict[tuple[str, ...], _Pattern | None] = {}

    def fill(self, messages: Sequence[Message]) -> tuple[str, dict[int, Turn]] | None:
        """Return the whole of a conversation, and its answers by the places of the messages.

        None if it is for the template itself. Raises UserError if the template fails.
        """
        if not all(len(message) == 2 and message["content"].strip() for message in messages):
            return None
        contents = [message["content"] for message in messages]
        roles = tuple(message["role"] for message in messages)
        if not self._is_exact:
            few = roles.count("assistant") < 2  # as many renderings without a pattern
            if few or (self._quoted is not None and any(map(self._quoted.search, contents))):
                return None
        pattern = self._pattern(roles)
        if pattern is None:
            return None
        whole, turns = pattern.fill(contents)
        return (whole, turns) if self._is_exact or self._is_right(messages, whole, turns) else None

    def _pattern(self, roles: tuple[str, ...]) -> "_Pattern | None":
        if roles not in self._known:
            try:
                self._known[roles] = _find_pattern(roles, self._split)
            except UserError:  # said when the conversation is rendered
                self._known[roles] = None
        return self._known[roles]

    def _is_right(self, messages: Sequence[Message], whole: str, turns: Mapping[int, Turn]) -> bool:
        """Return whether the template writes the same whole, and the same last prompt."""
        last = max(turns)
        prompt = self._render(messages[:last], add_generation_prompt=True)
        return turns[last].prompt == prompt and whole == self._render(messages)


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer in its place; characters are counted from its content."""

    place: int  # of the message
    before: int  # characters between the prompt and the content
    end: int  # characters after the content, up to the end of the answer with its mark
    content_end: int  # the same without the mark


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What is around the messages of a conversation: `texts[i]` comes before message i."""

    texts: Sequence[str]  # one more than there are messages
    answers: Sequence[_Answer]

    def fill(self, contents: Sequence[str]) -> tuple[str, dict[int, Turn]]:
        """Return the whole of a conversation, and its answers by the places of the messages."""
        parts = [*chain.from_iterable(zip(self.texts, contents)), self.texts[-1]]
        whole = "".join(parts)
        ends = list(accumulate(map(len, parts)))  # those of texts and of contents in turn
        turns = {}
        for answer in self.answers:
            begin, end = ends[2 * answer.place], ends[2 * answer.place + 1]
            learnt = whole[: end + answer.end]
            prompt = learnt[: begin - answer.before]
            turns[answer.place] = Turn(prompt, learnt, len(learnt), end + answer.content_end)
        return whole, turns


def _find_pattern(roles: Sequence[str], split: Split) -> _Pattern | None:
    """Return what is written around messages of these roles.

    None if the answers are not to be learnt from one text, in which each message is as given.
    `split` may raise UserError.
    """
    contents = [f"Zq{number}wx" for number in range(len(roles))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    whole, turns = split(messages)
    texts, rest = [], whole
    for content in contents:
        if rest.count(content) != 1:
            return None
        before, _, rest = rest.partition(content)
        texts.append(before)
    texts.append(rest)
    places = [place for place, role in enumerate(roles) if role == "assistant"]
    answers = []
    for place, turn in zip(places, turns, strict=True):
        begin = whole.index(contents[place])
        end = begin + len(contents[place])
        content_end = turn.end if turn.content_end is None else turn.content_end
        is_in_place = len(turn.prompt) <= begin < end <= content_end < turn.end
        if not (is_in_place and whole.startswith(turn.learnt)):
            return None
        answers.append(_Answer(place, begin - len(turn.prompt), turn.end - end, content_end - end))
    return _Pattern(texts, answers)


def _quoted_texts(template: str) -> re.Pattern[str] | None:
    """Return what matches a text in quotes in a template that is more than a word: "</think>"."""
    found = {first or second for first, second in _QUOTED.findall(template)}
    return re.compile("|".join(map(re.escape, sorted(found)))) if found else None
