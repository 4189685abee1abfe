"""At each border an error of a library becomes a sentence, and one of our own code stays a bug."""

import json
import shutil
import struct
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from finetune.config import yaml12
from finetune.config.loading import load_config, make_config
from finetune.errors import Border, UserError, reason_of, visible
from finetune.models import checks, gguf, load, tokenizers
from finetune.models.load import ModelSpec, load_model, load_skeleton
from finetune.models.tokenizers import load_tokenizer
from finetune.run import records
from finetune.training import checkpoint, form
from tests.cli.conftest import finished  # noqa: F401  # a fixture

# Border itself


def ours():
    raise KeyError("a bug")


def test_an_error_of_a_library_becomes_a_sentence_with_its_cause():
    with (
        pytest.raises(UserError, match=r"^x\.json is not JSON: Expecting .*\. Mend it$") as found,
        Border("x.json is not JSON", do="Mend it"),
    ):
        json.loads("{")
    assert isinstance(found.value.__cause__, json.JSONDecodeError)


@pytest.mark.parametrize(
    "call",
    [
        partial(struct.unpack, "<Q", b""),
        partial(torch.dot, torch.zeros(2), torch.zeros(3)),
        partial(yaml.safe_load, "["),
        partial(json.loads, "[" * 100_000),
        partial(torch.load, "/dev/null"),
    ],
)
def test_the_families_of_errors(call):
    with pytest.raises(UserError, match=r"^it was not possible: "), Border("it was not possible"):
        call()


@pytest.mark.parametrize(
    "bug",
    [ours, lambda: sorted([2, 1], key=lambda item: ours()), lambda: json.loads("{}", cls=ours)],
    ids=["called", "called by the language", "called by a library"],
)
def test_an_error_of_our_own_code_goes_on(bug):
    with pytest.raises((KeyError, TypeError)), Border("it was not possible"):
        bug()


def test_what_is_no_mistake_goes_on():
    for error in (KeyboardInterrupt(), SystemExit(1), UserError("told already")):
        with pytest.raises(type(error)), Border("it was not possible"):
            raise error


def test_a_long_reason_is_cut_and_an_empty_one_is_the_kind():
    assert len(reason_of(ValueError("word. " * 1000))) < 320
    assert reason_of(ValueError()) == "ValueError"
    assert reason_of(KeyError("rope")) == "KeyError 'rope'"


def test_control_characters_are_escaped():
    assert visible("a\x1b]0;b\x07\x9b\u202e\n\t") == "a\\x1b]0;b\\x07\\x9b\\u202e\n\t"


# A bug of ours inside each border


@pytest.fixture
def model(finished, tmp_path):  # noqa: F811
    shutil.copytree(finished / "run" / "model", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(finished, tmp_path):  # noqa: F811
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def read_yaml(run: Path, model: Path):
    load_config(run / "config.yaml")


def read_checkpoint(run: Path, model: Path):
    newest = sorted((run / "checkpoints").iterdir())[-1]
    checkpoint.load(newest, "training.pt")


BORDERS = {  # the module and the function of ours that has the bug -> what calls it
    (checks, "check_number"): lambda run, model: load_model(ModelSpec(name=str(model))),
    (checks, "check_folder"): lambda run, model: load_tokenizer(ModelSpec(name=str(model))),
    (load, "check_config"): lambda run, model: load_skeleton(ModelSpec(name=str(model))),
    (load, "check_weights"): lambda run, model: load_model(ModelSpec(name=str(model))),
    (tokenizers, "resolve_name"): lambda run, model: load_tokenizer(ModelSpec(name=str(model))),
    (gguf, "check_number"): lambda run, model: load_model(ModelSpec(name=str(write(model)))),
    (yaml12, "_check_size"): read_yaml,
    (checkpoint, "check_tree"): read_checkpoint,
    (records, "check_types"): lambda run, model: records.read_run(run),
}


def write(model: Path) -> Path:
    from tests.models.test_gguf import write_gguf

    write_gguf(model / "tiny.gguf")
    return model / "tiny.gguf"


@pytest.mark.parametrize("place", BORDERS, ids=lambda place: f"{place[0].__name__}.{place[1]}")
def test_a_bug_of_ours_inside_a_border_keeps_its_traceback(place, run, model, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(run / "cache"))
    BORDERS[place](run, model)

    def bug(*arguments, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(*place, bug)
    if place[0] is gguf:
        shutil.rmtree(run / "cache")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        BORDERS[place](run, model)


# What is refused at once


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .* is 1,000,000,000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers .* is -1"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps .* is inf"),
        ({"attention_dropout": float("nan")}, "attention_dropout .* is nan"),
        ({"attention_dropout": -1}, "attention_dropout .* is -1. Give a probability"),
        ({"max_position_embeddings": 0.5}, "could not be loaded"),
        ({"hidden_size": "x"}, "could not be loaded"),
        ({"vocab_size": 10**18}, "could not be loaded|shape"),
        ({"hidden_size": 16}, "shape"),
    ],
)
def test_a_config_out_of_its_range(model, values, says):
    change(model / "config.json", **values)
    with pytest.raises(UserError, match=says):
        load_model(ModelSpec(name=str(model)))


@pytest.mark.parametrize("key", ["num_hidden_layers", "attention_dropout", "rms_norm_eps"])
def test_a_random_model_out_of_its_range(tiny, key):
    from tests.conftest import LLAMA

    value = 10**9 if key == "num_hidden_layers" else float("inf")
    with pytest.raises(UserError, match=rf"model\.config\.{key} is "):
        load_model(ModelSpec(config={**LLAMA, key: value}))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_broken_file_of_a_model_is_named(model, file, text):
    (model / file).write_text(text)
    for call in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=file.replace(".", r"\.")):
            call(ModelSpec(name=str(model)))


