"""A config is read strictly: each mistake is answered with what was given and what is allowed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config import dump_config, load_config
from finetune.config.loading import ALIASES, NOT_ALIASES, make_config
from finetune.config.schema import RunConfig
from finetune.config.yaml12 import parse
from finetune.errors import UserError

BASE = "model: {name: gpt2}\ndata: {train: pairs.jsonl}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "my_run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_and_output_dir_from_the_file_name(write):
    config = load_config(write(BASE))
    assert config.output_dir == Path("runs/my_run")
    assert config.optimizer.name == "lazy_adamw"
    assert config.data.train[0].path == "pairs.jsonl"
    assert config.data.train[0].weight is None


def test_exponents_are_numbers_and_norwegian_is_a_language(write):
    config = load_config(
        write(BASE + "optimizer: {lr: 2e-5}\n"), ["data.translation.target_language=no"]
    )
    assert config.optimizer.lr == 2e-5
    assert config.data.translation.target_language == "no"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("12", 12),
        ("007", 7),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("1:30", "1:30"),
        ("~", None),
        (".inf", float("inf")),
        ("1_000", "1_000"),
        ("[a, 2e1]", ["a", 20.0]),
    ],
)
def test_yaml_scalars(text, value):
    assert parse(text) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_as_written(number):
    assert parse(repr(number)) == number


def test_the_resolved_config_reads_back_equal(write):
    config = load_config(
        write(
            BASE
            + "optimizer: {name: sgd, momentum: 0.9}\nmodel: {name: a, lora: {rank: 4}}\n".replace(
                "model", "#model", 1
            )
        )
    )
    assert load_config(write(dump_config(config))) == config
    assert config.optimizer.options == {"momentum": 0.9}


def test_overrides_win_over_the_file(write):
    config = load_config(
        write(BASE + "training: {epochs: 5}\n"),
        ["training.epochs=1.5", "model.lora.rank=8", "data.train=[a.csv, b.csv]"],
    )
    assert (config.training.epochs, config.model.lora.rank) == (1.5, 8)
    assert [source.path for source in config.data.train] == ["a.csv", "b.csv"]


def test_a_config_is_frozen(write):
    with pytest.raises(ValueError, match="frozen"):
        load_config(write(BASE)).seed = 3


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_every_hugging_face_name_means_the_same_key(name):
    values = {
        "lr_scheduler_type": "cosine",
        "report_to": "tensorboard",
        "model_name_or_path": "gpt2",
        "optim": "sgd",
        "packing": False,
        "attn_implementation": "eager",
        "torch_compile": True,
        "gradient_checkpointing": True,
        "warmup_ratio": 0.5,
    }
    value = values.get(name, 7)
    tree = {"output_dir": "x", "data": {"train": "a"}, "model": {"name": "m"}}
    if name == "model_name_or_path":
        del tree["model"]
    found = make_config({**tree, name: value})
    for part in ALIASES[name].split("."):
        found = getattr(found, part)
    assert found == (("tensorboard",) if name == "report_to" else value)


def test_all_aliases_point_at_keys():
    assert len(ALIASES) > 20
    for target in ALIASES.values():
        model = RunConfig
        for part in target.split("."):
            assert part in model.model_fields, target
            model = model.model_fields[part].annotation


@pytest.mark.parametrize("name", sorted(NOT_ALIASES))
def test_names_without_an_equal_say_what_to_write(name):
    with pytest.raises(UserError, match=rf"training: '{name}' is not a key here\. (Write|Set) "):
        make_config({"training": {name: 1}})


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (
            "trainig: {}",
            [],
            "'trainig' is not a key; the keys are output_dir, overwrite_output_dir, seed, model, "
            "data, vocabulary, optimizer, scheduler, training, evaluation, checkpoint, generation, "
            "tracking. Did you mean 'training'?",
        ),
        (
            "training: {epohs: 1}",
            [],
            "training: 'epohs' is not a key; the keys are epochs, max_steps, batch_size, "
            "micro_batch_size, max_grad_norm, precision, activation_checkpointing, compile, "
            "divergence_threshold, timeout. Did you mean 'epochs'?",
        ),
        ("training: {epochs: many}", [], "training.epochs = 'many' is not allowed"),
        ("training: {precision: int3}", [], "'auto', 'fp32', 'bf16' or 'fp16'"),
        ("evaluation: {every: 0}", [], "evaluation.every = 0 is not allowed"),
        (
            "",
            ["model.lora={target_modules: 5}"],
            "lora.target_modules = 5 is not allowed: input should be a valid string or a list, "
            "such as [5]",
        ),
        ("optimizer: {lr: 1e-3, learning_rate: 1e-4}", [], "mean the same. Give one of them"),
        (
            "",
            ["model.lora.rnk=3"],
            "'model.lora.rnk' is not a key; the keys there are rank, alpha, dropout, "
            "target_modules. Did you mean 'rank'?",
        ),
        ("", ["data.train=[{path: a, weigth: 2}]"], ". Did you mean 'weight'?"),
        (
            "training: {epochs: many}",
            ["seed=-1"],
            "seed = -1 is not allowed: input should be greater than or equal to 0. "
            "training.epochs = 'many' is not allowed: input should be a valid number",
        ),
        ("", ["training.epochs"], "is not of the form key=value"),
        (
            "",
            ["model.config={model_type: llama}"],
            "model.name and model.config are both given. Give",
        ),
        ("", ["model={revision: main}"], "neither model.name nor model.config is given. Give"),
        ("", ["seed.deep=1"], "seed = a mapping is not allowed: input should be a valid integer"),
        ("seed: 3", ["seed.deep=1"], "seed.deep cannot be set: seed is a number, not a section"),
        ("a: [", [], "is not valid YAML"),
        ("seed: 1\nseed: 2", [], "is given twice at line 4"),
    ],
)
def test_mistakes_are_named(write, text, overrides, expected):
    with pytest.raises(UserError) as error:
        load_config(write(BASE + text + "\n"), overrides)
    assert expected is None or expected in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_unreadable_and_shapeless_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="holds a list, but must be a YAML mapping"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(path)
    path.write_text("data: {train: x}\n")
    with pytest.raises(UserError, match="'model' is missing"):
        load_config(path)
