"""Records become checked examples of at most `max_length` tokens, kept end to end in flat arrays.

A dataset costs 8 bytes a token (32-bit ids and labels) and 12 bytes an example.
"""

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np

from finetune.data.bad_records import BadRecords
from finetune.data.encoding.drafts import Draft
from finetune.data.encoding.store import Entry, EntryDraft, Numbers, hash_numbers
from finetune.data.types import IGNORE_INDEX, Example, Format, Record
from finetune.errors import UserError

_HASHED = ("ids", "labels", "lengths")
_CHUNK = 500  # records whose texts are encoded together
_HELD_TOKENS = 1 << 20  # in memory, if the rest is written to disk
_HOPELESS = 1000  # if so many records are bad and none is good, the list is long enough


@dataclass
class DataStatistics:
    """Counts of the records read and of the examples made of them.

    `tokens` and `target_tokens` count the examples that are kept. Of the truncated examples,
    `truncated - without_target` are kept.
    """

    records: int = 0
    blank_records: int = 0  # records without any text (plain text only)
    bad_records: int = 0  # records that cannot be used, and lines that are none; not in `records`
    examples: int = 0  # kept
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0  # examples cut to max_length, which keeps their start
    split: int = 0  # texts over max_length of which several examples were made
    without_target: int = 0  # examples that had no target left after the cut; not kept
    dropped: int = 0  # examples over max_length that were not kept because overlong is "drop"
    duplicates: int = 0  # examples that are also held out and were not kept (drop_duplicates)
    longest: int = 0  # tokens of the longest example before any cut

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class WrongTokenizer(UserError):
    """The tokenizer has ids that the model does not have, so no record is to blame."""


class NoTargets(UserError):
    """Data holds nothing to learn, or to be tested on."""


class RecordEncoder:
    """An encoder that turns one record after another into examples and counts them in `statistics`.

    `overlong` decides about an example of more than `max_length` tokens: "truncate" keeps its
    start, "drop" leaves it out, "split" makes several of it, "error" raises. `vocab_size` is the
    number of rows of the model's embedding. A record that does not fit the format raises UserError;
    with `bad` it is noted there.
    """

    def __init__(
        self,
        format: Format,
        *,
        max_length: int,
        overlong: str,
        vocab_size: int,
        bad: BadRecords | None = None,
    ) -> None:
        assert overlong in ("truncate", "drop", "error", "split"), overlong
        self.format = format
        self.max_length = max_length
        self.overlong = overlong
        self.vocab_size = vocab_size
        self.bad = bad
        self._counted = 0  # bad records, also those that were noted by what reads the files
        self.statistics = DataStatistics()

    def __call__(self, where: str, record: Record) -> list[Example]:
        """Return the examples of the record; none of one that is noted as bad.

        Raises UserError, with `where` in front.
        """
        try:
            made: list[Example] | UserError = self.format.examples(record)
        except UserError as error:
            made = error
        return self.take(where, made)

    def take(self, where: str, made: list[Example] | UserError) -> list[Example]:
        """Return the examples of a record within the limits, as a call of the encoder does.

        `made`: its examples, or what is wrong with it.
        """
        try:
            if isinstance(made, UserError):
                raise made
            found = made
            kept = [part for example in found for part in self._fit(example)]
        except UserError as error:
            if self.bad is None or isinstance(error, WrongTokenizer):
                raise type(error)(f"{where}: {error}") from error
            self.bad.add(where, f": {error}")
            self.count_bad()
            return []
        self.count_bad()
        counts = self.statistics
        counts.records += 1
        counts.blank_records += not found
        counts.examples += len(kept)
        counts.tokens += sum(map(len, kept))
        counts.target_tokens += sum(example.num_target_tokens for example in kept)
        return kept

    def count_bad(self) -> None:
        """Count the bad records that were noted since the last call, also while files were read."""
        if self.bad is not None:
            self.statistics.bad_records += self.bad.count - self._counted
            self._counted = self.bad.count

    def _fit(self, example: Example) -> list[Example]:
        """Return the example within the limits; nothing if it is dropped."""
        if (largest := max(max(example.input_ids), max(example.labels))) >= self.vocab_size:
            raise WrongTokenizer(
                f"token id {largest} is outside the model's vocabulary of {self.vocab_size} rows, "
                "so the tokenizer does not belong to the model. Use the one that comes with it"
            )
        counts = self.statistics
        counts.longest = max(counts.longest, len(example))
        if len(example) <= self.max_length:
            return [example]
        if self.overlong == "error":
            raise UserError(
                f"the text has {len(example)} tokens, more than data.max_length = "
                f"{self.max_length}. Raise data.max_length, or set data.overlong to truncate or "
                "drop"
            )
        if self.overlong == "drop":
            counts.dropped += 1
            return []
        if self.overlong == "split" and self.max_length > 1:
            counts.split += 1
            return split(example, self.max_length)
        counts.truncated += 1
        cut = Example(example.input_ids[: self.max_length], example.labels[: self.max_length])
        if cut.num_target_tokens:
            return [cut]
        counts.without_target += 1
        return []


