"""The active vocabulary on tiny random models of several families.

Each is the same model, of which only some rows train.
"""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.data.types import targets_of
from finetune.errors import UserError
from finetune.models.adapters import add_lora, merge_lora
from finetune.models.language_model import LanguageModel
from finetune.models.probes import check_packing
from finetune.models.speed import enable_activation_checkpointing
from finetune.models.vocabulary.activate import (
    activate_vocabulary,
    active_modules,
    deactivate_vocabulary,
    full_vocabulary,
)
from finetune.models.vocabulary.frozen_sample import (
    FrozenSampler,
    draw_rows,
    inclusion_chances,
    measure_frozen_rows,
)
from finetune.optim.groups import build_groups

V = 97
ACTIVE = [0, 1, 2, 5, 8, 13, 21, 34, 55, 89]
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
}
FAMILIES = {
    "llama": {**SHAPE, "tie_word_embeddings": True},
    "qwen2": {**SHAPE, "tie_word_embeddings": True},
    "gemma3_text": {
        **SHAPE,
        "head_dim": 8,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_neox": {**SHAPE, "tie_word_embeddings": False},
}


def make(family, seed=0):
    torch.manual_seed(seed)
    special = {"bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=V, **special, **FAMILIES[family])
    )
    for table in {
        id(t): t
        for t in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    }.values():
        torch.nn.init.normal_(table, std=0.5)
    return model.eval()


def batch(ids=ACTIVE, rows=3, length=11):
    chosen = torch.tensor(ids)[torch.randint(0, len(ids), (rows, length))]
    return chosen, targets_of(chosen)


def test_every_family_is_tried():
    assert len(FAMILIES) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_and_predicts_as_before_and_comes_back_bit_for_bit(family):
    model, ids = make(family), torch.randint(0, V, (2, 9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(input_ids=ids).logits
    names = [name for name, _ in model.named_parameters()]
    activate_vocabulary(model, ACTIVE)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name in trained if not name.endswith(".vocabulary.shift")] == names
    assert len(trained) == len(names) + 1
    assert model.get_output_embeddings().weight.shape == (len(ACTIVE), 16)
    tied = model.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    with full_vocabulary(model):
        assert {name: value.shape for name, value in model.state_dict().items()} == {
            n: v.shape for n, v in before.items()
        }
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not active_modules(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    deactivate_vocabulary(model)
    assert type(model.get_input_embeddings()) is type(make(family).get_input_embeddings())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_full_model_for_the_active_rows(family):
    full, ids = (
        make(family),
        batch(ACTIVE[1:]),
    )  # without Gemma's padding token, whose lookup has a gradient of its own: none
    model = copy.deepcopy(full)
    activate_vocabulary(model, ACTIVE)
    ours, theirs = LanguageModel(model), LanguageModel(full)
    assert ours.fused
    loss, expected = ours(*ids), theirs(*ids)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    loss.backward()
    expected.backward()
    gradients, inactive = dict(full.named_parameters()), [i for i in range(V) if i not in ACTIVE]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(".vocabulary.shift"):
            unused = full.get_output_embeddings().weight.grad[inactive].sum(0)
            if full.config.get_text_config().to_dict().get("final_logit_softcapping") is None:
                torch.testing.assert_close(
                    parameter.grad, -unused, rtol=1e-4, atol=1e-4
                )  # it goes against them, and only that
            else:  # whose derivative differs from row to row
                assert torch.cosine_similarity(parameter.grad, -unused, 0) > 0.8
            continue
        wanted = gradients[name].grad
        torch.testing.assert_close(
            parameter.grad, wanted[ACTIVE] if len(wanted) == V else wanted, rtol=1e-4, atol=1e-5
        )
    assert (
        full.get_output_embeddings().weight.grad[inactive].any()
    )  # which the full model would have moved


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_active_rows_only(family):
    model = make(family)
    before = copy.deepcopy(model.state_dict())
    activate_vocabulary(model, ACTIVE)
    language_model = LanguageModel(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for _ in range(5):
        language_model(*batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained, ids = model(input_ids=torch.arange(V)[None]).logits, torch.arange(V)[None]
    deactivate_vocabulary(model)
    torch.testing.assert_close(model(input_ids=ids).logits, trained)
    tables = [name for name, value in model.state_dict().items() if value.shape == (V, 16)]
    assert tables
    for name in tables:
        moved = (model.state_dict()[name] != before[name]).any(1).nonzero()[:, 0].tolist()
        assert moved
        assert set(moved) <= set(ACTIVE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shift_moves_the_active_rows_against_the_others(family):
    model, ids = make(family), torch.randint(0, V, (2, 9))
    shift = torch.linspace(-1, 1, 16)
    moved = copy.deepcopy(model)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        (moved.get_input_embeddings() if tied else moved.get_output_embeddings()).weight[
            ACTIVE
        ] += shift
    activate_vocabulary(model, ACTIVE, spare=1)
    vocabulary = model.get_output_embeddings().vocabulary
    vocabulary.shift.data.copy_(shift)
    expected = moved(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    torch.testing.assert_close(
        LanguageModel(model)(ids, targets_of(ids)), LanguageModel(moved)(ids, targets_of(ids))
    )
    assert vocabulary.grow(model.get_output_embeddings().weight, torch.tensor([3])).tolist() == []
    torch.testing.assert_close(
        model(input_ids=ids).logits, expected
    )  # a row that joins later starts where it was
    deactivate_vocabulary(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_frozen_rows_of_a_bfloat16_file_stay_so_under_autocast(family):
    model, ids = make(family).bfloat16().float(), batch(range(V))
    before = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(model)
    activate_vocabulary(model, ACTIVE, frozen_dtype=torch.bfloat16)
    activate_vocabulary(other, ACTIVE)
    assert model.get_output_embeddings().vocabulary.frozen.dtype == torch.bfloat16
    torch.testing.assert_close(model(input_ids=ids[0]).logits, other(input_ids=ids[0]).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(input_ids=ids[0]).logits, other(input_ids=ids[0]).logits)
        assert torch.equal(LanguageModel(model)(*ids), LanguageModel(other)(*ids))
    deactivate_vocabulary(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    precise = make(family)  # whose rows need all their bits
    activate_vocabulary(precise, ACTIVE, frozen_dtype=torch.bfloat16)
    assert precise.get_output_embeddings().vocabulary.frozen.dtype == torch.float32


def test_products_in_bfloat16_follow_rows_that_are_loaded():
    model, other, ids = make("llama"), make("llama"), batch(range(V))
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    for each in (model, other):
        activate_vocabulary(each, ACTIVE)
    with torch.autocast("cpu", torch.bfloat16):
        first, wanted = LanguageModel(model)(*ids), LanguageModel(other)(*ids)
        assert not torch.equal(first, wanted)
        model.load_state_dict(other.state_dict())
        assert torch.equal(LanguageModel(model)(*ids), wanted)
        assert torch.equal(model(input_ids=ids[0]).logits, other(input_ids=ids[0]).logits)


def test_without_a_shift():
    model = make("llama")
    activate_vocabulary(model, ACTIVE, shift=False)
    assert not [name for name, _ in model.named_parameters() if name.endswith("shift")]


def test_an_untied_input_may_stay_whole():
    model = make("gpt_neox")
    activate_vocabulary(model, ACTIVE, compact_input=False)
    assert model.get_input_embeddings().weight.shape == (V, 16)
    assert model.get_output_embeddings().weight.shape == (len(ACTIVE), 16)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_copies_pickles_checkpointing_and_packing(family):
    model, ids = make(family), torch.randint(0, V, (2, 9))
    activate_vocabulary(model, ACTIVE)
    expected = model(input_ids=ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids=ids).logits, expected)
        assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
        other.get_output_embeddings().weight.data.zero_()
    assert torch.equal(model(input_ids=ids).logits, expected)
    language_model = LanguageModel(model)
    check_packing(language_model)
    plain = torch.autograd.grad(language_model(*batch()), model.get_output_embeddings().weight)[0]
    enable_activation_checkpointing(language_model)
    language_model.train()
    torch.manual_seed(0)
    first = batch()
    again = torch.autograd.grad(language_model(*first), model.get_output_embeddings().weight)[0]
    language_model.eval()
    torch.testing.assert_close(
        again, torch.autograd.grad(language_model(*first), model.get_output_embeddings().weight)[0]
    )
    assert plain.any()


def test_lora_beside_active_rows():
    model = make("llama")
    activate_vocabulary(model, ACTIVE)
    wrapped = add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules="all-linear")
    model.get_output_embeddings().weight.requires_grad_(True)
    language_model = LanguageModel(wrapped)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        language_model(*batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    ids = torch.randint(0, V, (2, 9))
    wrapped.eval()
    expected = wrapped(input_ids=ids).logits
    with full_vocabulary(wrapped):
        merged = merge_lora(wrapped)
    assert not active_modules(merged)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_growing_reads_the_same_and_trains_the_new_row(family):
    model, ids = make(family), torch.randint(0, V, (2, 9))
    before = copy.deepcopy(model.state_dict())
    activate_vocabulary(model, ACTIVE, spare=2)
    head = model.get_output_embeddings()
    language_model, expected = LanguageModel(model), model(input_ids=ids).logits
    everything = (ids, targets_of(ids))
    loss = language_model(*everything)
    saved = copy.deepcopy(model.state_dict())
    assert head.vocabulary.grow(head.weight, torch.tensor([1, 3, 3])).tolist() == []
    assert head.vocabulary.grow(head.weight, torch.tensor([4, 6, 3])).tolist() == [6]
    assert head.vocabulary.num_active == len(ACTIVE) + 2
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    torch.testing.assert_close(language_model(*everything), loss)
    optimizer = torch.optim.AdamW([head.weight], lr=1e-2)
    language_model(*batch([3, 4])).backward()
    optimizer.step()
    grown = model(input_ids=ids).logits
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(saved)  # back to where there was room, and forth again
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    model.load_state_dict(state)
    torch.testing.assert_close(model(input_ids=ids).logits, grown)
    deactivate_vocabulary(model)
    moved = (
        (model.state_dict()["model.embed_tokens.weight"] != before["model.embed_tokens.weight"])
        .any(1)
        .nonzero()[:, 0]
    )
    assert {3, 4} <= set(moved.tolist()) <= {*ACTIVE, 3, 4}


def test_bad_ids_and_unknown_heads_are_refused():
    with pytest.raises(UserError, match="token ids from 0 to 96"):
        activate_vocabulary(make("llama"), [3, V])
    with pytest.raises(UserError, match="at least one"):
        activate_vocabulary(make("llama"), [])
    model = make("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    with pytest.raises(UserError, match="has a bias"):
        activate_vocabulary(model, ACTIVE)


def test_a_second_active_vocabulary_is_refused_until_the_first_is_given_up():
    model, ids = make("llama"), torch.randint(0, V, (2, 9))
    expected = model(input_ids=ids).logits
    activate_vocabulary(model, ACTIVE)
    with pytest.raises(
        UserError, match=r"has an active vocabulary already\. .* with deactivate_vocabulary"
    ):
        activate_vocabulary(model, [1, 2])
    with pytest.raises(
        UserError,
        match="resize its table before activate_vocabulary, or after deactivate_vocabulary",
    ):
        model.resize_token_embeddings(V + 3)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    deactivate_vocabulary(model)
    assert model.resize_token_embeddings(V + 3, mean_resizing=False).weight.shape == (V + 3, 16)
    model.resize_token_embeddings(V)
    activate_vocabulary(model, [1, 2])
    assert model.get_output_embeddings().weight.shape == (2, 16)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


# Sampling


def test_chances_add_up_and_follow_the_weights():
    weights = torch.tensor([100.0, 10.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    chances = inclusion_chances(weights, 3)
    assert chances.sum() == pytest.approx(3)
    assert chances[0] == 1
    assert (chances > 0).all()
    assert chances[1] > chances[2] == chances[3] > chances[4] == chances[7]
    assert (inclusion_chances(weights, 8) == 1).all()
    assert inclusion_chances(torch.zeros(4), 2).tolist() == [0.5] * 4


def test_rows_are_drawn_with_their_chances():
    chances = inclusion_chances(torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0, 1.0, 0.5, 0.1]), 4)
    generator, draws = torch.Generator().manual_seed(0), 4000
    counts = torch.zeros(8)
    for _ in range(draws):
        rows = draw_rows(chances, generator)
        assert len(rows) == len(rows.unique()) == 4
        counts[rows] += 1
    assert (counts / draws - chances).abs().max() < 4 * 0.5 / draws**0.5


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_a_sample_of_everything_is_exact_and_a_smaller_one_right_on_average(family):
    model = make(family)
    activate_vocabulary(model, ACTIVE)
    language_model, ids = LanguageModel(model), batch()
    language_model.train()
    exact = language_model(*ids)
    weights = measure_frozen_rows(language_model, [{"input_ids": ids[0], "targets": ids[1]}])
    assert weights.shape == (V - len(ACTIVE),)
    assert (weights > 0).all()
    everything = FrozenSampler(language_model, inclusion_chances(weights, V))
    everything.before_step(0)
    torch.testing.assert_close(language_model(*ids), exact)
    sampler = FrozenSampler(language_model, inclusion_chances(weights, 40))
    estimates = []
    for seed in range(300):
        sampler.before_step(seed)
        estimates.append(language_model(*ids).detach() / exact.detach())
    estimates = torch.stack(estimates)
    assert 0 < estimates.std() < 0.2
    assert abs(estimates.mean() - 1) < 0.02  # the log of an unbiased estimate is a little low
    language_model.eval()
    torch.testing.assert_close(language_model(*ids), exact)  # evaluation is exact


def test_a_sample_is_refused_where_the_model_makes_its_logits_by_itself():
    """Falcon-H1 scales hidden states and logits by numbers of its own; its loss is still exact."""
    multiplied = {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "lm_head_multiplier": 0.5,
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("falcon_h1", vocab_size=V, **SHAPE, **multiplied)
    )
    activate_vocabulary(model.eval(), ACTIVE)
    language_model, ids = LanguageModel(model), batch()
    for sample in (
        lambda: measure_frozen_rows(language_model, [{"input_ids": ids[0], "targets": ids[1]}]),
        lambda: FrozenSampler(language_model, torch.ones(V - len(ACTIVE))),
    ):
        with pytest.raises(
            UserError,
            match=r"Falcon.* computes its logits in a way of its own.*"
            r"Set vocabulary.mode to active, or",
        ):
            sample()
    logits = model(input_ids=ids[0], use_cache=False).logits[:, :-1].flatten(0, 1)
    inactive = torch.ones(V, dtype=torch.bool).index_fill(0, torch.tensor(ACTIVE), False)
    scores = language_model(*ids, reduction="none", inactive=inactive)
    torch.testing.assert_close(
        scores[:, 0],
        torch.nn.functional.cross_entropy(logits, ids[1][:, 1], reduction="none"),
    )
    torch.testing.assert_close(scores[:, 1], torch.softmax(logits, 1)[:, inactive].sum(1))


def test_bad_input_for_a_sample_is_refused():
    language_model, ids = LanguageModel(make("llama")), batch()
    with pytest.raises(UserError, match=r"no frozen rows to draw from\. Call activate_vocabulary"):
        FrozenSampler(language_model, torch.ones(V))
    activate_vocabulary(language_model.model, ACTIVE)
    with pytest.raises(UserError, match="needs batches with target tokens"):
        measure_frozen_rows(language_model, [])
    with pytest.raises(UserError, match=r"frozen rows to draw is 0\. Draw at least one"):
        inclusion_chances(torch.ones(V - len(ACTIVE)), 0)
    sampler = FrozenSampler(language_model, inclusion_chances(torch.ones(V - len(ACTIVE)), 5))
    targets = ids[1].clone()
    targets[4, 1] = 3
    language_model.train()
    sampler.before_step(0, targets[:, 1])
    assert language_model(ids[0], targets) > 0
    rows = V - len(ACTIVE)
    for wrong in (
        torch.full((rows - 1,), 0.5),
        torch.zeros(rows),
        torch.full((rows,), torch.nan),
        torch.full((rows,), 1.5),
    ):
        with pytest.raises(
            UserError, match=f"each of the {rows} frozen rows needs a chance above 0 and at most 1"
        ):
            sampler.chances = wrong
    for wrong in (-torch.ones(rows), torch.full((rows,), torch.nan)):
        with pytest.raises(UserError, match="weights from 0 up"):
            inclusion_chances(wrong, 5)
    sampler.chances = (
        torch.tensor([0.5] * 10 + [1e-9] * (rows - 10))
        .double()
        .index_fill(0, torch.tensor([0]), 1e-9)
    )  # token 3's
    sampler.before_step(0)
    with pytest.raises(
        UserError,
        match=r"the target token 3 does not train and was not drawn.*FrozenSampler.before_step",
    ):
        language_model(ids[0], targets)
    assert language_model(*ids) > 0
    language_model.eval()
    assert language_model(ids[0], targets) > 0  # evaluation samples nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_writes_the_plain_model(family, tmp_path):
    model, ids = make(family), torch.randint(0, V, (2, 9))
    activate_vocabulary(model, ACTIVE, spare=2)
    with torch.no_grad():
        model.get_output_embeddings().weight[:3] += 1
    for saved, given in (
        ("plain", {}),
        ("with_state", {"state_dict": model.state_dict()}),
    ):  # as transformers' Trainer does
        copy.deepcopy(model).save_pretrained(tmp_path / saved, **given)
        read = AutoModelForCausalLM.from_pretrained(tmp_path / saved).eval()
        assert len(read.get_output_embeddings().weight) == V
        torch.testing.assert_close(read(input_ids=ids).logits, model(input_ids=ids).logits)
    assert active_modules(model)
    deactivate_vocabulary(model)
    assert "save_pretrained" not in vars(model)


def test_what_is_set_for_the_table_by_name_holds_for_the_shift():
    model = make("llama")
    activate_vocabulary(model, ACTIVE)
    groups = build_groups(
        model,
        lr=1.0,
        weight_decay=0.0,
        overrides=[{"pattern": "model.embed_tokens.weight", "lr": 0.5}],
    )
    names = [name for name, _ in next(group["params"] for group in groups if group["lr"] == 0.5)]
    assert names == ["model.embed_tokens.weight", "model.embed_tokens.vocabulary.shift"]


def test_lora_on_a_head_with_active_rows_is_refused():
    model = make("llama")
    activate_vocabulary(model, ACTIVE)
    with pytest.raises(
        UserError,
        match=r"target_modules: 'lm_head' is the output head.*Leave it out, or set "
        r"vocabulary.mode to full",
    ):
        add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules=["q_proj", "lm_head"])


def test_frozen_targets_are_put_into_the_sample():
    model = make("llama")
    activate_vocabulary(model, ACTIVE)
    language_model, ids = LanguageModel(model), batch([*ACTIVE, 3, 96])
    language_model.train()
    exact = language_model(*ids)
    sampler = FrozenSampler(
        language_model, torch.full((V - len(ACTIVE),), 0.25, dtype=torch.float64)
    )
    estimates = []
    for seed in range(200):
        sampler.before_step(seed, targets=ids[1][:, 1])
        estimates.append(language_model(*ids).item())
    assert sum(estimates) / len(estimates) == pytest.approx(
        exact.item(), rel=0.005
    )  # with their chances it is 0.9 % too low
