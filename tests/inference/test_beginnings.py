"""Beginnings of prompts that are read once: in a batch, and from turn to turn of a chat."""

import pytest
import torch

from finetune.inference.batching import way_of
from finetune.inference.beginnings import KeptCache, common_beginnings
from finetune.inference.generation import GenerationSettings, generate, stream
from tests.models.conftest import make_model

__all__ = ["make_model"]

GREEDY = GenerationSettings.greedy(6)


def ids(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (count,), generator=generator).tolist()


def prompts_of_two_kinds():
    one, other = ids(20, 1), ids(13, 2)
    return [one + ids(3, 10 + i) for i in range(4)] + [other + ids(5, 20 + i) for i in range(3)]


def watched(model):
    """Have `model` note the shape of each input, once its way is known."""
    way_of(model)
    shapes, forward = [], model.forward

    def noting(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    model.forward = noting
    return shapes


def test_groups_are_those_that_save_the_most():
    prompts = prompts_of_two_kinds()
    found = {count: sorted(members) for count, members in common_beginnings(prompts)}
    assert found == {20: [0, 1, 2, 3], 13: [4, 5, 6]}
    assert common_beginnings(prompts[:4]) == [(20, [0, 1, 2, 3])]
    assert common_beginnings([[1, 2], [3, 4, 5]]) == [(0, [0, 1])]
    assert common_beginnings([[7, 8, 9]] * 3) == [(2, [0, 1, 2])]
    lone = dict(common_beginnings([*prompts[:4], ids(18, 9)]))
    assert lone[17] == [4]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_answers_are_those_of_the_prompts_alone_and_each_beginning_is_read_once(kind, make_model):
    model, prompts = make_model(kind), prompts_of_two_kinds()
    alone = [generate(model, [p], settings=GREEDY, batch_size=1)[0] for p in prompts]
    shapes = watched(model)
    assert generate(model, prompts, settings=GREEDY, batch_size=64) == alone
    assert shapes[:2] == [(2, 20), (7, 5)]
    assert len({tuple(answer) for answer in alone}) > 1


def test_a_conversation_reads_only_what_is_new(make_model):
    class Numbers:
        def decode(self, tokens, **_):
            return "".join(chr(200 + token) for token in tokens)

    model, kept = make_model("llama"), KeptCache()
    prompt = ids(15, 3)
    shapes = watched(model)
    first = "".join(stream(model, Numbers(), prompt, GREEDY, kept=kept))
    answer = [ord(character) - 200 for character in first]
    assert shapes == [(1, 15)] + [(1, 1)] * 5
    second = prompt + answer + ids(7, 4)
    del shapes[:]
    with_cache = "".join(stream(model, Numbers(), second, GREEDY, kept=kept))
    assert shapes[0] == (1, 7 + 1)  # the last token of the answer was never read
    del shapes[:]
    assert with_cache == "".join(stream(model, Numbers(), second, GREEDY))
    assert shapes[0] == (1, len(second))
    changed = prompt[:4] + ids(9, 5)
    del shapes[:]
    again = "".join(stream(model, Numbers(), changed, GREEDY, kept=kept))
    assert shapes[0] == (1, 9)
    assert again == "".join(stream(model, Numbers(), changed, GREEDY))


def test_a_window_reads_everything_again(make_model):
    class Numbers:
        def decode(self, tokens, **_):
            return "".join(chr(200 + token) for token in tokens)

    model, kept = make_model("gemma3"), KeptCache()
    prompt = ids(15, 3)
    for _ in range(2):
        shapes = watched(model)
        found = "".join(stream(model, Numbers(), prompt, GREEDY, kept=kept))
        assert shapes[0] == (1, 15)
        assert found == "".join(stream(model, Numbers(), prompt, GREEDY))
