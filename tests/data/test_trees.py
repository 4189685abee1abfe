"""Trees of a step's examples: what they hold, what they share, and how steps are cut into them."""

import random
from itertools import accumulate

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune.data.batches.dataset import TrainingBatches
from finetune.data.batches.trees import (
    LEAST,
    TREE_MULTIPLE,
    Forest,
    beginning,
    collate_trees,
    count_tokens,
    leaves,
    plan_trees,
)
from finetune.data.encode import EncodedDataset
from finetune.data.types import IGNORE_INDEX, Example

from .settings import batch_shape


def example(prompt: list[int], answer: list[int], *, gap: int = 0) -> Example:
    """An example whose answer is learnt, its `gap` tokens in the middle left out."""
    labels = [IGNORE_INDEX] * len(prompt) + answer
    labels[len(prompt) + 1 : len(prompt) + 1 + gap] = [IGNORE_INDEX] * len(answer[1 : 1 + gap])
    return Example(prompt + answer, labels)


@st.composite
def related_examples(draw: st.DrawFn) -> list[Example]:
    """Examples that share beginnings at up to four depths.

    Among them are equal ones, one that is another's beginning, and prompts that end at a branch.
    """
    generator = random.Random(draw(st.integers(0, 10_000)))
    few = draw(st.integers(2, 40))  # tokens; few of them make branches that share by chance

    def tokens(count: int) -> list[int]:
        return [generator.randrange(few) + 1 for _ in range(count)]

    prompts = [tokens(draw(st.integers(1, 20)))]
    for _ in range(draw(st.integers(1, 9))):
        parent = generator.choice(prompts)
        prompts.append(parent + tokens(draw(st.integers(0, 14))) if len(parent) < 50 else parent)
    found = [
        example(p, tokens(generator.randint(1, 6)), gap=generator.randint(0, 2)) for p in prompts
    ]
    whole = found[0]
    found.append(Example(list(whole.input_ids) + tokens(3), list(whole.labels) + tokens(3)))
    generator.shuffle(found)
    return found


def read_back(forest: Forest, examples: list[Example]) -> dict[int, tuple[list[int], list[int]]]:
    """The tokens and the labels of each example, from the tensors of the micro-batch alone."""
    batch = collate_trees(forest, examples, pad_id=0)
    ids, positions, reach = (
        batch[key][0].tolist() for key in ("input_ids", "position_ids", "reach")
    )
    found = {}
    ends = list(accumulate(map(len, forest)))
    remaining = batch["targets"].tolist()
    for node, end in zip(forest, ends, strict=True):
        if not node.is_leaf:
            continue
        path = [place for place in range(end) if reach[place] >= end]
        assert [positions[place] for place in path] == list(range(len(path)))
        labels = [IGNORE_INDEX] * len(path)
        wanted = sum(label != IGNORE_INDEX for label in examples[node.example].labels)
        for place, token in remaining[:wanted]:
            labels[path.index(place) + 1] = token
        del remaining[:wanted]
        found[node.example] = ([ids[place] for place in path], labels)
    assert not remaining
    return found


@settings(deadline=None, max_examples=200)
@given(related_examples(), st.integers(60, 300), st.integers(1, 3))
def test_trees_hold_each_example_once_within_the_capacity(
    examples: list[Example], capacity: int, num_processes: int
) -> None:
    forests = plan_trees(examples, capacity=capacity, num_processes=num_processes)
    total = sum(map(len, examples))
    assume(forests is not None)
    assert len(forests) % num_processes == 0
    assert sum(map(count_tokens, forests)) < total
    assert sorted(i for forest in forests for i in leaves(forest)) == list(range(len(examples)))
    for forest in forests:
        assert count_tokens(forest) <= capacity or len(leaves(forest)) == 1
        for number, node in enumerate(forest):
            assert node.is_leaf or len(node) >= LEAST
            assert node.parent < number
            assert node.start == (0 if node.parent < 0 else forest[node.parent].end)
            if not node.is_leaf:
                assert sum(other.parent == number for other in forest) >= 2
                assert node.end * 4 <= len(beginning(examples[node.example]))
        if forest:
            read = read_back(forest, examples)
            assert read == {
                i: (list(examples[i].input_ids), list(examples[i].labels)) for i in leaves(forest)
            }


def test_a_tree_by_hand() -> None:
    stem, middle = list(range(1, 11)), list(range(11, 20))
    examples = [
        example([*stem, *middle, 30], [31, 32]),
        example([*stem, 40], [41]),
        example([*stem, *middle], [50, 51]),
        example([60, 61], [62]),
    ]
    (forest,) = plan_trees(examples, capacity=500) or []
    found = [(n.example, n.start, n.end, n.parent) for n in forest]
    assert found[:2] == [(2, 0, 10, -1), (2, 10, 19, 0)]
    assert sorted(found[2:4]) == [(0, 19, 22, 1), (2, 19, 21, 1)]
    assert found[4:] == [(1, 10, 12, 0), (3, 0, 3, -1)]
    assert count_tokens(forest) == 10 + 9 + 3 + 2 + 2 + 3
    batch = collate_trees(forest, examples, pad_id=99)
    assert batch["input_ids"].shape == (1, TREE_MULTIPLE)
    assert batch["input_ids"][0, 29:].tolist() == [99] * 3
    assert (
        batch["reach"][0].tolist()
        == [26] * 10
        + [24] * 9
        + ([21, 21, 24, 24, 24] if found[2][0] == 2 else [22, 22, 22, 24, 24])
        + [26] * 2
        + [29] * 3
        + [32] * 3
    )
    places = batch["targets"][:, 0].tolist()
    assert places.count(18) == 1, "the last token of the beginning predicts the answer of example 2"


