"""`init`, `keys`, `runs`, completion, -q, -v and the log: what a newcomer asks for first."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from finetune.config import RunConfig, dump_config, load_config
from finetune.config.keys import json_schema, list_keys
from finetune.config.loading import make_config
from finetune.config.yaml12 import parse
from finetune.data.batches.size import ENOUGH_STEPS
from finetune.data.sources import count_held_out
from finetune.data.sources.peek import first_records
from finetune.errors import UserError
from finetune.recipes.build.look import sources_of
from finetune.recipes.init import epochs_for
from finetune.run.claim import locked
from finetune.run.folder import RunDir
from tests.cli.conftest import finetune

ROOT = Path(__file__).parents[2]
CONFIGS = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "finetune/resources").glob("demo_*.yaml")]


# --- keys


def test_every_key_has_its_default_its_values_and_a_meaning() -> None:
    keys = {key.name: key for key in list_keys()}
    assert len(keys) > 80
    assert [name for name, key in keys.items() if not key.meaning or not key.values] == []
    assert keys["training.epochs"].default == "3.0"
    assert keys["training.batch_size"].default == "auto"
    assert keys["training.batch_size"].meaning.startswith(
        "Sequences per optimizer step, over all processes. auto: 16, or the next smaller power"
    )
    assert keys["vocabulary.mode"].values == "auto | full | active | sampled | frozen"
    assert keys["model.lora.rank"].default == "16"
    defaults = RunConfig.model_validate({"output_dir": "r", "model": {"name": "m"},
                                         "data": {"train": "d"}})  # fmt: skip
    for name, key in keys.items():
        value: Any = defaults
        for part in name.split("."):
            value = getattr(value, part, None)
        if isinstance(value, bool | int | float) and key.default:
            assert yaml.safe_load(key.default) == value or float(key.default) == value, name


def test_keys_are_found_by_a_part_or_a_pattern() -> None:
    found = finetune("keys", "batch_size").out
    assert re.findall(r"^[\w.]+", found, flags=re.M) == [
        *("training.batch_size", "training.micro_batch_size"),
        *("evaluation.batch_size", "generation.batch_size"),
    ]
    assert "Sequences per optimizer step" in found
    assert len(re.findall(r"^checkpoint\.\w+: ", finetune("keys", "check*").out, flags=re.M)) == 3
    assert finetune("keys", "learning_rate").out == finetune("keys", "optimizer.lr").out != ""
    assert "Write training.precision" in finetune("keys", "bf16").err
    for typed in ("betas", "optimizer.betas"):
        assert finetune("keys", typed).out.startswith("optimizer.betas: an option of adam, adamw")
    both = finetune("keys", "alpha").out
    assert both.startswith("optimizer.alpha: an option of ")
    assert "\nmodel.lora.alpha: 32.0\n" in both
    wrong = finetune("keys", "epoch_count")
    assert wrong.code == 2
    assert "no key matches 'epoch_count'" in wrong.err


def test_the_schema_is_that_of_the_package_and_takes_the_shipped_configs() -> None:
    kept = ROOT / "finetune/resources/config.schema.json"
    schema = json.loads(kept.read_text(encoding="utf-8"))
    assert schema == json_schema(), "run: finetune keys --schema > " + str(kept.relative_to(ROOT))
    assert json.loads(finetune("keys", "--schema").out) == schema
    validator = jsonschema.Draft202012Validator(schema)
    assert len(CONFIGS) > 15
    for path in CONFIGS:
        first, *_ = text = path.read_text(encoding="utf-8").splitlines()
        named = first.removeprefix("# yaml-language-server: $schema=")
        assert (path.parent / named).resolve() == kept, path
        tree = parse("\n".join(text))
        assert [error.message for error in validator.iter_errors(tree)] == [], path
    for wrong in (
        {"model": {"name": "m"}, "data": {"train": 3}},
        {"model": {"name": "m"}, "data": {"train": "a"}, "training": {"epoch": 1}},
        {"model": {"name": "m"}, "data": {"train": "a"}, "scheduler": {"name": "square"}},
        {"model": {"name": "m"}},
    ):
        assert not validator.is_valid(wrong), wrong
    validator.validate({"x-a": {}, "model": {"name": "m"}, "data": {"train": ["a", {"path": "b"}]}})


@pytest.mark.parametrize(
    "given",
    [
        *("training.max_time=15min", "training.max_time=1h 30min", "training.max_time=90"),
        *("training.batch_size=auto", "training.batch_size=4", "optimizer.lazy=true"),
        *("data.validation=a.jsonl", "data.test={path: a}", "data.test=[{path: a}, b]"),
        *("model.lora={rank: 4, target_modules: [a]}", "vocabulary.keep=[1, hello]"),
        *("optimizer.betas=[0.9, 0.99]", "optimizer.overrides=[{pattern: a, lr: 1e-5}]"),
        *("evaluation.metrics=[chrf]", "scheduler.warmup_ratio=0", "tracking=[tensorboard]"),
    ],
)
def test_the_schema_takes_what_a_run_takes_and_keeps(given: str) -> None:
    tree: dict[str, Any] = {"output_dir": "r", "model": {"name": "m"}, "data": {"train": "a"}}
    config = make_config(tree, [given])
    *sections, key = given.partition("=")[0].split(".")
    part = tree
    for section in sections:
        part = part.setdefault(section, {})
    part[key] = parse(given.partition("=")[2])
    validator = jsonschema.Draft202012Validator(json_schema())
    for taken in (tree, parse(dump_config(config))):
        assert [error.message for error in validator.iter_errors(taken)] == []


# --- init


def test_init_writes_a_config_that_trains(base: Path, folder: Path) -> None:
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["English", "French"])
        rows.writerows([f"the word {n}", f"le mot {n}"] for n in range(200))
        rows.writerow(["an empty side", ""])
    result = finetune("init", "pairs.csv", "--model", "base")
    assert result.code == 0, result.err
    text = (folder / "pairs.yaml").read_text()
    assert 'source_language: "English", target_language: "French"' in text
    assert "on_bad_record: drop  # 1 records cannot be used" in text
    assert text.count("#") > 6, "it is commented"
    config = load_config(Path("pairs.yaml"))
    assert config.training.batch_size == "auto"
    assert "batch_size: auto  # now 1 sequence, about 3 examples, a step, and 192 steps" in text
    assert config.data.validation_fraction == "auto"
    trained = finetune("train", "pairs.yaml", "evaluation.generate=0", "evaluation.samples=0")
    assert trained.code == 0, trained.err
    assert "which is few" not in trained.err
    again = finetune("init", "pairs.csv", "--model", "base")
    assert again.code == 2
    assert "pairs.yaml already exists" in again.err


def test_init_asks_for_languages_that_the_columns_do_not_show(base: Path, folder: Path) -> None:
    rows = [{"source": f"one {n}", "target": f"un {n}"} for n in range(30)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = finetune("init", "a.jsonl", "--model", "base")
    assert asked.code == 2
    assert "data.translation.source_language" in asked.err
    given = ("init", "a.jsonl", "--model", "base", "--from", "en", "--to", "fr", "-o", "b.yaml")
    assert finetune(*given).code == 0
    assert load_config(Path("b.yaml")).data.translation.target_language == "fr"
    none = finetune("init", "none.jsonl", "--model", "base")
    assert none.code == 2
    assert "there is no file or folder 'none.jsonl'" in none.err


def test_init_takes_conversations_of_different_shape(base: Path, folder: Path) -> None:
    """Under a name that a shell would cut, which the advised commands put in quotation marks."""
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Yes."}]
    (folder / "my chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    rows = "".join(f"What is {n}?,It is {n}.\n" for n in range(30))
    (folder / "faq.csv").write_text("question,answer\n" + rows)
    result = finetune("init", "my chats.jsonl", "faq.csv", "--model", "base")
    assert result.code == 0, result.err
    assert "dropped" not in result.err
    assert "next: finetune inspect 'my chats.yaml'; finetune train 'my chats.yaml'" in result.err
    text = (folder / "my chats.yaml").read_text()
    assert "for 60 records" in text
    assert "finetune train 'my chats.yaml'\n" in text


def test_init_pairs_two_text_files_from_anywhere(base: Path, folder: Path) -> None:
    for name, line in {"en/news.en": "the word", "fr/nouvelles.fr": "le mot"}.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text("".join(f"{line} {n}\n" for n in range(30)))
    result = finetune("init", "en/news.en", "fr/nouvelles.fr", "--model", "base")
    assert result.code == 0, result.err
    [found] = load_config(Path("news.yaml")).data.train
    assert (found.path, found.target_path) == ("en/news.en", "fr/nouvelles.fr")
    wrong = finetune("init", "en/news.en", "fr/nouvele.fr", "--model", "base", "-o", "b.yaml")
    assert wrong.code == 2
    assert "there is no file or folder 'fr/nouvele.fr'" in wrong.err


@pytest.mark.parametrize(
    "files", [["a.csv", "b.csv"], ["d", "e"], ["org/a", "org/b"], ["package:a", "package:b"]]
)
def test_other_names_are_sources_of_their_own(files: list[str], folder: Path) -> None:
    for name in ("d", "e"):
        (folder / name).mkdir()
    assert sources_of(files) == files


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("chats/*.jsonl", "chats"),
        ("chats/**/*.jsonl", "data"),
        ("*/faq.csv", "faq"),
        ("*.jsonl", "here"),
        (".", "here"),
        ("..", "above"),
        ("chats/", "chats"),
        (".faq.csv", "faq"),
        ("faq.v2.csv", "faq"),
        ("faq[1].csv", "faq[1]"),
        ("org/faq", "faq"),
    ],
)
def test_init_names_the_config_after_the_data(
    typed: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "above/here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    Path("faq[1].csv").write_text("question,answer\na,b\n")
    Path(f"{name}.yaml").write_text("")
    refused = finetune("init", typed)
    assert refused.code == 2
    assert f"finetune: {name}.yaml already exists" in refused.err


def test_init_refuses_a_name_that_no_config_can_hold(folder: Path) -> None:
    (folder / "caf\udce9.csv").write_text("question,answer\na,b\n")
    refused = finetune("init", "caf\udce9.csv")
    assert refused.code == 2
    assert "the name 'caf\\udce9.csv' is not UTF-8 text, as a config is. Rename" in refused.err


@pytest.mark.parametrize(
    ("count", "epochs", "held_out"),
    [(6, 10, 1), (20, 7, 4), (50, 3, 10), (200, 3, 10), (2000, 3, 100), (100_000, 3, 500)],
)
def test_sizes_fit_the_data(count: int, epochs: int, held_out: int) -> None:
    assert count_held_out(count, most=500) == held_out
    assert epochs_for(count - held_out) == epochs
    steps = epochs * (count - held_out)  # of one example each
    assert steps >= ENOUGH_STEPS or epochs == 10


# --- runs


def test_runs_says_what_became_of_each(finished: Path, folder: Path) -> None:
    for name in ("one", "two", "three", "four"):
        shutil.copytree(finished / "run", folder / "runs" / name)
    RunDir(folder / "runs/two").evaluation.unlink()
    RunDir(folder / "runs/three").environment.write_text("{")
    RunDir(folder / "runs/four").bad_batch.write_bytes(b"")
    (folder / "runs" / "mine").mkdir()
    with locked(folder / "runs/one", print):
        held = finetune("runs").out
    result = finetune("runs")
    assert result.code == 0, result.err
    states = {
        name: next(line for line in result.out.splitlines() if f"runs/{name} " in line)
        for name in ("one", "two", "three", "four")
    }
    for name, state in {
        "one": "finished", "two": "stopped", "three": "broken", "four": "diverged"
    }.items():  # fmt: skip
        assert state in states[name], result.out
    assert "a random llama" in states["one"]
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d", states["one"])
    assert "training" in next(line for line in held.splitlines() if "runs/one" in line)
    assert len(result.out.splitlines()) == 5
    assert "there is no folder none" in finetune("runs", "none").err
    assert finetune("runs", "runs/mine").out == "there is no run in runs/mine\n"


@pytest.mark.parametrize(
    "config",
    [
        *("model: abc", "model: {config: [1]}", "x: !!int abc", "model: {name: !!bool x}", "[1]"),
        *(f"seed: {'9' * 5000}", f"model: {'[' * 3000}{']' * 3000}"),
        "a0: &a0 [1]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
        + "model: {name: *a9}",
    ],
)
def test_a_damaged_run_is_one_row_among_the_others(finished, folder, config):
    for name in ("one", "two"):
        shutil.copytree(finished / "run", folder / "runs" / name)
    RunDir(folder / "runs/two").config.write_text(config)
    result = finetune("runs")
    assert result.code == 0, result.err
    states = dict(re.findall(r"runs/(one|two) .*(finished|broken)", result.out))
    assert states == {"one": "finished", "two": "broken"}


# --- completion, -q, -v, the log


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("finetune tra", {"train", "translate"}),
        ("finetune train c.yaml training.ep", {"training.epochs="}),
        ("finetune chat runs/o", {"runs/one"}),
    ],
)
def test_the_shell_completes_commands_keys_and_runs(
    typed: str, completed: set[str], folder: Path
) -> None:
    (folder / "runs/one").mkdir(parents=True)
    (folder / "runs/one/config.yaml").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "finetune"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), "_FINETUNE_COMPLETE": "complete_bash",
             "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)},
    )  # fmt: skip
    assert set(done.stdout.split()) == completed, done.stderr


def test_quiet_verbose_and_the_log_of_a_run(folder: Path, write_config, chat_file: Path) -> None:
    write_config(training={"max_steps": 4})
    quiet = finetune("train", "c.yaml", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    log = (folder / "run/train.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  .", line) for line in log)
    said = [line.split("  ", 1)[1] for line in log]
    assert "report: run/report.html" in said
    assert any(line.startswith("training: ") for line in said)
    loud = finetune("train", "c.yaml", "-v", "overwrite_output_dir=true")
    assert loud.code == 0, loud.err
    assert [f"training {n}/4" in loud.err for n in (1, 2, 3, 4)] == [True] * 4
    assert (folder / "run/train.log").read_text().count("report: ") == 1, "a new run's own"
    usual = finetune("train", "c.yaml", "training.max_steps=5", "--resume", "auto")
    assert usual.code == 0, usual.err
    assert "training 2/4" not in usual.err
    assert (folder / "run/train.log").read_text().count("report: ") == 2, "it goes on"
    both = finetune("keys", "-q", "-v")
    assert both.code == 2
    assert "-q and -v are both given" in both.err
    wrong = finetune("train", "c.yaml", "-q", "training.epoch=1")
    assert wrong.code == 2
    assert "'training.epoch' is not a key" in wrong.err


def test_an_error_of_a_run_is_in_its_log(folder: Path, write_config) -> None:
    write_config(training={"max_steps": 99, "divergence_threshold": 1e-9}, optimizer={"lr": 1.0})
    assert finetune("train", "c.yaml").code == 2
    assert "ended by Diverged: training stopped at step" in (folder / "run/train.log").read_text()


def test_the_first_record_may_be_a_bad_one(folder: Path, write_config) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    (folder / "a.jsonl").write_text('{"prompt": "Hi"}\n' + good * 30)
    write_config(data={"train": "a.jsonl", "on_bad_record": "drop"})
    for more in ((), ("data.streaming=true", "data.validation_fraction=0", "training.max_steps=1")):
        shown = finetune("inspect", "c.yaml", *more)
        assert shown.code == 0, shown.err
        assert "<|im_start|>user\na<|im_end|>" in shown.out
    refused = finetune("inspect", "c.yaml", "data.on_bad_record=error")
    assert refused.code == 2
    assert "a.jsonl line 1: column 'completion' is missing" in refused.err
    first = finetune("init", "a.jsonl")
    assert first.code == 0, first.err
    assert "dropped: 1 record cannot be used: a.jsonl line 1" in first.err


def test_the_first_record_of_any_file(folder: Path) -> None:
    (folder / "a.jsonl").write_text('broken\n{"a": 2}\n{"a": 3}\n')
    assert next(first_records([Path("a.jsonl")])) == {"a": 2}
    (folder / "b.parquet").write_text("no such thing")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        next(first_records([Path("b.parquet")]))
