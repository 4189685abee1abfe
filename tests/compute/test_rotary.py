"""Rotary embeddings of two scalings: a text is read as it is alone, whatever is beside it."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune.compute.rotary import keep_texts_apart, padded_positions, reaches, switching_length
from finetune.data.types import IGNORE_INDEX, targets_of
from finetune.inference.batching import way_of
from finetune.inference.beginnings import KeptCache
from finetune.inference.decoder import Decoder, GenerationSettings
from finetune.inference.generation import generate
from finetune.models.language_model import LanguageModel

LIMIT = 20
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 97,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.4,
}
SCALING = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": LIMIT,
}
KINDS = {
    "phi3": SHAPE | {"original_max_position_embeddings": LIMIT, "rope_parameters": SCALING},
    "llama": SHAPE | {"rope_parameters": SCALING},
    "phimoe": SHAPE
    | {
        "rope_parameters": SCALING | {"short_mscale": 1.0, "long_mscale": 1.4},
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}
LENGTHS = (30, 7, LIMIT, LIMIT + 1, 12)


def plain_model(kind):
    """As transformers makes it: what it computes for one text is what is right."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**KINDS[kind])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def some_texts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def losses_alone(model, text):
    logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="none")


@torch.inference_mode()
def answer_alone(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_padded_and_packed_texts_have_the_losses_that_they_have_alone(kind):
    plain = plain_model(kind)
    language_model = LanguageModel(copy.deepcopy(plain)).eval()
    texts = some_texts(*LENGTHS)
    alone = torch.cat([losses_alone(plain, text) for text in texts])

    longest = max(LENGTHS) + 2
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    labels = [text + [IGNORE_INDEX] * (longest - len(text)) for text in texts]
    padded = language_model.token_losses(ids, targets_of(torch.tensor(labels)))
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)

    packed_ids = torch.tensor([[token for text in texts for token in text]])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    targets = targets_of(torch.where(positions == 0, IGNORE_INDEX, packed_ids))
    packed = language_model.token_losses(packed_ids, targets, positions)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)

    together = torch.nn.functional.cross_entropy(  # what transformers makes of the same batch
        plain(input_ids=ids).logits[:, :-1].flatten(0, 1),
        torch.tensor(labels)[:, 1:].flatten(),
        reduction="none",
    )
    assert (together[together != 0] - alone).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_answer_is_the_one_of_its_prompt_alone(kind, batch_size):
    """Prompts that stay below the length, grow beyond it, and begin beyond it."""
    plain = plain_model(kind)
    start, *prompts = some_texts(6, 33, 4, LIMIT - 3, LIMIT, LIMIT + 1, 9)
    prompts += [start + prompt for prompt in prompts]
    prompts += [2 * start + prompt for prompt in prompts[:3]]
    model = copy.deepcopy(plain)
    answers = generate(model, prompts, settings=GenerationSettings.greedy(8), batch_size=batch_size)
    assert way_of(model).pads
    assert answers == [answer_alone(plain, prompt, 8) for prompt in prompts]


def test_batches_that_join_at_the_switching_length_answer_as_alone():
    plain = plain_model("llama")
    prompts = dict(enumerate(some_texts(LIMIT - 4, 3, LIMIT - 2, 30)))
    model, settings = copy.deepcopy(plain), GenerationSettings.greedy(9)
    one, other = (
        Decoder(model, {i: prompts[i] for i in part}, dict.fromkeys(part, settings), way_of(model))
        for part in ((0, 1), (2, 3))
    )
    answers = {i: [] for i in prompts}
    for decoder in (one, other):
        for i, token in decoder.step():
            answers[i].append(token)
    assert one.join(other)
    while one.active:
        for i, token in one.step():
            answers[i].append(token)
    assert answers == {i: answer_alone(plain, prompt, 9) for i, prompt in prompts.items()}


def test_a_conversation_across_the_switching_length_answers_as_anew():
    plain = plain_model("llama")
    model, kept, text = copy.deepcopy(plain), KeptCache(), some_texts(8)[0]
    for added in (4, 5, 6, 7):
        decoder = Decoder(
            model, {0: text}, {0: GenerationSettings.greedy(3)}, way_of(model), kept=kept
        )
        answer = list(decoder.tokens())
        assert answer == answer_alone(plain, text, 3), len(text)
        text = text + answer + some_texts(added)[0]
    assert len(text) > LIMIT + 10
    short = text[:10]
    decoder = Decoder(
        model, {0: short}, {0: GenerationSettings.greedy(3)}, way_of(model), kept=kept
    )
    assert list(decoder.tokens()) == answer_alone(plain, short, 3)


def test_texts_up_to_the_length_are_read_as_before():
    model = plain_model("llama")
    ids = torch.tensor(some_texts(LIMIT, LIMIT))
    before = model(input_ids=ids).logits
    keep_texts_apart(model)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_the_length_is_read_from_the_config_of_all_layers_or_of_each_kind():
    config = plain_model("llama").config
    assert switching_length(config) == LIMIT
    config.rope_parameters = {
        "full_attention": SCALING,
        "sliding_attention": {"rope_type": "default"},
    }
    assert switching_length(config) == LIMIT
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert switching_length(config) is None


def test_a_text_reaches_as_far_as_its_last_position():
    positions = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 0, 1, 2], [7, 8, 9, 10, 0]])
    yes, no = True, False
    assert reaches(positions, 2).tolist() == [
        [no, yes, yes, yes, yes],
        [no, no, yes, yes, yes],
        [yes, yes, yes, yes, no],
    ]
    assert padded_positions(torch.tensor([2, 4]), 4).tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
