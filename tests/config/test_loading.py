"""A config is read strictly: each mistake is answered with what was given and what is allowed."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune.config import dump_config, load_config
from finetune.config.loading import make_config
from finetune.config.other_tools import ALIASES, NOT_ALIASES
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
    assert load_config(str(write(BASE))) == config
    with pytest.raises(UserError, match=r"None is no path, but of type NoneType\. Give"):
        load_config(None)
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
        (r'{"a\ud83d\ude00": "\ud83d\ude00b"}', {"a😀": "😀b"}),
    ],
)
def test_yaml_scalars(text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    "text", [r'"a \ud83d"', r'"\ude00\ud83d"', r'"\UFFFFFFFF"', r'"\U00110000"']
)
def test_what_is_no_character_is_refused(write, text):
    with pytest.raises(UserError, match=r"is not valid YAML: (a text has|unknown escape)"):
        load_config(write(BASE + f"seed: {text}\n"))


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


def test_lora_has_a_default_rate_of_its_own(write) -> None:
    lora, stated = "model.lora={rank: 4}", "optimizer.lr=1e-4"
    cases = [([], 5e-5), ([lora], 5e-4), ([lora, stated], 1e-4), ([stated], 1e-4)]
    cases += [([lora, "optimizer.name=AdamW"], 5e-4), ([lora, "optimizer.name=adamw_torch"], 5e-4)]
    cases += [([lora, "optimizer.name=adamw"], 5e-4), ([lora, "optimizer.name=lion"], 5e-5)]
    for overrides, lr in cases:
        config = load_config(write(BASE), overrides)
        assert config.optimizer.lr == lr
        assert load_config(write(dump_config(config))) == config
    assert load_config(write(BASE)).optimizer.lr == 5e-5, (
        "LoRA's default must not reach other configs"
    )


def test_a_config_is_frozen(write):
    with pytest.raises(ValueError, match="frozen"):
        load_config(write(BASE)).seed = 3


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_every_hugging_face_name_means_the_same_key(name):
    values = {
        "lr_scheduler_type": "cosine",
        "lr_scheduler": "cosine",
        "report_to": "tensorboard",
        "model_name_or_path": "gpt2",
        "optim": "sgd",
        "packing": False,
        "sample_packing": False,
        "base_model": "gpt2",
        "attn_implementation": "eager",
        "torch_compile": True,
        "gradient_checkpointing": True,
        "warmup_ratio": 0.5,
    }
    value = values.get(name, 7)
    tree = {"output_dir": "x", "data": {"train": "a"}, "model": {"name": "m"}}
    if ALIASES[name] == "model.name":
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
    says = rf"training: '{name}' is not a key here\. (Write|Set|Leave) "
    with pytest.raises(UserError, match=says):
        make_config({"training": {name: 1}})


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("training: {1: 2}", [], "training: 1 is not a key"),
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
            "activation_checkpointing, compile, divergence_threshold, timeout. "
            "Did you mean 'epochs'?",
        ),
        ("training: {epochs: many}", [], "training.epochs = 'many' is not allowed"),
        ("training: {precision: int3}", [], "'auto', 'fp32', 'bf16' or 'fp16'"),
        ("evaluation: {every: 0}", [], "evaluation.every = 0 is not allowed"),
        (
            "",
            ["model.lora={alpha: 0}"],
            "model.lora.alpha = 0 is not allowed: input should be greater than 0",
        ),
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
            "seed = -1 is not allowed: input should be at least 0 and less than 4,294,967,296. "
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


TEXTS = [
    "Answer #1",
    "Answer: yes",
    "a=b: c",
    "# all",
    "- one",
    "  two blanks  ",
    "true",
    "2024-01-01",
    "1e3",
    "{a: b}",
    "[x",
    "*star",
    "&and",
    "100 %",
    "it's",
    '"Yes" or "no"?',
    "a\nb",
    "yes: [no",
    "!wow",
    "`tick`",
    "@at",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "key", ["data.system_prompt", "data.translation.template", "data.columns.prompt", "model.name"]
)
def test_an_override_of_a_text_takes_the_text_as_it_is(write, key, text):
    if key == "model.name" and not text:
        text = "a"  # a model needs a name
    found = load_config(write(BASE), [f"{key}={text}"])
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == (text if text or key == "data.columns.prompt" else None)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_taken(text):
    assume(text.strip()[:1] not in ("'", '"') and text.strip() not in ("", "~"))
    assume(text.strip().lower() != "null" and text.strip() != "None")
    tree = {"output_dir": "x", "data": {"train": "a"}, "model": {"name": "m"}}
    assert make_config(tree, [f"data.system_prompt={text}"]).data.system_prompt == text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.system_prompt='Answer: #1'", "Answer: #1"),
        ('data.system_prompt="two\\nlines"', "two\nlines"),
        ("data.system_prompt=null", None),
        ("data.system_prompt=~", None),
    ],
)
def test_quoted_texts_and_nothing_are_yaml(write, override, expected):
    assert load_config(write(BASE), [override]).data.system_prompt == expected


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("a #1.jsonl", ["a #1.jsonl"]),
        ("*.jsonl", ["*.jsonl"]),
        ("data[1].jsonl", ["data[1].jsonl"]),
        ("a: b.jsonl", ["a: b.jsonl"]),
        ("[a.csv, {path: b.csv}]", ["a.csv", "b.csv"]),
        ("{path: b.csv}", ["b.csv"]),
    ],
)
def test_a_source_is_a_text_or_in_brackets(write, text, paths):
    for key in ("train", "validation"):
        found = load_config(write(BASE), [f"data.{key}={text}"])
        assert [source.path for source in getattr(found.data, key)] == paths


def test_dashes_before_an_override_are_passed_over(write):
    assert load_config(write(BASE), ["--training.epochs=1"]).training.epochs == 1


def test_home_and_variables_are_known_in_every_path(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    text = (
        "output_dir: ~/x\nmodel: {name: ~/m, chat_template: $RUNS/t.jinja}\n"
        "data: {train: ['~/a', {path: '${RUNS}/b', target_path: ~/c}], test: $RUNS}\n"
    )
    for config in (load_config(write(text)), load_config(write(BASE), overrides_of(text))):
        assert config.output_dir == Path("/home/me/x")
        assert (config.model.name, config.model.chat_template) == ("/home/me/m", "/runs/t.jinja")
        assert [source.path for source in config.data.train] == ["/home/me/a", "/runs/b"]
        assert config.data.train[1].target_path == "/home/me/c"
        assert config.data.test[0].path == "/runs"
    assert load_config(write(BASE), ["output_dir=a~/$b"]).output_dir == Path("a~/$b")
    with pytest.raises(
        UserError, match=r"'\$NO/x' begins with an environment variable that is not"
    ):
        load_config(write(BASE), ["output_dir=$NO/x"])


def overrides_of(text):
    tree = parse(text)
    return [
        f"output_dir={tree['output_dir']}",
        *(f"model.{key}={value}" for key, value in tree["model"].items()),
        "data.train=['~/a', {path: '${RUNS}/b', target_path: ~/c}]",
        "data.test=$RUNS",
    ]


ABSURD = [
    ("optimizer.lr", "greater than 0 and at most 1,000"),
    ("optimizer.weight_decay", "at least 0"),
    ("training.epochs", "greater than 0 and at most 1,000,000"),
    ("training.batch_size", "at least 1 and at most 1,000,000,000"),
    ("training.max_grad_norm", "at least 0"),
    ("data.max_length", "at least 1 and at most 16,777,216"),
    ("data.validation_fraction", "at least 0.0 and at most 1.0"),
    ("generation.top_p", "greater than 0 and at most 1"),
    ("generation.temperature", "at least 0"),
    ("model.lora.rank", "at least 1 and at most"),
    ("seed", "at least 0 and less than"),
]


@pytest.mark.parametrize(("key", "allowed"), ABSURD)
def test_what_is_not_finite_or_absurd_is_refused_with_the_range(write, key, allowed):
    values = [".inf", "-.inf", ".nan", "-1"]
    values += ["1e300", "99999999999"] if "at most" in allowed or "less than" in allowed else []
    for value in values:
        with pytest.raises(UserError) as error:
            load_config(write(BASE), [f"{key}={value}"])
        assert re.search(
            rf"{key} = .* is not allowed: input should be {re.escape(allowed)}", str(error.value)
        )


def test_a_weight_and_an_option_that_are_not_finite_are_refused(write):
    for override in (
        "data.train=[{path: a, weight: .inf}]",
        "optimizer.eps=.nan",
        "model.lora.alpha=.inf",
    ):
        with pytest.raises(UserError, match=r"= (inf|nan) is not allowed: "):
            load_config(write(BASE), [override])


def test_a_key_that_is_merged_a_million_times_is_there_once():
    """Each mapping merges the one before nine times."""
    merges = (f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}" for a, b in zip("abcdef", "bcdefg"))
    assert parse("\n".join(["a: &a {x: 1}", *merges]))["g"] == {"x": 1}
    many = ", ".join(f"k{i}: 1" for i in range(1000))
    with pytest.raises(yaml.YAMLError, match="merges more than 100,000 values"):
        parse(f"a: &a {{{many}}}\nb: {{<<: [{', '.join(['*a'] * 101)}]}}")
    with pytest.raises(yaml.YAMLError, match="<< takes a mapping"):
        parse("a: {<<: [1]}")


def test_merge_keys(write):
    config = load_config(
        write(
            "x-small: &small {epochs: 2, batch_size: 4}\n"
            + "x-more: &more {<<: *small, epochs: 3}\n"
            + BASE
            + "training: {<<: *more, max_grad_norm: 2}\n"
            + "optimizer: {<<: [{lr: 1}, {lr: 2, eps: 3}]}\n"
        )
    )
    training = config.training
    assert (training.epochs, training.batch_size, training.max_grad_norm) == (3, 4, 2)
    assert (config.optimizer.lr, config.optimizer.options) == (1, {"eps": 3})
    with pytest.raises(UserError, match="the key 'lr' is given twice at line"):
        load_config(write(BASE + "optimizer: {lr: 1, lr: 2}"))


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("epochs: 2", [], "'epochs' is not a key here. Write training.epochs"),
        ("lora: {r: 8}", [], "'lora' is not a key here. Write model.lora"),
        ("", ["model.lora.r=8"], "'r' is not a key here. Write model.lora.rank"),
        ("", ["epochs=2"], "'epochs' is not a key here. Write training.epochs"),
        ("training: {lr: 1}", [], "training: 'lr' is not a key here. Write optimizer.lr"),
        ("", ["model=gpt2"], "mapping of keys to values. Write model: {name: gpt2}"),
        ("", ["data=a.jsonl"], "mapping of keys to values. Write data: {train: a.jsonl}"),
        ("load_in_4bit: true", [], "Leave it out: there is no quantised training here"),
        (
            "output_dir: 2024",
            [],
            "output_dir = 2024 is not allowed: input should be a path",
        ),
    ],
)
def test_keys_of_other_tools_have_a_hint(write, text, overrides, expected):
    with pytest.raises(UserError) as error:
        load_config(write(BASE + text + "\n"), overrides)
    assert expected in str(error.value)


def test_several_mistakes_are_said_at_once(write):
    with pytest.raises(UserError) as error:
        load_config(
            write(BASE + "epochs: 2\nbf16: true\ntraining: {lr: 1, epohs: 2}\n"), ["seed=-1", "x"]
        )
    for said in (
        "training.epochs",
        "training.precision: bf16",
        "optimizer.lr",
        "'epohs'",
        "seed = -1",
        "'x'",
    ):
        assert said in str(error.value)
    with pytest.raises(UserError) as error:
        load_config(write("modle: {name: a}\ndata: {train: x}\n"))
    assert "Did you mean 'model'" in str(error.value)
    assert "missing" not in str(error.value)


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