def test_weights_that_are_missing_or_not_numbers_are_an_error(model):
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    whole = load_file(path)
    name = next(name for name in whole if "q_proj" in name)
    for state, says in (
        ({key: value for key, value in whole.items() if key != name}, "q_proj.* are missing"),
        ({**whole, name: whole[name] * float("nan")}, "NaN or infinity in .*q_proj"),
        ({**whole, name: whole[name][:-1].contiguous()}, "q_proj.* has the shape"),
    ):
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=says):
            load_model(ModelSpec(name=str(model)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(ModelSpec(name=str(model)))


@pytest.mark.parametrize("name", ["someone/kernel", "kernels-community/flash-attn", "flash_x"])
def test_an_attention_that_a_model_names_is_not_fetched(model, name, monkeypatch):
    import transformers.modeling_utils

    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", pytest.fail)
    change(model / "config.json", attn_implementation=name, _attn_implementation=name)
    assert load_model(ModelSpec(name=str(model))).config._attn_implementation == "sdpa"
    assert load_skeleton(ModelSpec(name=str(model))).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("target", ["../other.safetensors", "/etc/passwd", "a/../../b", 3])
def test_an_index_that_leads_out_of_its_folder_is_refused(model, target):
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": target}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json names "):
        load_model(ModelSpec(name=str(model)))


BOMB = ["a: &a [x, x, x, x, x, x, x, x, x]"] + [
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")
]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a: !!float abc",
            "a: !!int x",
            "a: !!bool perhaps",
            "a: !!timestamp x",
            "a: " + "9" * 5000,
        ),
        *("[" * 3000, "{a: " * 500, "&a [*a]", "\n".join(BOMB)),
        *("x" * 5_000_000, "!!python/object/apply:os.system ['touch executed']"),
    ],
    ids=lambda text: text[:30],
)
def test_yaml_that_bites_is_refused_at_once(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="is not valid YAML: "):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("path", ["a" * 256, "b/" * 3000, "a\0b", "\ud800"])
def test_a_path_that_no_file_can_have(tiny, path):
    for key in ("output_dir", "data"):
        tree = tiny()
        tree[key] = path if key == "output_dir" else {**tree[key], "train": path}
        with pytest.raises(UserError, match="path"):
            make_config(tree)


# Checkpoints that someone else has made


def test_a_checkpoint_of_another_form_is_refused():
    for tree in ({"a": object()}, {"a": {1, 2}}, json.loads("[" * 100 + "]" * 100)):
        with pytest.raises(TypeError):
            form.check_tree(tree)
    form.check_tree({"a": [torch.ones(1), 1, None, "x", 0.5]})
    for found in ({"step": -7}, {"step": 10**30}, {"step": "1"}, {"step": True}, {}, [], {"x": 1}):
        with pytest.raises(TypeError):
            form.check_like(found, {"step": 1}, "it")
    form.check_like({"step": 3, "best": 0.5}, {"step": 1, "best": None}, "it")


def test_the_state_of_an_optimizer_of_another_form_is_refused():
    weight = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(4, 2)
    optimizer.step()
    good = optimizer.state_dict()
    form.check_optimizer_state(good, good, [weight])
    for bad in (
        {"exp_avg": torch.ones(3, 2)},
        {"exp_avg": torch.full((4, 2), float("nan"))},
        {"exp_avg": "x"},
    ):
        state = {0: {**good["state"][0], **bad}}
        with pytest.raises(TypeError):
            form.check_optimizer_state({**good, "state": state}, good, [weight])
    of_its_own = {"factors": [torch.eye(4), torch.eye(2)], "table": torch.ones(256), "kind": "x"}
    of_its_own["narrow"] = torch.ones(3).to(torch.float8_e4m3fn)
    whole = {**good, "state": {0: of_its_own}}
    form.check_optimizer_state(whole, good, [weight], shaped=False)
    of_its_own["factors"][1][0, 0] = float("nan")
    with pytest.raises(TypeError, match="factors of parameter 0 holds NaN"):
        form.check_optimizer_state(whole, good, [weight], shaped=False)
    for bad in ({}, {"state": 3}, {"state": {7: {}}}, {"param_groups": [3]}):
        with pytest.raises(TypeError):
            form.check_optimizer_state({**good, **bad} if bad else bad, good, [weight])


def test_the_description_of_shards_runs_no_code(tmp_path):
    import pickle

    import torch.distributed.checkpoint as dcp

    from finetune.training.shards import put_in_shards
    from scripts.torture.bad_inputs import Payload

    shards = tmp_path / "shards"
    state = {"model.pt/a": torch.arange(6.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(shards), no_dist=True)
    hole = {"a": torch.empty(6, device="meta")}
    assert put_in_shards(hole, shards, "model.pt")["a"].tolist() == [0, 1, 2, 3, 4, 5]
    for content in (pickle.dumps(Payload()), b"", b"garbage", pickle.dumps([1])):
        (shards / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=r"shards|asks for posix\.system"):
            put_in_shards(hole, shards, "model.pt")
    assert not Path("executed").exists()


# The command line


@pytest.mark.slow
def test_the_traceback_is_printed_on_demand(tmp_path):
    (tmp_path / "c.yaml").write_text("a: [")
    command = [sys.executable, "-m", "finetune", "inspect", "c.yaml"]
    for value, shown in (("1", True), ("0", False)):
        ended = subprocess.run(
            command,
            cwd=tmp_path,
            env={"FINETUNE_TRACEBACK": value, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 2
        assert ("Traceback" in ended.stderr) is shown
        assert ended.stderr.splitlines()[-1].startswith("finetune: ")
