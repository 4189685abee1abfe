"""What a model must do before it is trained, and what it may not be able to do."""

import json

import pytest
import torch

from finetune.config.loading import make_config
from finetune.data.batches.collate import collate
from finetune.data.types import targets_of
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.language_model import LanguageModel
from finetune.models.load import ModelSpec, load_model
from finetune.models.probes import check_causal, why_not_packed
from finetune.recipes.train.train import run_training
from tests.conftest import MOE

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LFM2 = {
    "model_type": "lfm2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention"],
    "max_position_embeddings": 128,
}


def made(config, vocab_size=97):
    torch.manual_seed(0)
    return LanguageModel(
        load_model(ModelSpec(config=config, vocab_size=vocab_size, attn_implementation="sdpa"))
    )


@pytest.mark.parametrize("kind", ["bert", "electra", "ernie"])
def test_a_model_that_sees_the_future_is_refused(kind):
    """At small random weights too, where the context hardly matters."""
    config = BERT | {"model_type": kind}
    with pytest.raises(UserError, match="sees the tokens that it is to predict"):
        check_causal(made(config))
    check_causal(made(config | {"is_decoder": True}))


def test_decoders_pass(make_model):
    for kind in ("gpt2", "llama", "gemma3", "gpt_neox", "bloom"):
        language_model = LanguageModel(make_model(kind))
        check_causal(language_model)
        assert (why_not_packed(language_model) is None) == (kind != "bloom")
    check_causal(made(LFM2))


@pytest.mark.parametrize("length", [5, 7, 16, 17])
def test_a_model_that_reads_a_few_tokens_is_probed_with_no_more(length, make_model):
    language_model = LanguageModel(make_model("gpt2", n_positions=length))
    check_causal(language_model)
    assert why_not_packed(language_model) is None


def test_a_batch_that_is_mixed_is_refused(make_model):
    """Experts that choose their tokens do this: what a token gets depends on the whole batch."""
    model = make_model("llama")
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(lambda module, args, out: out - out.mean(0, keepdim=True))
    with pytest.raises(UserError, match="mixes the sequences of a batch"):
        check_causal(LanguageModel(model))


@pytest.mark.parametrize("config", [LFM2, BERT | {"is_decoder": True}])
def test_what_cannot_be_packed_is_not_packed_and_that_is_said(tiny, tmp_path, config):
    tree = tiny(model={"config": config}, training={"max_steps": 1})
    display = Display(enabled=False)
    run_training(make_config(tree), display=display)
    assert any(note.startswith("packing is off, one example a sequence") for note in display.notes)
    run = tmp_path / "run"
    assert "packing: false" in (run / "config.yaml").read_text()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_what_sees_the_future_is_refused_before_the_first_step(tiny, tmp_path):
    tree = tiny(model={"config": BERT}, data={"packing": False})
    with pytest.raises(UserError, match="sees the tokens that it is to predict"):
        run_training(make_config(tree), display=Display(enabled=False))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_architecture_without_sdpa_gets_eager_attention_which_is_said(tiny):
    config = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}
    display = Display(enabled=False)
    run_training(
        make_config(tiny(model={"config": config}, training={"max_steps": 1})), display=display
    )
    assert sum("attention is eager" in note for note in display.notes) == 1


def test_the_routers_loss_is_that_of_transformers():
    config = {
        "model_type": "mixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    }
    language_model = made(config)
    ids = torch.randint(5, 97, (3, 12))
    theirs = language_model.model(input_ids=ids, labels=ids)
    theirs.loss.backward()
    gradients = {n: p.grad.clone() for n, p in language_model.model.named_parameters()}
    language_model.zero_grad()
    language_model.train()
    loss = language_model(ids, targets_of(ids)) / (3 * 11)
    whole, part = theirs.loss.item(), theirs.aux_loss.item()
    assert loss.item() == pytest.approx(whole, rel=1e-5)
    assert part > 0.1
    loss.backward()
    for name, parameter in language_model.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)
    language_model.eval()
    plain = language_model(ids, targets_of(ids)) / (3 * 11)
    assert plain.item() == pytest.approx(whole - 0.5 * part, rel=1e-5)


def test_the_routers_loss_does_not_count_padding():
    config = MOE | {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    language_model = made(config).train()
    ids = torch.randint(5, 97, (2, 12))
    labels = ids.clone()
    labels[1, 7:] = -100
    first = language_model(ids, targets_of(labels)).item()
    ids[1, 7:] = 3
    assert language_model(ids, targets_of(labels)).item() == pytest.approx(first, rel=1e-6)


def test_the_routers_loss_of_a_micro_batch_without_targets_is_nothing():
    """A process has such a one if a step has fewer sequences than there are processes."""
    config = MOE | {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    language_model = made(config).train()
    loss = language_model(**collate([], pad_id=0, packed=True))
    assert loss.item() == 0
    loss.backward()
    gradients = {name: p.grad for name, p in language_model.named_parameters()}
    routers = [name for name in gradients if name.endswith("mlp.gate.weight")]
    assert routers
    assert all(gradients[name] is not None for name in routers)  # which DDP waits for
    assert not any(gradient.any() for gradient in gradients.values() if gradient is not None)
