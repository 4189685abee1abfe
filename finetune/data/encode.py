"""Records become checked examples of at most `max_length` tokens, kept end to end in flat arrays.

A dataset costs 8 bytes a token (32-bit ids and labels) and 12 bytes an example.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from finetune.data.bad_records import BadRecords
from finetune.data.types import IGNORE_INDEX, Example, Format, Record
from finetune.errors import UserError

_HOPELESS = 1000  # if so many records are bad and none is good, no more are read


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
    without_target: int = 0  # examples that had no target left after the cut; not kept
    dropped: int = 0  # examples over max_length that were not kept because overlong is "drop"
    duplicates: int = 0  # examples that are also held out and were not kept (drop_duplicates)
    longest: int = 0  # tokens of the longest example before any cut

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class WrongTokenizer(UserError):
    """The tokenizer has ids that the model does not have, so no record is to blame."""


class RecordEncoder:
    """An encoder that turns one record after another into examples and counts them in `statistics`.

    `overlong` decides about an example of more than `max_length` tokens: "truncate" keeps its
    start, "drop" leaves it out, "error" raises. `vocab_size` is the number of rows of the model's
    embedding. A record that does not fit the format raises UserError; with `bad` it is noted there.
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
        assert overlong in ("truncate", "drop", "error"), overlong
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
            found = self.format.examples(record)
            kept = [example for example in map(self._fit, found) if example is not None]
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

    def _fit(self, example: Example) -> Example | None:
        """Return the example within the limits, or None if it is dropped."""
        if (largest := max(*example.input_ids, *example.labels)) >= self.vocab_size:
            raise WrongTokenizer(
                f"token id {largest} is outside the model's vocabulary of {self.vocab_size} rows, "
                "so the tokenizer does not belong to the model. Use the one that comes with it"
            )
        self.statistics.longest = max(self.statistics.longest, len(example))
        if len(example) <= self.max_length:
            return example
        if self.overlong == "error":
            raise UserError(
                f"the text has {len(example)} tokens, more than data.max_length = "
                f"{self.max_length}. Raise data.max_length, or set data.overlong to truncate or "
                "drop"
            )
        if self.overlong == "drop":
            self.statistics.dropped += 1
            return None
        self.statistics.truncated += 1
        cut = Example(example.input_ids[: self.max_length], example.labels[: self.max_length])
        if any(label != IGNORE_INDEX for label in cut.labels):
            return cut
        self.statistics.without_target += 1
        return None


class EncodedDataset(Sequence[Example]):
    """Examples end to end in flat arrays. An item is a copy of its stretch."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._labels = array("i")
        self._starts = array("q", [0])
        self._targets = array("i")
        self.statistics = DataStatistics()

    def append(self, example: Example) -> None:
        self._ids.extend(example.input_ids)
        self._labels.extend(example.labels)
        self._starts.append(len(self._ids))
        self._targets.append(example.num_target_tokens)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._starts[index], self._starts[index + 1]
        return Example(self._ids[start:end], self._labels[start:end])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [end - start for start, end in zip(self._starts, self._starts[1:])]

    @property
    def target_counts(self) -> Sequence[int]:
        """Target tokens of each example."""
        return self._targets

    @property
    def token_ids(self) -> Sequence[int]:
        """Token ids of all examples, end to end."""
        return self._ids

    def key(self, index: int) -> bytes:
        """Return a hash of the example's tokens, which is equal for exact duplicates."""
        start, end = self._starts[index], self._starts[index + 1]
        return hashlib.blake2b(self._ids[start:end].tobytes(), digest_size=16).digest()

    @property
    def fingerprint(self) -> str:
        """A hash of every token, label and boundary. It differs if the data differs."""
        digest = hashlib.sha256()
        for part in (self._ids, self._labels, self._starts):
            digest.update(part.tobytes())
        return digest.hexdigest()


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
) -> EncodedDataset:
    """Encode all records, each given as (where it comes from, record).

    Raises UserError with a list of the records that do not fit, unless `bad` drops them, or if the
    records hold no target token.
    """
    bad = BadRecords() if bad is None else bad
    encoder = RecordEncoder(
        format, max_length=max_length, overlong=overlong, vocab_size=vocab_size, bad=bad
    )
    dataset = EncodedDataset()
    for where, record in records:
        for example in encoder(where, record):
            dataset.append(example)
        if bad.count == _HOPELESS and encoder.statistics.records == 0:
            break
    encoder.count_bad()
    bad.check()
    dataset.statistics = encoder.statistics
    require_targets(encoder.statistics, max_length=max_length)
    return dataset


def require_targets(counts: DataStatistics, *, max_length: int) -> None:
    """Raise UserError if there is no target token."""
    if counts.records == 0:
        reason = f": all {counts.bad_records:,} were dropped" if counts.bad_records else ""
        raise UserError(f"the data holds no records{reason}")
    if counts.target_tokens == 0:
        reasons = (
            (counts.dropped, f"over data.max_length = {max_length} and dropped"),
            (
                counts.without_target,
                f"without a target after the cut to data.max_length = {max_length}",
            ),
            (counts.blank_records, "blank"),
        )
        raise UserError(
            f"no target tokens in {counts.records} record{'s' * (counts.records != 1)}, so there "
            "is nothing to learn: "
            + ", ".join(f"{count} {what}" for count, what in reasons if count)
            + (". Raise data.max_length" if counts.dropped + counts.without_target else "")
        )