def test_a_branching_token_predicts_for_every_branch() -> None:
    prompt = list(range(1, 12))
    examples = [example(prompt, [n, n + 1]) for n in (20, 30, 40, 40)]
    (forest,) = plan_trees(examples, capacity=100) or []
    batch = collate_trees(forest, examples, pad_id=0)
    at_branch = [token for place, token in batch["targets"].tolist() if place == 10]
    assert sorted(at_branch) == [20, 30, 40, 40]
    assert count_tokens(forest) == 11 + 4 * 2


def test_beginnings_of_fewer_tokens_are_not_shared() -> None:
    short = [example([*range(1, LEAST), 50 + n], [n]) for n in range(3)]
    assert plan_trees(short, capacity=100) is None
    long = [example([*range(1, LEAST + 1), 50 + n], [n]) for n in range(3)]
    assert plan_trees(long, capacity=100) is not None


def test_nothing_after_the_first_target_is_shared() -> None:
    everything = [Example(list(range(50)), [IGNORE_INDEX, *range(1, 50)])] * 3
    assert plan_trees(everything, capacity=500) is None
    turns = [example(list(range(20)), list(range(20, 40)))] * 2
    (forest,) = plan_trees(turns, capacity=500) or []
    assert count_tokens(forest) == 20 + 2 * 20


def test_cuts_are_few_even_and_the_same_number_for_each_process() -> None:
    prompt = list(range(1, 41))
    examples = [example([*prompt, 60 + n], [n]) for n in range(30)]
    (whole,) = plan_trees(examples, capacity=100) or []
    assert count_tokens(whole) == 40 + 30 * 2
    parts = plan_trees(examples, capacity=99) or []
    assert [count_tokens(part) for part in parts] == [70, 70]
    parts = plan_trees(examples, capacity=99, num_processes=4) or []
    assert len(parts) == 4
    assert max(map(count_tokens, parts)) == 40 + 8 * 2
    few = plan_trees(examples[:2], capacity=99, num_processes=3) or []
    assert few == [] or [] in few


def dataset_of(examples: list[Example]) -> EncodedDataset:
    dataset = EncodedDataset()
    for each in examples:
        dataset.append(each)
    return dataset


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(one, other)
    )


def test_a_step_has_the_same_examples_with_and_without_and_fewer_micro_batches() -> None:
    prompt = list(range(1, 25))
    dataset = dataset_of([example([*prompt, 30 + n % 50], [n % 7 + 1, 1]) for n in range(90)])
    plain = TrainingBatches(dataset, batch_shape(), max_length=32)
    shared = TrainingBatches(dataset, batch_shape(share=True), max_length=32)
    assert plain.steps_per_epoch == shared.steps_per_epoch > 3
    for step, tree in zip(plain.epoch(0), shared.epoch(0), strict=True):
        assert (step.num_tokens, step.num_target_tokens) == (
            tree.num_tokens,
            tree.num_target_tokens,
        )
        ids = [
            sorted(i for part in each.example_ids for ids in part for i in ids)
            for each in (step, tree)
        ]
        assert ids[0] == ids[1]
        assert len(tree.micro_batches) < len(step.micro_batches)
        assert tree.num_computed < step.num_computed == step.num_tokens
        computed = sum(int((batch["input_ids"] != 0).sum()) for batch in tree.micro_batches)
        assert computed == tree.num_computed
        assert all(batch["input_ids"].shape[0] == 1 for batch in tree.micro_batches)


def test_a_step_in_which_nothing_is_shared_is_laid_out_bit_for_bit_as_without() -> None:
    generator = random.Random(0)
    examples = [
        example([generator.randrange(1, 999) for _ in range(generator.randint(9, 20))], [1, 2])
        for _ in range(60)
    ]
    for shape in ({}, {"packing": False}):
        plain = TrainingBatches(dataset_of(examples), batch_shape(**shape), max_length=32)
        shared = TrainingBatches(
            dataset_of(examples), batch_shape(share=True, **shape), max_length=32
        )
        steps = list(zip(plain.epoch(0), shared.epoch(0), strict=True))
        assert len(steps) > 4
        assert all(same(one.micro_batches, two.micro_batches) for one, two in steps)


def test_processes_take_shares_of_the_same_trees() -> None:
    prompt = list(range(1, 25))
    dataset = dataset_of([example([*prompt, 30 + n % 50], [n % 7 + 1, 1]) for n in range(90)])
    for number in (2, 3):
        ranks = [
            list(
                TrainingBatches(
                    dataset, batch_shape(share=True, rank=r, num_processes=number), max_length=32
                ).epoch(0)
            )
            for r in range(number)
        ]
        plain = list(TrainingBatches(dataset, batch_shape(), max_length=32).epoch(0))
        for expected, parts in zip(plain, zip(*ranks, strict=True), strict=True):
            assert len({len(part.micro_batches) for part in parts}) == 1
            assert len({part.num_computed for part in parts}) == 1
            ids = sorted(i for p in parts for b in p.example_ids for s in b for i in s)
            assert ids == sorted(i for b in expected.example_ids for s in b for i in s)
            assert sum(len(b["targets"]) for p in parts for b in p.micro_batches) == (
                expected.num_target_tokens
            )


@given(st.lists(st.sampled_from([IGNORE_INDEX, 0, 5, 156, 255, 65_436, 16_777_215]), max_size=6))
def test_the_beginning_ends_before_the_first_target(labels: list[int]) -> None:
    labels = [IGNORE_INDEX, *labels, 7]
    ids = list(range(10, 10 + len(labels)))
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    found = beginning(Example(ids, labels))
    assert list(memoryview(found).cast("i")) == ids[:first]