def split(example: Example, max_length: int) -> list[Example]:
    """Return an example in parts of at most `max_length` tokens, 2 or more.

    A part begins with the last token of the part before, so every target is learnt once.
    """
    starts = range(0, len(example) - 1, max_length - 1)
    parts = [slice(start, start + max_length) for start in starts]
    return [
        Example(example.input_ids[part], [IGNORE_INDEX, *example.labels[part][1:]])
        for part in parts
    ]


class EncodedDataset(Sequence[Example]):
    """Examples end to end in flat arrays, in memory or on disk. An item is a copy."""

    def __init__(self) -> None:
        self._ids: Numbers = array("i")
        self._labels: Numbers = array("i")
        self._starts: Numbers = array("q", [0])
        self._targets = array("i")
        self._hashes: Mapping[str, str] | None = None
        self.statistics = DataStatistics()

    @classmethod
    def stored(cls, entry: Entry) -> "EncodedDataset":
        """Return the dataset of an entry that `encode` wrote."""
        found, arrays = cls(), entry.arrays
        found._ids, found._labels = arrays["ids"], arrays["labels"]
        found._starts = np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)])
        found._targets = array("i", arrays["targets"].tobytes())
        found._hashes = entry.hashes
        found.statistics = DataStatistics(**entry.values["statistics"])
        return found

    def append(self, example: Example) -> None:
        ids, labels, starts = self._ids, self._labels, self._starts
        assert isinstance(ids, array), "a stored dataset does not grow"
        assert isinstance(labels, array)
        assert isinstance(starts, array)
        ids.extend(example.input_ids)
        labels.extend(example.labels)
        starts.append(len(ids))
        self._targets.append(example.num_target_tokens)

    def arrays(self) -> dict[str, Numbers]:
        """Return what an entry of these examples has in it."""
        lengths = np.diff(np.asarray(self._starts)).astype(np.int32)
        return {
            "ids": self._ids,
            "labels": self._labels,
            "lengths": lengths,
            "targets": self._targets,
        }

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._starts[index], self._starts[index + 1]
        ids, labels = self._ids[start:end], self._labels[start:end]
        return Example(array("i", ids.tobytes()), array("i", labels.tobytes()))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return list(np.diff(np.asarray(self._starts)).tolist())

    @property
    def target_counts(self) -> Sequence[int]:
        """Target tokens of each example."""
        return self._targets

    @property
    def token_ids(self) -> np.ndarray:
        """Token ids of all examples, end to end, int32."""
        return np.asarray(self._ids)

    @property
    def used_ids(self) -> set[int]:
        """The token ids that occur."""
        return set(np.flatnonzero(np.bincount(self.token_ids)).tolist())

    def key(self, index: int) -> bytes:
        """Return a hash of the example's tokens, which is equal for exact duplicates."""
        start, end = self._starts[index], self._starts[index + 1]
        return hashlib.blake2b(self._ids[start:end].tobytes(), digest_size=16).digest()

    @property
    def fingerprint(self) -> str:
        """A hash of every token, label and boundary. It differs if the data differs."""
        arrays = self.arrays()
        hashes = self._hashes or {name: hash_numbers(arrays[name]) for name in _HASHED}
        return " ".join(hashes[name] for name in _HASHED)


