"""Drafts of examples: texts that are not tokens yet, and what of them is learnt.

Many texts go through the tokenizer at a time, which takes all cores. A text is cut before its
special tokens, because a tokenizer reads what follows one by itself. So pieces that come again,
such as a system prompt, are encoded once, and of each prompt only the last piece is.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from finetune.data.formats.borders import Span, Turn, encode_turn, encode_turns
from finetune.data.types import IGNORE_INDEX, Example, Tokenizer
from finetune.errors import UserError

Made = list[Example] | UserError
"""The examples of a record, or why there are none."""


_Pieces = dict[str, list[int]]
"""Text -> its token ids."""

Offsets = Sequence[Span]
_KEPT_OFFSETS = 1000  # pieces


@dataclass(frozen=True, slots=True)
class Draft:
    """A text that becomes an example. Its targets are the answers of `turns`, or `spans`.

    If the tokens of the text do not begin with those of each prompt, each turn becomes an example.
    """

    text: str  # begins with the text of each turn
    turns: Sequence[Turn] = ()
    spans: Sequence[Span] | None = None  # characters that are learnt instead of answers
    first: Sequence[int] = ()  # token ids before those of the text
    last: Sequence[int] = ()  # token ids after them, which are learnt
    is_all_learnt: bool = False  # every token but the first
    ends: frozenset[int | None] | None = None  # the token ids that may end an answer; None: any


class TextEncoder:
    """Drafts through one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.is_fast, "a tokenizer without character offsets"
        self.tokenizer = tokenizer
        self._marks = _marks(tokenizer)
        self._known: dict[str, Offsets] = {}

    def examples(self, drafts: Sequence[Draft]) -> list[Example]:
        """Return the examples of one record's drafts. Raises UserError."""
        [made] = self.encode([drafts])
        if isinstance(made, UserError):
            raise made
        return made

    def encode(self, given: Sequence[Sequence[Draft] | UserError]) -> list[Made]:
        """Return the examples of each record's drafts. What is an error already stays one."""
        drafts = [draft for each in given if not isinstance(each, UserError) for draft in each]
        texts = [_Text(draft.text, self._cuts(draft.text)) for draft in drafts]
        pieces = self._encode(p for text, draft in zip(texts, drafts) for p in text.parts(draft))
        for text in texts:
            text.join(pieces)
        pairs = zip(drafts, texts)
        return [
            each if isinstance(each, UserError) else self._made([next(pairs) for _ in each], pieces)
            for each in given
        ]

    def _cuts(self, text: str) -> list[int]:
        """Return where the pieces of a text begin."""
        if self._marks is None:
            return [0]
        return [0, *(start for match in self._marks.finditer(text) if (start := match.start()))]

    def _encode(self, texts: Iterable[str]) -> _Pieces:
        different = list(dict.fromkeys(texts))
        if not different:
            return {}
        self.tokenizer("", add_special_tokens=False)  # ends a truncation or padding of others
        backend = self.tokenizer.backend_tokenizer
        found = backend.encode_batch_fast(different, add_special_tokens=False)
        return {text: encoding.ids for text, encoding in zip(different, found)}

    def _offsets(self, text: str) -> Offsets:
        """Return the characters of each token of a piece in which an answer ends."""
        if text not in self._known:
            if len(self._known) == _KEPT_OFFSETS:
                self._known.clear()
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            self._known[text] = found["offset_mapping"]
        return self._known[text]

    def _made(self, pairs: Sequence[tuple[Draft, "_Text"]], pieces: _Pieces) -> Made:
        try:
            return [example for pair in pairs for example in self._examples(*pair, pieces)]
        except UserError as error:
            return error

    def _examples(self, draft: Draft, text: "_Text", pieces: _Pieces) -> Iterator[Example]:
        if not text.ids:
            raise UserError("the text is empty")
        body = text.example(draft, pieces, self._marks, self._offsets)
        if body is not None:
            yield _finished(draft, body, draft.text, text.stops)
            return
        # A prompt ends within a special token, or in other tokens than the text.
        body = encode_turns(self.tokenizer, draft.text, draft.turns)
        if body is not None:
            yield _finished(draft, body, draft.text)
            return
        for turn in draft.turns:
            yield _finished(draft, encode_turn(self.tokenizer, turn), turn.learnt)


