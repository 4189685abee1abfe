"""How rows become optimizer steps, the same for any number of processes.

Floor 1. A *row* is a list of example numbers: several where rows are packed, one where they are padded. An epoch is a seeded
order of rows; each `batch_size` of them make one optimizer step, cut into micro-batches, which the processes take in turn.
Every process works out the whole plan and keeps its share, so nothing is communicated, no row is lost and none comes twice.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.batches.packing import pack
from finetune.data.types import Batch

Rows = list[list[int]]
"""Rows of example numbers."""

_WINDOW = 64  # batches of rows that are sorted by length together: wide enough for little padding, narrow enough to mix


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one process does in one optimizer step. All processes have the same number of micro-batches.

    The two counts are over all processes: divide the summed loss by `num_target_tokens` (times the number of processes where
    gradients are averaged over them), and every target token weighs the same however the step is cut.
    """

    micro_batches: list[Batch]
    num_target_tokens: int
    num_tokens: int  # without padding
    epoch: float  # passes over the data when this step is done (for a stream: whole passes done before it)
    example_ids: list[list[list[int]]]  # micro-batch -> row -> example numbers, of this process


def plan_epoch(
    lengths: Sequence[int],
    *,
    max_length: int,
    packing: bool,
    batch_size: int,
    seed: int,
    epoch: int,
) -> Rows:
    """The rows of one epoch in their order; each example stands in exactly one.

    With packing, the examples are packed anew in each epoch from another order: the rows are as full and as many, the companions
    change. Without, each step has rows of like length, shorter ones first, and the order of the steps is random.
    Either way the steps do not depend on how they are cut into micro-batches.
    """
    generator = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    if packing:
        rows = [[order[i] for i in row] for row in pack([lengths[i] for i in order], max_length)]
        generator.shuffle(rows)
        return rows
    return [
        [i]
        for i in group_by_length(
            order, lengths, window=_WINDOW * batch_size, group=batch_size, generator=generator
        )
    ]


def group_by_length(
    order: Sequence[int],
    lengths: Sequence[int],
    *,
    window: int,
    group: int,
    generator: random.Random,
) -> list[int]:
    """Reorder so that within each window of `order`, groups of `group` neighbours have like lengths, in random order of groups.

    The group that is short of members, if any, stays at the end of its window.
    """
    result: list[int] = []
    for start in range(0, len(order), window):
        by_length = sorted(order[start : start + window], key=lengths.__getitem__)
        groups = [by_length[i : i + group] for i in range(0, len(by_length), group)]
        last = [groups.pop()] if len(groups[-1]) < group else []
        generator.shuffle(groups)
        result.extend(i for members in [*groups, *last] for i in members)
    return result


def share(num_rows: int, *, micro_batch_size: int, rank: int, num_processes: int) -> list[range]:
    """Which rows of a step each micro-batch of process `rank` holds.

    The rows are cut evenly into as few micro-batches of at most `micro_batch_size` rows as give each process the same number of
    them; some are empty where there are fewer rows than processes. The processes take them in turn.
    """
    rounds = -(-num_rows // (micro_batch_size * num_processes))
    cuts = rounds * num_processes
    size, longer = divmod(num_rows, cuts)
    ends = [k * size + min(k, longer) for k in range(cuts + 1)]
    return [range(ends[k], ends[k + 1]) for k in range(rank, cuts, num_processes)]