def spread(dataset: EncodedDataset, most: int) -> EncodedDataset:
    """Return at most `most` examples, spread over the dataset; all of them if they are no more."""
    if len(dataset) <= most:
        return dataset
    chosen = EncodedDataset()
    for i in range(0, len(dataset), -(-len(dataset) // most)):
        chosen.append(dataset[i])
    return chosen


def encode(
    records: Iterable[tuple[str, Record]],
    format: Format,
    *,
    max_length: int,
    overlong: str,
    vocab_size: int,
    bad: BadRecords | None = None,
    draft: EntryDraft | None = None,
) -> EncodedDataset:
    """Encode all records, each given as (where it comes from, record).

    With `draft` the examples are written there meanwhile, and the draft is left to be finished.
    Raises UserError with a list of the records that do not fit, unless `bad` drops them. Raises
    NoTargets if the records hold no target token.
    """
    bad = BadRecords() if bad is None else bad
    encoder = RecordEncoder(
        format, max_length=max_length, overlong=overlong, vocab_size=vocab_size, bad=bad
    )
    dataset, enough = EncodedDataset(), bad.count + _HOPELESS
    for where, made in _made(records, format):
        for example in encoder.take(where, made):
            dataset.append(example)
        if draft is not None and len(dataset.token_ids) >= _HELD_TOKENS:
            dataset = _moved(dataset, draft)
        if bad.action == "error" and bad.count >= enough and encoder.statistics.records == 0:
            break
    encoder.count_bad()
    bad.check()
    require_targets(encoder.statistics, max_length=max_length, bad=bad)
    if draft is not None:
        dataset = _moved(dataset, draft)
    dataset.statistics = encoder.statistics
    return dataset


def _moved(dataset: EncodedDataset, draft: EntryDraft) -> EncodedDataset:
    """Write the examples to `draft`, and return an empty dataset."""
    for name, numbers in dataset.arrays().items():
        draft.add(name, numbers)
    return EncodedDataset()


def _made(
    records: Iterable[tuple[str, Record]], format: Format
) -> Iterator[tuple[str, list[Example] | UserError]]:
    """Yield (where, the examples of a record or what is wrong with it).

    While some texts are encoded by a thread, the next ones are written.
    """
    source, ahead = (
        iter(records),
        deque[tuple[list[str], Future[list[list[Example] | UserError]]]](),
    )
    with ThreadPoolExecutor(1) as pool:
        while True:
            chunk = list(islice(source, _CHUNK))
            if chunk:
                drafts = [_drafts(format, record) for _, record in chunk]
                places = [where for where, _ in chunk]
                ahead.append((places, pool.submit(format.texts.encode, drafts)))
            if ahead and (len(ahead) > 1 or not chunk):
                places, future = ahead.popleft()
                yield from zip(places, future.result())
            elif not chunk:
                return


def _drafts(format: Format, record: Record) -> Sequence[Draft] | UserError:
    try:
        return format.drafts(record)
    except UserError as error:
        return error


def require_targets(
    counts: DataStatistics, *, max_length: int, bad: BadRecords | None = None
) -> None:
    """Raise NoTargets if there is no target token. `bad` has what was dropped."""
    if counts.records == 0:
        reason = f": all {counts.bad_records:,} were dropped" if counts.bad_records else ""
        reason += f" ({bad.sentence()})" if bad is not None and bad.count else ""
        raise NoTargets(f"the data holds no records{reason}")
    if counts.target_tokens == 0:
        reasons = (
            (counts.dropped, f"over data.max_length = {max_length} and dropped"),
            (
                counts.without_target,
                f"without a target after the cut to data.max_length = {max_length}",
            ),
            (counts.blank_records, "blank"),
        )
        raise NoTargets(
            f"no target tokens in {counts.records} record{'s' * (counts.records != 1)}, so there "
            "is nothing to learn: "
            + ", ".join(f"{count} {what}" for count, what in reasons if count)
            + (". Raise data.max_length" if counts.dropped + counts.without_target else "")
        )
