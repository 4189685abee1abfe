"""The types of the data path, and the convention for labels.

**Labels.** `labels[i]` is the token that belongs at position i, so it equals `input_ids[i]`. It is
`IGNORE_INDEX` if nothing is learnt there. Labels are *not* shifted. Nothing predicts position 0, so
`labels[0]` is always `IGNORE_INDEX`. The number of target tokens of an example is therefore the
number of its labels that are not `IGNORE_INDEX`. Packing does not change that number.

**Targets.** A batch has a list of targets instead: pairs of a place and the token that is predicted
there. The place is that of the token before it. That shift happens only in `targets_of`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

if TYPE_CHECKING:  # what is looked at first needs records, and not torch
    import torch

from finetune.errors import UserError

IGNORE_INDEX = -100

Record = Mapping[str, Any]
"""One record of a dataset: column -> value."""

Message = dict[str, Any]
"""One message: {"role", "content"}, and what else a chat template may write of it.

Roles are system, developer, user, assistant and tool.
"""


def without_padding(record: Record) -> Record:
    """Return a record of Arrow or Parquet without null keys in its objects; its columns stay.

    Arrow gives every object of a column the same keys, so it cannot tell a null from a key that
    is missing. In JSON a null is what the file says, and stays.
    """
    return {column: _without_nulls(value) for column, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


class Tokenizer(Protocol):
    """The part of a fast Hugging Face tokenizer that this package uses for text."""

    is_fast: bool
    chat_template: Any
    bos_token_id: int | None
    eos_token_id: int | None
    backend_tokenizer: Any

    def __call__(self, text: Any, **options: Any) -> Any: ...

    def __len__(self) -> int: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def get_chat_template(self, chat_template: str | None, tools: Any) -> str: ...

    def decode(self, token_ids: Any, **options: Any) -> Any: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def get_added_vocab(self) -> Mapping[str, int]: ...

    def parse_response(self, response: Any, *, prefix: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and labels of one training example, each of shape [length].

    Both are lists of ints, or arrays of type "i".
    """

    input_ids: Sequence[int]
    labels: Sequence[int]

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.labels) > 0, (len(self.input_ids), len(self.labels))
        assert self.labels[0] == IGNORE_INDEX, (
            "labels[0] has no prediction: see finetune.data.types"
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_target_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


class MicroBatch(TypedDict, total=False):
    """One micro-batch. Only packed sequences have `position_ids`.

    Positions restart at 0 with each example. Padded sequences are padded on the right and need no
    attention mask. Under causal attention no real token attends to the padding after it, and the
    padding has no targets.

    In trees (`finetune.data.batches.trees`) positions count from the root. A token at place i of
    its sequence is seen by those from i on that are before place `reach[i]`.
    """

    input_ids: "torch.Tensor"  # [sequences, length] int64
    targets: (
        "torch.Tensor"  # [N, 2] int64: place in the flattened batch, token that is predicted there
    )
    position_ids: "torch.Tensor"  # [sequences, length] int64, packed sequences only
    reach: "torch.Tensor"  # [sequences, length] int64, trees only: where the last descendant ends


def targets_of(labels: "torch.Tensor") -> "torch.Tensor":
    """Return the N targets of `labels` [sequences, length]: [N, 2] int64, sequence by sequence.

    The hidden state at place `targets[n, 0]` of the sequences, laid end to end, predicts the token
    `targets[n, 1]`.
    """
    import torch  # here: what is looked at first needs records, and not torch

    sequences, positions = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    places = sequences * labels.shape[1] + positions
    return torch.stack([places, labels[sequences, positions + 1]], 1)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for generation, the answer in the data, and what a person reads of the prompt."""

    input_ids: Sequence[int]
    text: str  # what a person reads as the input: the source sentence, the last user turn
    reference: str
    tool_calls: Sequence[Mapping[str, Any]] = ()  # of the reference: {"name", "arguments"}
    language: str | None = None  # of the reference, if it is known


class Texts(Protocol):
    """What makes examples of drafts, those of many records at a time."""

    def encode(self, given: Sequence[Any]) -> list[list[Example] | UserError]:
        """Return the examples of each record's drafts. What is an error already stays one."""
        ...


class Format(Protocol):
    """A format turns records into examples. There are three: chat, translation, text."""

    name: str

    @property
    def texts(self) -> Texts:
        """What makes examples of drafts."""
        ...

    @property
    def common_system_prompt(self) -> str | None:
        """The system prompt of all examples so far, for use after training; None if there is none.

        If they differ it is the one of the config.
        """
        ...

    def examples(self, record: Record) -> list[Example]:
        """Return the examples of one record, untruncated.

        A translation pair that is trained in both directions gives two. Raises UserError if the
        record does not fit the format. The caller adds where the record comes from.
        """
        ...

    def drafts(self, record: Record) -> Sequence[Any]:
        """Return what `texts` makes the examples of one record from. Raises UserError."""
        ...

    def prompts(self, record: Record) -> list[Prompt]:
        """Return the prompts whose answers are compared with the record's; plain text has none."""
        ...

    def notes(self) -> list[str]:
        """Return a sentence for each thing that records say and that is not used.

        It is about the records whose examples were made since the last call.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return what records have changed so far, as plain values for JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as after the records that led to `state`."""
        ...