class _Text:
    """A text in pieces, and its tokens once they are known."""

    def __init__(self, text: str, cuts: list[int]) -> None:
        self._text, self._cuts = text, cuts
        self._pieces = [text[start:end] for start, end in pairwise([*cuts, len(text)])]
        self.ids: list[int] = []
        self._firsts: list[int] = []  # the number of the first token of each piece
        self.stops: list[int] = []  # of an example: the number of the token behind each answer

    def parts(self, draft: Draft) -> list[str]:
        """Return what is to be encoded: the pieces, and the last piece of each prompt."""
        heads = [self._head(len(turn.prompt)) for turn in draft.turns]
        return self._pieces + [head for head in heads if head]

    def join(self, pieces: _Pieces) -> None:
        """Put the token ids together."""
        for piece in self._pieces:
            self._firsts.append(len(self.ids))
            self.ids += pieces[piece]

    def example(
        self,
        draft: Draft,
        pieces: _Pieces,
        marks: re.Pattern[str] | None,
        offsets: Callable[[str], Offsets],
    ) -> Example | None:
        """Return the example, or None if its tokens do not begin with those of each prompt."""
        ids, labels = self.ids, [IGNORE_INDEX] * len(self.ids)
        for begin, end in draft.spans or ():
            start, stop = self._token(begin, offsets, is_end=True), self._token(end, offsets)
            labels[start:stop] = ids[start:stop]
            self.stops.append(stop)
        for turn in draft.turns if draft.spans is None else ():
            border = len(turn.prompt)
            start = self._firsts[self._piece_of(border)]
            if head := self._head(border):
                first, before = start, pieces[head]
                start += len(before)
                is_whole = border == len(head) or (marks is not None and marks.match(head))
                if not is_whole or ids[first:start] != before:
                    return None
            stop = max(self._token(turn.end, offsets), start + 1)
            labels[start:stop] = ids[start:stop]
            self.stops.append(stop)
        labels[0] = IGNORE_INDEX
        return Example(ids, labels)

    def _piece_of(self, place: int) -> int:
        return bisect_right(self._cuts, place) - 1

    def _head(self, border: int) -> str:
        """Return the part of a piece that is before `border`; "" if a piece begins there."""
        return self._text[self._cuts[self._piece_of(border)] : border]

    def _token(self, place: int, offsets: Callable[[str], Offsets], *, is_end: bool = False) -> int:
        """Return the number of the first token that begins at `place` or later.

        With `is_end`: that ends after `place`.
        """
        number = self._piece_of(place)
        first, place = self._firsts[number], place - self._cuts[number]
        if place == 0:
            return first
        if number + 1 == len(self._pieces) and place == len(self._pieces[number]):
            return len(self.ids)
        tokens = offsets(self._pieces[number])
        found = (
            i
            for i, (start, end) in enumerate(tokens)
            if (end > place if is_end else start >= place)
        )
        return first + next(found, len(tokens))


def _finished(
    draft: Draft, body: Example, text: str, stops: Sequence[int] | None = None
) -> Example:
    """Return the example with what comes before and after its text.

    `stops`: the places behind which targets may end, if they are known. Raises UserError if an
    answer does not end as it may: a model trained on it would never stop.
    """
    labels = body.labels
    if draft.ends is not None and not draft.ends.issuperset(_ends(labels, stops)):
        raise UserError(
            f"the chat template ends the assistant's turn with {text[-40:]!r}, which is not a "
            "special token, so a model trained with it would never stop. Give a template that "
            "writes one, e.g. model.chat_template: chatml"
        )
    if not (draft.first or draft.last or draft.is_all_learnt):
        return body
    ids = [*draft.first, *body.input_ids, *draft.last]
    if draft.is_all_learnt:
        return Example(ids, [IGNORE_INDEX, *ids[1:]])
    learnt = [*([IGNORE_INDEX] * len(draft.first)), *labels, *draft.last]
    return Example(ids, [IGNORE_INDEX, *learnt[1:]])


def _ends(labels: Sequence[int], stops: Sequence[int] | None) -> Iterator[int]:
    """Yield the last token of each run of targets."""
    for stop in range(1, len(labels) + 1) if stops is None else stops:
        is_last = stop == len(labels) or labels[stop] == IGNORE_INDEX
        if is_last and labels[stop - 1] != IGNORE_INDEX:
            yield labels[stop - 1]


def _marks(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return what matches the special tokens before which a text may be cut, if there are any.

    They are those that the chat template writes, BOS and EOS. None of them may be hidden in another
    token, and no token may reach beyond itself.
    """
    added = [t for t in tokenizer.added_tokens_decoder.values() if not t.normalized]
    is_read = not getattr(tokenizer, "split_special_tokens", False)
    if not is_read or any(token.lstrip or token.single_word for token in added):
        return None
    template, always = (
        str(tokenizer.chat_template or ""),
        {
            str(token)
            for i, token in tokenizer.added_tokens_decoder.items()
            if i in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        },
    )
    texts = [str(token) for token in added]
    marks = [
        str(token)
        for token in added
        if token.special and (str(token) in template or str(token) in always)
    ]
    clear = [mark for mark in marks if mark and not any(_hides(text, mark) for text in texts)]
    longest_first = sorted(clear, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if clear else None


def _hides(token: str, mark: str) -> bool:
    """Return whether a token may cover the start of a mark that begins after its own start."""
    ends = (token[i:] for i in range(1, len(token)) if token[i] == mark[0])
    return any(mark.startswith(end) or end.startswith(mark) for end in ends)
