"""Generation against the slow way: one prompt at a time, all of its tokens for each new one."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.errors import UserError
from finetune.inference.generation import AnswerText, GenerationSettings, generate, stream
from finetune.models.language_model import keeping_casts

GREEDY = GenerationSettings.greedy(9)


def prompts_of(lengths, shared=0, seed=0):
    numbers = random.Random(seed)
    start = [numbers.randrange(5, 320) for _ in range(shared)]
    return [start + [numbers.randrange(5, 320) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def slow_greedy(model, prompt, max_new_tokens, stop_ids=(), penalty=1.0):
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        for token in set(ids) if penalty != 1.0 else ():
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )
        token = int(logits.argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("shared", [0, 9])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_greedy_answers_are_those_of_the_slow_way_whatever_the_batch(any_model, batch_size, shared):
    prompts = prompts_of([4, 1, 15, 7, 2, 9, 1], shared=shared)
    answers = generate(any_model, prompts, batch_size=batch_size, settings=GREEDY)
    expected = [slow_greedy(any_model, prompt, 9) for prompt in prompts]
    assert answers == expected
    assert len({tuple(answer) for answer in expected}) > 3  # the model does tell the prompts apart


def test_rows_stop_at_their_own_stop_token_and_the_others_go_on(any_model):
    prompts = prompts_of([5, 8, 3, 11])
    free = generate(any_model, prompts, batch_size=4, settings=GREEDY)
    stops = [free[0][3], free[1][6]]
    expected = [slow_greedy(any_model, prompt, 9, stop_ids=stops) for prompt in prompts]
    answers = generate(any_model, prompts, batch_size=4, settings=replace(GREEDY, stop_ids=stops))
    assert answers == expected
    assert len({len(answer) for answer in answers}) > 1
    assert not any(stop in answer for stop in stops for answer in answers)


def test_repetition_penalty_is_that_of_the_slow_way(any_model):
    prompts = prompts_of([6, 2, 9], shared=3)
    answers = generate(
        any_model, prompts, batch_size=3, settings=replace(GREEDY, repetition_penalty=1.8)
    )
    assert answers == [slow_greedy(any_model, prompt, 9, penalty=1.8) for prompt in prompts]
    assert answers != generate(any_model, prompts, batch_size=3, settings=GREEDY)


def test_sampled_answers_are_fixed_by_the_seed_and_not_by_the_batch(llama):
    prompts = prompts_of([4, 9, 2, 6])
    sampling = replace(GREEDY, temperature=1.5, top_p=0.95, top_k=50, seed=7)
    answers = generate(llama, prompts, batch_size=4, settings=sampling)
    assert answers == generate(llama, prompts, batch_size=1, settings=sampling)
    assert answers != generate(llama, prompts, batch_size=4, settings=replace(sampling, seed=8))
    parts = [
        generate(llama, prompts[:3], batch_size=4, settings=sampling),
        generate(llama, prompts[3:], batch_size=4, settings=sampling, first=3),
    ]
    assert answers == [*parts[0], *parts[1]]
    alike = generate(llama, [prompts[0]] * 3, batch_size=2, settings=sampling)
    assert len({*map(tuple, alike)}) == 3
    state = torch.get_rng_state()
    generate(llama, prompts, batch_size=4, settings=replace(sampling, seed=None))
    assert torch.equal(
        state, torch.get_rng_state()
    )  # training goes on as if nothing had been generated


def test_an_answer_ends_where_the_context_ends(llama):
    long, short = prompts_of([60, 3])
    settings = replace(GREEDY, max_new_tokens=100)
    assert [
        len(answer) for answer in generate(llama, [long, short], batch_size=2, settings=settings)
    ] == [
        4,
        61,
    ]
    with pytest.raises(UserError, match="64 tokens and the model reads at most 64"):
        generate(llama, prompts_of([64]), batch_size=1, settings=settings)
    with pytest.raises(UserError, match="prompt is empty"):
        generate(llama, [[]], batch_size=1, settings=settings)


def test_progress_counts_to_the_end_and_the_mode_comes_back(llama):
    seen = []
    llama.train()
    generate(
        llama,
        prompts_of([3, 4, 5, 6, 7]),
        batch_size=2,
        on_progress=lambda *counts: seen.append(counts),
        settings=GREEDY,
    )
    assert llama.training
    llama.eval()
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert generate(llama, [], batch_size=2, settings=GREEDY) == []


def test_the_head_sees_one_position_a_row(llama):
    positions = []
    hook = llama.lm_head.register_forward_hook(
        lambda module, args, output: positions.append(output.shape[1])
    )
    generate(llama, prompts_of([9, 4], shared=5), batch_size=2, settings=GREEDY)
    hook.remove()
    assert set(positions) == {1}


class Casts(TorchDispatchMode):
    """Counts the narrow copies of matrices as large as a weight."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype is torch.bfloat16:
            self.count += args[0].shape in self.shapes
        return out


def test_under_autocast_each_weight_is_cast_once_and_not_for_each_token(llama):
    """Frozen weights too, as LoRA has them."""
    half = [*llama.parameters()][::2]
    for weight in half:
        weight.requires_grad_(False)
    linear = {m.weight for m in llama.modules() if isinstance(m, torch.nn.Linear)}
    counts = []
    for num_tokens in (2, 9):
        with Casts() as casts, torch.autocast("cpu", torch.bfloat16), keeping_casts(llama):
            casts.shapes = {weight.shape for weight in linear}
            settings = GenerationSettings.greedy(num_tokens)
            generate(llama, prompts_of([5, 8]), batch_size=2, settings=settings)
        counts.append(casts.count)
    frozen_again = not any(weight.requires_grad for weight in half)
    llama.requires_grad_(True)
    assert counts == [len(linear)] * 2
    assert frozen_again


def test_streamed_pieces_join_to_the_generated_answer(llama, tokenizer):
    prompt = prompts_of([6])[0]
    settings = replace(GREEDY, temperature=1.0, seed=3, max_new_tokens=40)
    pieces = list(stream(llama, tokenizer, prompt, settings))
    answer = generate(llama, [prompt], batch_size=1, settings=settings)[0]
    assert "".join(pieces) == tokenizer.decode(answer, skip_special_tokens=True)
    assert len(pieces) > 5


def pieces_of(ids, tokenizer):
    text = AnswerText(tokenizer)
    return [*filter(None, map(text.add, ids)), *filter(None, [text.rest()])]


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=30))
def test_a_piece_never_holds_half_a_character(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(ids, tokenizer)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_four_bytes_comes_out_at_once(tokenizer):
    ids = tokenizer("a🙃b", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    assert pieces_of(ids, tokenizer) == ["a", "🙃", "b"]
