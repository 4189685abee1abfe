"""Batches that began at different times go on as one, and each answer stays what it is alone."""

from dataclasses import replace

import pytest

from finetune.inference.batching import way_of
from finetune.inference.decoder import Decoder, GenerationSettings
from finetune.inference.generation import generate
from tests.inference.conftest import tiny_model

GREEDY = GenerationSettings.greedy(12)
PROMPTS = {
    3: [5, 6, 7, 8, 9, 10, 11],
    4: [5, 6, 40, 41],
    8: [30, 31, 32],
    9: [50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61],
}


def alone(model, prompt, settings):
    return generate(model, [prompt], settings=settings, batch_size=1)[0]


def joined(model, settings, steps=3):
    """Return the answers of two batches of which the second begins `steps` tokens later."""
    answers = {i: [] for i in PROMPTS}
    one, other = (
        Decoder(model, {i: PROMPTS[i] for i in part}, {i: settings[i] for i in part}, way_of(model))
        for part in ((3, 4), (8, 9))
    )
    for decoder, count in ((one, steps), (other, 1)):
        for _ in range(count):
            for i, token in decoder.step():
                answers[i].append(token)
    assert one.join(other)
    while one.active:
        for i, token in one.step():
            answers[i].append(token)
    return answers


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("penalised", [(), (8,), (3, 4, 8, 9)])
def test_each_answer_is_the_one_alone(kind, penalised):
    model = tiny_model(kind).eval()
    settings = {
        i: replace(GREEDY, repetition_penalty=1.5 if i in penalised else 1.0, max_new_tokens=room)
        for i, room in zip(PROMPTS, (9, 12, 11, 8), strict=True)
    }
    for steps in (1, 5):
        found = joined(model, settings, steps)
        assert found == {i: alone(model, PROMPTS[i], settings[i]) for i in PROMPTS}


def test_a_seed_draws_what_it_draws_alone():
    model = tiny_model("llama").eval()
    settings = {i: replace(GREEDY, temperature=1.0, seed=i) for i in PROMPTS}
    assert joined(model, settings) == {i: alone(model, PROMPTS[i], settings[i]) for i in PROMPTS}


def test_windows_are_not_joined():
    model = tiny_model("gemma3_text").eval()
    settings = dict.fromkeys(PROMPTS, GREEDY)
    one, other = (Decoder(model, {i: PROMPTS[i]}, settings, way_of(model)) for i in (3, 4))
    one.step(), other.step()
    assert not one.join(other)
    assert one.active == [3]


def test_a_batch_that_others_join_for_long_does_not_grow():
    model, places = tiny_model("llama").eval(), []
    settings = {i: replace(GREEDY, max_new_tokens=6) for i in range(40)}
    prompts = {i: [5 + i, 6, 7 + i] for i in settings}
    answers = {i: [] for i in settings}
    batch = Decoder(model, {0: prompts[0]}, {0: settings[0]}, way_of(model))
    for i in range(40):
        for _ in range(3):
            for number, token in batch.step():
                answers[number].append(token)
        if i + 1 in settings:
            later = Decoder(model, {i + 1: prompts[i + 1]}, {i + 1: settings[i + 1]}, way_of(model))
            answers[i + 1] += [token for _, token in later.step()]
            assert batch.join(later)
        places.append((batch.mask.shape[1], len(batch.settings), len(batch.rows)))
    while batch.active:
        for number, token in batch.step():
            answers[number].append(token)
    assert max(places) <= (12, 4, 4)
    assert answers == {i: alone(model, prompts[i], settings[i]) for i in settings}
