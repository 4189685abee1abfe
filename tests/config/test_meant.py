"""What a config is meant to say: values of overrides, numbers, and what other tools call it."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.loading import dump_config, make_config
from finetune.config.schema import RunConfig
from finetune.config.yaml12 import dump, parse
from finetune.errors import UserError

TREE: dict[str, Any] = {
    "output_dir": "r", "model": {"name": "m"}, "data": {"train": "a.jsonl"},
}  # fmt: skip


def value_of(config: RunConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


MEANT: list[tuple[str, str, Any]] = [
    # key, what is typed, what it means
    ("data.chat_template_kwargs.date", "26 Jul: x # y", "26 Jul: x # y"),
    ("data.chat_template_kwargs.date", "#1", "#1"),
    ("data.chat_template_kwargs.date", "2024-02-03", "2024-02-03"),
    ("data.chat_template_kwargs.enable_thinking", "false", False),
    ("data.chat_template_kwargs.enable_thinking", "'false'", "false"),
    ("data.chat_template_kwargs.tools", "[a, {b: c}]", ["a", {"b": "c"}]),
    ("data.chat_template_kwargs.template", "x", "x"),
    ("data.chat_template_kwargs", "{effort: high}", {"effort": "high"}),
    ("data.columns.prompt", "q: #1", "q: #1"),
    ("data.columns.prompt", "true", "true"),
    ("data.columns.r", "dtype", "dtype"),
    ("data.translation.source_language", "no", "no"),
    ("data.translation.template", "{source} # {target_name}: ", "{source} # {target_name}: "),
    ("data.system_prompt", "'a' and 'b'", "'a' and 'b'"),
    ("data.system_prompt", "  two  blanks  ", "  two  blanks  "),
    ("data.system_prompt", "a\n# b\n", "a\n# b\n"),
    ("data.system_prompt", "> folded | %x @y `z` !t &a *b", "> folded | %x @y `z` !t &a *b"),
    ("data.system_prompt", "''", ""),
    ("model.revision", "0123", "0123"),
    ("model.revision", "1e5", "1e5"),
    ("model.lora.target_modules", ".*(q|v)_proj", ".*(q|v)_proj"),
    ("model.lora.target_modules", "[q, v]", ("q", "v")),
    ("optimizer.lr", "2E-5", 2e-5),
    ("training.max_steps", "None", None),
    ("data.system_prompt", "None", None),
    ("data.validation", "None", None),
    ("model.lora", "None", None),
    ("optimizer.foo", "None", None),
    ("training.compile", "True", True),
    ("data.columns.prompt", "None", "None"),
    ("optimizer.foo", "{a: [1, 0x2]}", {"a": [1, "0x2"]}),
    ("vocabulary.keep", "[no, 3]", ("no", 3)),
]


@pytest.mark.parametrize("case", MEANT)
def test_an_override_means_what_is_typed(case: tuple[str, str, Any]) -> None:
    key, text, expected = case
    config = make_config(TREE, [f"{key}={text}"])
    assert value_of(config, key) == expected
    assert value_of(make_config(parse(dump_config(config))), key) == expected


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("1e.+-0_:~\n")))
def test_any_text_of_a_config_reads_back(text: str) -> None:
    value = {"the text": [text], "below": {text: 1}}
    assert parse(dump(value)) == value


SOURCES = {
    "[a].jsonl": "[a].jsonl",
    "{a,b}.jsonl": "{a,b}.jsonl",
    "[a]{b}.csv": "[a]{b}.csv",
    "a b: c #d.csv": "a b: c #d.csv",
    "null.csv": "null.csv",
    "2024": "2024",
    "'a.csv'": "a.csv",
    "[a.csv]": "a.csv",
    "{path: '[a].csv'}": "[a].csv",
    r"C:\data\a.csv": r"C:\data\a.csv",
}


@pytest.mark.parametrize("text", SOURCES)
def test_a_source_by_its_name(text: str) -> None:
    [found] = make_config(TREE, [f"data.train={text}"]).data.train
    assert found.path == SOURCES[text]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_is_a_variable_of_a_template(text: str) -> None:
    """If it is none of YAML's own values, or in quotation marks or brackets."""
    try:
        is_yaml = not isinstance(parse(text), str | dict) or text.strip()[:1] in (
            "'",
            '"',
            "{",
            "[",
        )
    except yaml.YAMLError:
        is_yaml = text.strip()[:1] in ("{", "[")
    if not is_yaml and text != "None":  # which is refused: Python's word for null
        config = make_config(TREE, [f"data.chat_template_kwargs.x={text}"])
        assert config.data.chat_template_kwargs == {"x": text}


