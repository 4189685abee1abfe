"""Trees of examples: what examples have in common at their start is laid out once.

Shared are the tokens before the first target of an example. In a causal model the hidden states of
a token depend on the earlier tokens alone. So each distinct beginning is a node, and what differs
are its branches. The last token of a beginning predicts the first token of each branch.

Examples in the order of their tokens have their nearest relatives next to them. So a tree is read
off from how many tokens neighbours share, and a stretch of that order is a micro-batch.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from finetune.data.batches.collate import flat_tensor
from finetune.data.types import IGNORE_INDEX, Example, MicroBatch

LEAST = 8
"""Tokens of a node that is shared: a shorter beginning is computed again for each branch."""
LEAST_SAVED = 0.05
"""The share of tokens that trees must save where nobody asks for them."""
TREE_MULTIPLE = 32
"""The length of a micro-batch of trees is a multiple of this: oneDNN keeps 2 MB a shape."""

_IGNORED = array("i", [IGNORE_INDEX]).tobytes()


@dataclass(frozen=True, slots=True)
class Node:
    """The tokens from `start` to `end` of an example. Without children they are its own."""

    example: int
    start: int  # the number of tokens that its ancestors have
    end: int
    parent: int  # its place among the nodes, which comes before this one's; -1: it has none
    is_leaf: bool

    def __len__(self) -> int:
        return self.end - self.start


Forest = list[Node]
"""Trees, each node followed by its descendants."""


def plan_trees(
    examples: Sequence[Example], *, capacity: int, num_processes: int = 1
) -> list[Forest] | None:
    """Return the micro-batches of a step as trees; None if its examples share nothing.

    A micro-batch holds at most `capacity` tokens, or one example. There are as few micro-batches as
    give each process the same number, and they are about equally large. Some are empty if there
    are fewer examples than processes.
    """
    keys = [beginning(example) for example in examples]
    order = sorted(range(len(examples)), key=keys.__getitem__)
    common = [_shared(keys[a], keys[b]) for a, b in pairwise(order)]
    if max(common, default=0) < LEAST:
        return None
    lengths = [len(examples[i]) for i in order]
    limit = capacity
    while True:
        cuts = _even_cuts(lengths, common, limit, num_processes)
        forests = [_grow(order[a:b], common[a : b - 1], lengths[a:b]) for a, b in pairwise(cuts)]
        # Beginnings that are too short to be nodes are not in the count that cuts go by.
        over = max(
            [count_tokens(f) - capacity for f in forests if sum(n.is_leaf for n in f) > 1],
            default=0,
        )
        if over <= 0:
            break
        limit -= over
    if sum(map(count_tokens, forests)) == sum(lengths):
        return None
    return forests + [[] for _ in range(-len(forests) % num_processes)]


def count_tokens(forest: Forest) -> int:
    """Return the tokens that are computed, without padding."""
    return sum(map(len, forest))


def leaves(forest: Forest) -> list[int]:
    """Return the examples of `forest`, in the order of their leaves."""
    return [node.example for node in forest if node.is_leaf]


def common_tokens(examples: Sequence[Example], most: int) -> int:
    """Return how many tokens all examples have in common before a target; `most` are looked at."""
    keys = [beginning(examples[i]) for i in range(0, len(examples), -(-len(examples) // most))]
    return _shared(min(keys), max(keys))  # the two that differ first


def beginning(example: Example) -> bytes:
    """Return the tokens before the first target as 4 bytes each, which compare like the tokens."""
    labels = array("i", example.labels).tobytes()
    # The bytes of a label that is a token end with other ones before the next label begins.
    first = (len(labels) - len(labels.lstrip(_IGNORED))) // 4
    return array("i", example.input_ids[: min(first, len(example) - 1)]).tobytes()


def _shared(one: bytes, other: bytes) -> int:
    """Return how many tokens two beginnings have in common at their start."""
    size = min(len(one), len(other))
    differing = int.from_bytes(one[:size]) ^ int.from_bytes(other[:size])
    return (size - (differing.bit_length() + 7) // 8) // 4


def _even_cuts(
    lengths: Sequence[int], common: Sequence[int], capacity: int, multiple: int
) -> list[int]:
    """Return where micro-batches begin, and the end: their number is least, and their size even.

    It is least among multiples of `multiple`, or smaller if there are too few examples.
    """
    shared = [0, *(tokens if tokens >= LEAST else 0 for tokens in common)]

    def cuts_of(most: int) -> list[int]:
        cuts, size = [0], lengths[0]
        for number in range(1, len(lengths)):
            size += lengths[number] - shared[number]
            if size > most:
                cuts.append(number)
                size = lengths[number]
        return [*cuts, len(lengths)]

    count = -(-(len(cuts_of(capacity)) - 1) // multiple) * multiple
    low, high = 1, max(capacity, 1)
    while low < high:
        middle = (low + high) // 2
        if len(cuts_of(middle)) - 1 <= count:
            high = middle
        else:
            low = middle + 1
    return cuts_of(high)


def _grow(order: Sequence[int], common: Sequence[int], lengths: Sequence[int]) -> Forest:
    """Return the trees of examples that are in the order of their tokens.

    `common`: how many tokens neighbours share.
    """
    nodes: Forest = []
    waiting = [(0, len(order), 0, -1)]
    while waiting:
        first, last, start, parent = waiting.pop()
        if last - first == 1:
            nodes.append(Node(order[first], start, lengths[first], parent, is_leaf=True))
            continue
        end = min(common[first : last - 1])
        cuts = [first, *(n + 1 for n in range(first, last - 1) if common[n] == end), last]
        if end - start >= LEAST:
            nodes.append(Node(order[first], start, end, parent, is_leaf=False))
            start, parent = end, len(nodes) - 1
        waiting.extend((a, b, start, parent) for a, b in reversed(list(pairwise(cuts))))
    return nodes


def collate_trees(forest: Forest, examples: Sequence[Example], *, pad_id: int) -> MicroBatch:
    """Return trees as the tensors of one micro-batch: one sequence, its nodes end to end.

    Positions count from the root. A token is seen by the later ones before the place `reach`. The
    padding is a tree of its own.
    """
    places = [0, *accumulate(map(len, forest))]
    length = max(1, -(-places[-1] // TREE_MULTIPLE)) * TREE_MULTIPLE
    missing = length - places[-1]
    ends = places[1:]  # of the last descendant of each node
    for number in range(len(forest) - 1, -1, -1):
        if (parent := forest[number].parent) >= 0:
            ends[parent] = max(ends[parent], ends[number])
    ids, targets, positions, reach = (array("i") for _ in range(4))
    for number, node in enumerate(forest):
        example = examples[node.example]
        ids.extend(example.input_ids[node.start : node.end])
        positions.extend(range(node.start, node.end))
        reach.extend([ends[number]] * len(node))
        if node.is_leaf:
            before = -1 if node.parent < 0 else places[node.parent + 1] - 1
            for position in range(max(1, node.start), node.end):
                if (label := example.labels[position]) != IGNORE_INDEX:
                    own = places[number] + position - 1 - node.start
                    targets.extend((before if position == node.start else own, label))
    ids.extend([pad_id] * missing)
    positions.extend(range(missing))
    reach.extend([length] * missing)
    return {
        "input_ids": flat_tensor(ids, (1, length)),
        "targets": torch.tensor(targets, dtype=torch.int64).view(-1, 2),
        "position_ids": flat_tensor(positions, (1, length)),
        "reach": flat_tensor(reach, (1, length)),
    }
