"""How sequences are distributed over optimizer steps, the same for any number of processes.

A *sequence* is a list of example numbers: one example if it is padded, one or more if it is packed.
An epoch is a seeded order of sequences. Each `batch_size` of them make one optimizer step. A step
is cut into micro-batches, which the processes take in turn. Every process works out the whole plan
and keeps its share. So processes need not communicate, no sequence is lost and none comes twice.

A step has the same examples if they share their beginnings. Then they are laid out as trees
(`trees`) instead of sequences, in fewer micro-batches.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.data.batches.collate import collate
from finetune.data.batches.packing import pack
from finetune.data.batches.trees import (
    Forest,
    collate_trees,
    count_tokens,
    leaves,
    plan_trees,
)
from finetune.data.types import Example, MicroBatch

_WINDOW = 64  # batches that are sorted by length together: enough for little padding, and they mix


@dataclass(frozen=True, slots=True)
class BatchShape:
    """How examples become optimizer steps, and which share of each step this process takes."""

    packing: bool  # several examples in a sequence; False: one, padded
    batch_size: int  # sequences in an optimizer step, over all processes
    micro_batch_size: int  # sequences in a forward on one device
    pad_id: int  # token id of the padding
    seed: int
    rank: int = 0  # number of this process
    num_processes: int = 1
    share: bool = False  # True: examples of a step share their beginnings (packed sequences only)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The work of one process in one optimizer step. All processes have equally many micro-batches.

    The counts are over all processes. Divide the summed loss by `num_target_tokens`, times the
    number of processes if gradients are averaged over them. Then every target token weighs the
    same, however the step is cut.
    """

    micro_batches: list[MicroBatch]
    num_target_tokens: int
    num_tokens: int  # of the examples, without padding
    num_computed: int  # of these, tokens of shared beginnings once
    epoch: float  # passes over the data after this step; for a stream, whole passes before it
    example_ids: list[
        list[list[int]]
    ]  # micro-batch -> sequence -> example numbers, of this process


def plan_epoch(
    lengths: Sequence[int], shape: BatchShape, *, max_length: int, epoch: int
) -> list[list[int]]:
    """Return the sequences of one epoch in their order, each example in exactly one of them.

    With packing, each epoch packs the examples from another order. The sequences are as full and as
    many, only the companions change. Without packing, each step has sequences of similar length,
    shorter ones first, and the order of the steps is random. In both cases the steps do not depend
    on how they are cut into micro-batches.
    """
    generator = random.Random(f"{shape.seed}/{epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    if shape.packing:
        packed = pack([lengths[i] for i in order], max_length)
        sequences = [[order[i] for i in sequence] for sequence in packed]
        generator.shuffle(sequences)
        return sequences
    window, group = _WINDOW * shape.batch_size, shape.batch_size
    by_length = group_by_length(order, lengths, window=window, group=group, generator=generator)
    return [[i] for i in by_length]


def group_by_length(
    order: Sequence[int],
    lengths: Sequence[int],
    *,
    window: int,
    group: int,
    generator: random.Random,
) -> list[int]:
    """Return `order` rearranged, so that groups of neighbours have similar lengths.

    Examples move within their window only. Each group has `group` members, and the order of the
    groups is random. An incomplete group stays at the end of its window.
    """
    result: list[int] = []
    for start in range(0, len(order), window):
        by_length = sorted(order[start : start + window], key=lengths.__getitem__)
        groups = [by_length[i : i + group] for i in range(0, len(by_length), group)]
        last = [groups.pop()] if len(groups[-1]) < group else []
        generator.shuffle(groups)
        result.extend(i for members in [*groups, *last] for i in members)
    return result


def cut_step(num_sequences: int, shape: BatchShape) -> list[range]:
    """Return which sequences of a step each micro-batch of this process holds.

    The sequences are cut evenly into micro-batches of at most `micro_batch_size`. There are as few
    micro-batches as give each process the same number. Some are empty if there are fewer sequences
    than processes. The processes take the micro-batches in turn.
    """
    rounds = -(-num_sequences // (shape.micro_batch_size * shape.num_processes))
    cuts = rounds * shape.num_processes
    size, longer = divmod(num_sequences, cuts)
    ends = [k * size + min(k, longer) for k in range(cuts + 1)]
    return [range(ends[k], ends[k + 1]) for k in range(shape.rank, cuts, shape.num_processes)]


def plan_step_trees(
    examples: Sequence[Example], num_sequences: int, shape: BatchShape, *, max_length: int
) -> list[Forest] | None:
    """Return the trees of a step, of all processes; None if its examples do not share.

    So it is if they are to be laid out as sequences, or need fewer micro-batches as sequences.
    """
    if not (shape.share and shape.packing):
        return None
    capacity, processes = shape.micro_batch_size * max_length, shape.num_processes
    forests = plan_trees(examples, capacity=capacity, num_processes=processes)
    most = len(cut_step(num_sequences, shape)) * processes
    return None if forests is None or len(forests) > most else forests


def lay_out(
    sequences: Sequence[Sequence[int]],
    examples: Mapping[int, Example],
    shape: BatchShape,
    *,
    max_length: int,
) -> tuple[list[MicroBatch], list[list[list[int]]], int]:
    """Return this process's micro-batches of a step, their example numbers, and what is computed.

    `sequences` are those of the step, of numbers of `examples`. If examples share beginnings, and
    this needs no more micro-batches, they are trees. The last result is in tokens, over all
    processes.
    """
    numbers = [i for sequence in sequences for i in sequence]
    members = [examples[i] for i in numbers]
    forests = plan_step_trees(members, len(sequences), shape, max_length=max_length)
    if forests is None:
        cuts = cut_step(len(sequences), shape)
        parts = [[list(sequences[k]) for k in cut] for cut in cuts]
        batches = [
            collate(
                [[examples[i] for i in sequence] for sequence in part],
                pad_id=shape.pad_id,
                packed=shape.packing,
                max_length=max_length,
            )
            for part in parts
        ]
        return batches, parts, sum(len(examples[i]) for i in numbers)
    own = forests[shape.rank :: shape.num_processes]
    batches = [collate_trees(forest, members, pad_id=shape.pad_id) for forest in own]
    ids = [[[numbers[i] for i in leaves(forest)]] if forest else [] for forest in own]
    return batches, ids, sum(map(count_tokens, forests))