REFUSED: list[tuple[str, str]] = [
    # override, what the message says
    ("training.epochs=None", "training.epochs = 'None' is not allowed: input should be a valid"),
    ("model.lora=true", "model.lora = True is not allowed: input should be a mapping of keys to "
     "values. Write model.lora: {rank: 16}"),
    ("model.lora=False", "to values. Write model.lora: null"),
    ("data.columns={prompt:question}", "'data.columns.prompt:question' has no blank behind its "
     "colon. Write prompt: question"),
    ("model={lora:{rank:8}}", "has no blank behind its colon. Write rank: 8"),
    ("data.columns=prompt", "input should be a mapping, such as {name: value}"),
    ("training.batch_size=true", "training.batch_size = True is not allowed: input should"),
    ("seed=false", "seed = False is not allowed: input should be a number"),
    ("optimizer.lr=true", "optimizer.lr = True is not allowed: input should be a number"),
    ("optimizer.weight_decay=true", "optimizer.weight_decay = True is not allowed"),
    ("training.max_steps=true", "training.max_steps = True is not allowed"),
    ("optimizer.betas=[0.9, [.inf]]", "optimizer.betas = [0.9, [inf]] is not allowed: give finite"),
    ("optimizer.foo={a: .nan}", "optimizer.foo = {'a': nan} is not allowed: give finite numbers"),
    ("optimizer.overrides=[{pattern: a, lr: .inf}]", "'lr': inf},) is not allowed: give"),
    ("optimizer.lr=1e309", "optimizer.lr = inf is not allowed: input should be greater than 0"),
    ("data.train=null", "data.train is empty. Name a file or a dataset"),
    ("data.train=[]", "data.train is empty. Name a file or a dataset"),
    ("data.train=[a, b", "is not valid YAML"),
    ("data.train={path: a", "is not valid YAML"),
    ("data.validation=[]", "data.validation is empty. Name a file or a dataset, or leave the key"),
    ("optimizer=adamw", "Write optimizer: {name: adamw}"),
    ("scheduler=cosine", "Write scheduler: {name: cosine}"),
    ("model.lora=16", "Write model.lora: {rank: 16}"),
    ("training.batch_size=4.5", "input should be a valid integer, got a number with a fractional"),
    ("training.batch_size=0", "input should be at least 1 and at most 1,000,000,000 or 'auto'"),
    ("training.batch_size=large", "training.batch_size = 'large' is not allowed: input should be"),
    ("data.validation_fraction=5%", "= '5%' is not allowed: input should be a valid number or"),
    ("data.validation_fraction=2", "input should be at least 0.0 and at most 1.0 or 'auto'"),
    ("training.epochs", "is not of the form key=value"),
    ("model.dtype=bf16", "Write training.precision: bf16, fp16 or fp32"),
    ("train_on_inputs=false", "Write data.targets: all to learn the questions too"),
    ("adam_beta1=0.9", "Write optimizer.betas: [BETA1, BETA2]"),
    ("use_peft=true", "Write model.lora: {rank: 16} for LoRA"),
    ("template=qwen", "Write model.chat_template: chatml"),
    ("evals_per_epoch=4", "Write evaluation.every: STEPS"),
    ("generation.max_length=64", "'max_length' is not a key here. Write generation.max_new_tokens"),
    ("generation.cutoff_len=64", "Write generation.max_new_tokens"),
    ("evaluation.max_steps=5", "'max_steps' is not a key here. Write data.max_validation_records"),
    ("evaluation.packing=false", "Write data.packing"),
    ("vocabulary.learning_rate=1e-3", "Write optimizer.lr"),
    ("model.lora.learning_rate=1e-3", "Write optimizer.lr"),
    ("trainer.max_steps=5", "Write training.max_steps"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_meant_is_refused_in_a_sentence(case: tuple[str, str]) -> None:
    override, expected = case
    with pytest.raises(UserError) as caught:
        make_config(TREE, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_switch_takes_true_and_a_number_does_not_in_a_file_either() -> None:
    assert make_config({**TREE, "training": {"compile": True}}).training.compile
    with pytest.raises(UserError, match=r"training\.epochs = True is not allowed"):
        make_config({**TREE, "training": {"epochs": True}})


MOVED: list[tuple[str, str, Any, str]] = [
    # section, another tool's name, value, the key that it means
    ("training", "max_length", 64, "data.max_length"),
    ("model", "max_seq_length", 64, "data.max_length"),
    ("data", "cutoff_len", 64, "data.max_length"),
    ("optimizer", "max_steps", 5, "training.max_steps"),
    ("scheduler", "num_epochs", 2.0, "training.epochs"),
    ("evaluation", "eval_steps", 5, "evaluation.every"),
    ("checkpoint", "save_steps", 5, "checkpoint.every"),
]


@pytest.mark.parametrize("case", MOVED)
def test_another_tools_name_means_our_key_where_it_is_about_the_same(
    case: tuple[str, str, Any, str],
) -> None:
    section, name, value, key = case
    tree = {**TREE, section: {**TREE.get(section, {}), name: value}}
    for config in (make_config(tree), make_config(TREE, [f"{section}.{name}={value}"])):
        assert value_of(config, key) == value


KEPT: list[tuple[dict[str, Any], str]] = [
    # section of a file, what the message says
    ({"generation": {"max_length": 64}}, "generation: 'max_length' is not a key here. Write gen"),
    ({"evaluation": {"max_steps": 5}}, "evaluation: 'max_steps' is not a key here. Write data.max"),
    ({"evaluation": {"max_seq_len": 64}}, "Write data.max_length"),
    ({"checkpoint": {"max_steps": 5}}, "Write training.max_steps"),
    ({"model": {"name": "m", "lora": {"learning_rate": 1}}}, "Write optimizer.lr"),
]


@pytest.mark.parametrize("case", KEPT)
def test_another_tools_name_is_not_moved_where_it_means_something_else(
    case: tuple[dict[str, Any], str],
) -> None:
    sections, expected = case
    with pytest.raises(UserError) as caught:
        make_config({**TREE, **sections})
    assert expected in str(caught.value)


def test_there_was_something_to_check() -> None:
    assert (len(MEANT), len(SOURCES), len(REFUSED), len(MOVED), len(KEPT)) == (32, 10, 42, 7, 5)


@pytest.mark.parametrize("place", ["training.max_steps", "data.system_prompt", "data.test"])
def test_none_as_in_python_is_refused_in_a_file(place: str) -> None:
    section, key = place.split(".")
    tree = {**TREE, section: {**TREE.get(section, {}), key: "None"}}
    with pytest.raises(UserError) as caught:
        make_config(tree)
    assert str(caught.value) == f"config: {place} = None is the text 'None' in YAML. Write null"
