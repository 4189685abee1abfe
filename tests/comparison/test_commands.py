"""`finetune compare` and `finetune tune` on a tiny model.

What they leave, what is fair about it, and that a killed one goes on.
"""

import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml

from finetune.config import load_config
from tests.cli.conftest import finetune, snapshot
from tests.conftest import LLAMA, PYTHIA, conversation

KILL_IN_THE_SECOND_REPORTED_RUN = """
import os, signal
from finetune.run.log import MetricLogger
log = MetricLogger.log
def log_then_die(self, record):
    log(self, record)
    if record.step == 4 and hasattr(record, "loss") and "adam/seed-1" in str(self._path):
        os.kill(os.getpid(), signal.SIGKILL)
MetricLogger.log = log_then_die
"""
COMPARE = (
    "compare",
    "c.yaml",
    "optimizer.name=[sgd,adam]",
    "output_dir=out",
    "--trials",
    "2",
    "--seeds",
    "2",
)


def write(folder: Path, **sections) -> None:
    (folder / "chat.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(48))
    )
    tree = {
        "model": {"config": LLAMA, "tokenizer": {"vocab_size": 300}},
        "data": {"train": "chat.jsonl", "validation_fraction": 0.25, "max_length": 96},
        "training": {"max_steps": 6, "batch_size": 4, "micro_batch_size": 4},
        "evaluation": {"every": 3},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))


def process(*arguments: str, before: str = "", cwd: Path) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own, after the code `before`."""
    code = (
        f"{before}\nimport sys; sys.argv = ['finetune', *{list(arguments)!r}]\n"
        "from finetune.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """A folder with a comparison of SGD and Adam in out/, made without a stop."""
    folder = tmp_path_factory.mktemp("compared")
    write(folder, optimizer={"betas": [0.8, 0.99]})
    here = Path.cwd()
    os.chdir(folder)
    try:
        result = finetune(*COMPARE)
    finally:
        os.chdir(here)
    assert result.code == 0, result.err
    return folder


def comparison(folder: Path) -> dict:
    return json.loads((folder / "out" / "comparison.json").read_text())


def without_clocks(found: dict) -> dict:
    """Return a comparison without what a clock decides."""
    entries = {
        name: {
            key: value
            for key, value in entry.items()
            if "seconds" not in key and key not in ("curve", "to_target")
        }
        for name, entry in found["optimizers"].items()
    }
    curves = {
        name: [(point["step"], point["loss"], point["tokens"]) for point in entry["curve"]]
        for name, entry in found["optimizers"].items()
    }
    runs = [
        {key: value for key, value in run.items() if key not in ("seconds", "load")}
        for run in found["runs"]
    ]
    kept = {
        key: found[key]
        for key in ("verdict", "target", "bins", "starts", "protocol", "notes", "config")
    }
    return {"entries": entries, "curves": curves, "runs": runs, **kept}


def test_it_leaves_the_verdict_in_three_files(compared):
    found = comparison(compared)
    assert list(found["optimizers"]) == ["sgd", "adam"]
    assert sorted(found["verdict"]["ranking"]) == ["adam", "sgd"]
    with (compared / "out" / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["optimizer"], line["phase"], line["seed"]) for line in lines] == [
        ("sgd", "tuning", "0"),
        ("sgd", "tuning", "0"),
        ("adam", "tuning", "0"),
        ("adam", "tuning", "0"),
        ("sgd", "reported", "1"),
        ("sgd", "reported", "2"),
        ("adam", "reported", "1"),
        ("adam", "reported", "2"),
    ]
    assert all(line["test_loss"] for line in lines if line["phase"] == "reported")
    assert not any(line["test_loss"] for line in lines if line["phase"] == "tuning")
    html = (compared / "out" / "comparison.html").read_text()
    assert found["verdict"]["sentences"][0].split(" [")[0] in html
    assert not list((compared / "out").rglob("*.safetensors")) + list(
        (compared / "out").rglob("*.pt")
    )


def test_a_seed_means_the_same_start_and_the_same_batches(compared):
    runs = compared / "out" / "runs"
    first = {}
    for name in ("sgd", "adam"):
        for seed in (1, 2):
            lines = [
                json.loads(line)
                for line in (runs / name / f"seed-{seed}" / "metrics.jsonl")
                .read_text()
                .splitlines()
            ]
            steps = [line for line in lines if "loss" in line]
            assert len(steps) == 6
            first[name, seed] = (
                lines[0]["evaluation"]["loss"],
                steps[0]["loss"],
                [step["num_tokens"] for step in steps],
            )
    assert first["sgd", 1] == first["adam", 1]
    assert first["sgd", 2] == first["adam", 2]
    assert first["sgd", 1][1] != first["sgd", 2][1]


def test_the_learning_rate_reported_is_the_one_that_chose(compared):
    found = comparison(compared)
    for name, entry in found["optimizers"].items():
        tuned = [
            run for run in found["runs"] if run["optimizer"] == name and run["phase"] == "tuning"
        ]
        assert entry["lr"] == min(tuned, key=lambda run: run["validation_loss"])["lr"]
        assert {
            run["lr"]
            for run in found["runs"]
            if run["optimizer"] == name and run["phase"] == "reported"
        } == {entry["lr"]}


def test_state_and_bins_are_measured(compared):
    found = comparison(compared)
    parameters = found["model"]["parameters"]
    assert found["optimizers"]["sgd"]["state_bytes"] == 0
    # two moments a parameter, and a step count a tensor
    assert 8 * parameters <= found["optimizers"]["adam"]["state_bytes"] < 8 * parameters + 1000
    bins = found["bins"]
    assert sum(part["tokens"] for part in bins.values()) == found["model"]["vocab_size"]
    result = compared / "out" / "runs" / "adam" / "seed-1" / "result.json"
    test = json.loads(result.read_text())["test"]
    nats = sum(test[name] * part["targets"] for name, part in bins.items() if part["targets"])
    num_targets = sum(part["targets"] for part in bins.values())
    assert test["all"] == pytest.approx(nats / num_targets)


def test_data_that_chooses_is_not_reported_on(compared):
    records = {
        name: (compared / "out" / "data" / f"{name}.jsonl").read_text().splitlines()
        for name in ("train", "validation", "test")
    }
    assert [len(part) for part in records.values()] == [36, 6, 6]
    assert len({line for part in records.values() for line in part}) == 48


def test_an_option_goes_to_those_that_take_it(compared):
    found = comparison(compared)
    assert "betas is given to adam alone: sgd does not take it." in found["notes"]
    assert found["optimizers"]["adam"]["settings"]["betas"] == [0.8, 0.99]
    assert "betas" not in found["optimizers"]["sgd"]["settings"]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_figures(compared, tmp_path, monkeypatch):
    write(tmp_path, optimizer={"betas": [0.8, 0.99]})
    killed = process(*COMPARE, before=KILL_IN_THE_SECOND_REPORTED_RUN, cwd=tmp_path)
    assert killed.returncode == -9, killed.stderr
    done = list((tmp_path / "out" / "runs").rglob("result.json"))
    assert len(done) == 5
    times = {path: path.stat().st_mtime_ns for path in done}  # a finished run is not run again
    assert not (tmp_path / "out" / "comparison.json").exists()
    monkeypatch.chdir(tmp_path)
    again = finetune(*COMPARE)
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert without_clocks(comparison(tmp_path)) == without_clocks(comparison(compared))


def test_more_seeds_are_added_to_what_is_there(compared, tmp_path, monkeypatch):
    shutil.copytree(compared, tmp_path / "more")
    monkeypatch.chdir(tmp_path / "more")
    result = finetune(*COMPARE[:-1], "3", "-q")
    assert (result.code, result.err) == (0, "")
    found = comparison(tmp_path / "more")
    assert result.out.splitlines() == [
        *found["verdict"]["sentences"],
        "comparison: out/comparison.html",
    ]
    assert found["optimizers"]["adam"]["reported_runs"] == 3
    assert [run for run in found["runs"] if run["seed"] < 3] == comparison(compared)["runs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optimizer.name=[sgd,adm]",), "schedule_free_adamw. Did you mean 'adam'?"),
        (("optimizer.name=[adam]",), "needs at least two optimizers"),
        (("optimizer.name=[adamw,AdamW]",), "names adamw twice"),
        (
            ("optimizer.name=[sgd,adam]", "optimizer.beta=0.9"),
            "none of sgd and adam takes 'beta'; they take amsgrad, betas, capturable, "
            "differentiable, eps, foreach, fused, lr, maximize, weight_decay. "
            "Did you mean 'betas'?",
        ),
        (
            ("optimizer.name=[sgd,adam]", "optimizer.betas=[2,3]"),
            "optimizer 'adam' cannot be built",
        ),
        (
            ("optimizer.name=[adamw,sparse_adam]",),
            "optimizer 'sparse_adam' takes only row-sparse gradients",
        ),
        (
            ("optimizer.name=[sgd,adam]", "optimizer.overrides=[{pattern: '*', lr: 1}]"),
            "optimizer.overrides sets an lr",
        ),
        (
            ("optimizer.name=[sgd,adam]", "data.validation_fraction=0"),
            "a comparison needs held-out data",
        ),
        (("optimizer.name=[sgd,adam]", "training.max_time=60"), "another number of steps"),
        (("optimizer.name=[sgd,lazy_adamw]", "optimizer.lazy=false"), "Name adamw to step every"),
        (("optimizer.name=[adamw,sgd]", "optimizer.lazy=true"), "sgd has no lazy path"),
        (
            ("optimizer.name=[sgd,adam]", "output_dir=out", "--trials", "3"),
            "holds a comparison with other settings (trials 2, now 3;",
        ),
        (
            ("optimizer.name=[sgd,adam]", "output_dir=out", "training.batch_size=8"),
            "holds a comparison with other settings (in training;",
        ),
    ],
)
def test_mistakes_are_reported_before_anything_runs(compared, monkeypatch, arguments, message):
    monkeypatch.chdir(compared)
    result = finetune(
        "compare", "c.yaml", *arguments, *(() if "--trials" in arguments else ("--trials", "2"))
    )
    assert result.code == 2
    assert message in result.err
    assert not list((compared / "runs").rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    "content", ["trials: [", "a line of text", "", "[1]", "template_date: abc", "template_date: 5"]
)
def test_a_damaged_protocol_is_one_sentence(compared, tmp_path, monkeypatch, content):
    shutil.copytree(compared, tmp_path / "damaged")
    monkeypatch.chdir(tmp_path / "damaged")
    Path("out/protocol.yaml").write_text(content)
    result = finetune(*COMPARE)
    assert result.code == 2
    assert result.err.splitlines()[-1] == (
        "finetune: out/protocol.yaml is damaged, so the settings of the comparison are not known. "
        "Name another output_dir, or delete out"
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.jsonl", "", "is not what a run of a comparison writes. Delete out/runs/adam/lr-"),
        ("metrics.jsonl", '{"step": 0, "evaluation": {}}', "is not what a run of a comparison"),
        ("updates.jsonl", '{"step": 1}', "is not what a run of a comparison writes. Delete out"),
        ("updates.jsonl", '{"step": [], "ratio": 1}', "is not what a run of a comparison writes"),
        ("result.json", '{"lr": "x"}', "is not what a run writes (could not convert string to"),
        ("result.json", '{"lr": null}', "is not what a run writes ("),
        ("result.json", "{}", "is not what a run writes ('lr'). Restore or remove the file"),
    ],
)
def test_a_damaged_record_of_a_run_is_one_sentence_and_the_run_may_be_deleted(
    compared, tmp_path, monkeypatch, name, content, says
):
    shutil.copytree(compared, tmp_path / "damaged")
    monkeypatch.chdir(tmp_path / "damaged")
    file = next(Path("out/runs/adam").glob(f"lr-*/{name}"))
    before = comparison(Path())
    if name == "result.json":
        content = json.dumps({**json.loads(file.read_text()), "settings": json.loads(content)})
    file.write_text(content)
    result = finetune(*COMPARE)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"finetune: {file} {says}")
    shutil.rmtree(file.parent)
    assert finetune(*COMPARE).code == 0
    assert without_clocks(comparison(Path())) == without_clocks(before)


def make_a_folder(database: Path) -> None:
    database.unlink()
    database.mkdir()


def lock(database: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(database)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_bytes(b"x" * 5000), "file is not a database"),
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "database disk image is malfor"),
        (make_a_folder, "unable to open database file"),
        (lock, "database is locked"),
    ],
)
def test_a_search_that_cannot_be_read_is_one_sentence_and_may_be_deleted(
    compared, tmp_path, monkeypatch, damage, reason
):
    shutil.copytree(compared, tmp_path / "damaged")
    monkeypatch.chdir(tmp_path / "damaged")
    database = Path("out/study.db")
    left = damage(database)
    result = finetune(*COMPARE)
    assert result.code == 2
    said = result.err.splitlines()[-1]
    assert said.startswith(f"finetune: out/study.db cannot be read or written: {reason}")
    assert said.endswith(". If it is damaged, delete it: the runs that are over are kept")
    if isinstance(left, sqlite3.Connection):
        left.close()
    database.rmdir() if database.is_dir() else database.unlink()
    before = snapshot(Path("out/runs"))
    assert finetune(*COMPARE).code == 0
    assert snapshot(Path("out/runs")) == before


def test_a_search_is_in_its_folder_whatever_that_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    folder = tmp_path / "which?" / "a#1 {b}%20"
    search = ("tune", "c.yaml", "--trials", "1", "--budget", "2", f"output_dir={folder}")
    result = finetune(*search)
    assert result.code == 0, result.err
    assert (folder / "study.db").stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "chat.jsonl", "which?"]


def test_a_weight_decay_that_is_no_number_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    result = finetune("tune", "c.yaml", "optimizer.weight_decay=[0, high]", "--trials", "1")
    assert result.code == 2
    assert "optimizer.weight_decay=[0, 'high'] does not hold numbers alone" in result.err
    assert not (tmp_path / "runs").exists()


def test_tune_writes_the_config_of_the_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, optimizer={"name": "adamw", "lr": 1e-2, "betas": [0.8, 0.99]})
    Path("c.yaml").rename("my c.yaml")
    result = finetune(
        "tune", "my c.yaml", "optimizer.weight_decay=[0,0.1]", "--trials", "2", "--budget", "4"
    )
    assert result.code == 0, result.err
    folder = Path("runs/tune-my c/runs/adamw")
    runs = sorted(path.parent.name for path in folder.rglob("result.json"))
    assert runs == [
        "lr-0.003-weight-decay-0",
        "lr-0.003-weight-decay-0.1",
        "lr-0.01-weight-decay-0",
        "lr-0.01-weight-decay-0.1",
    ]
    best = load_config(Path("runs/tune-my c/best.yaml"))
    assert best.optimizer.lr == 1e-2
    assert best.optimizer.options == {"betas": [0.8, 0.99]}
    assert best.training == load_config(Path("my c.yaml")).training, "trains as long as c.yaml"
    assert best.data == load_config(Path("my c.yaml")).data
    assert "best" in result.out
    assert f"weight_decay={best.optimizer.weight_decay:g}" in result.out
    assert "Go on with: finetune train 'runs/tune-my c/best.yaml'" in result.out


def test_a_grid_that_is_too_low_is_widened_four_times_at_most(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, optimizer={"name": "sgd", "lr": 1e-4}, training={"max_steps": 2})
    result = finetune("tune", "c.yaml", "optimizer.weight_decay=[0]", "--trials", "3")
    assert result.code == 0, result.err
    tried = {
        json.loads(path.read_text())["settings"]["lr"]
        for path in Path("runs/tune-c/runs/sgd").rglob("result.json")
    }
    assert tried == {3e-5, 1e-4, 3e-4} | {1e-3, 3e-3, 1e-2, 3e-2}
    assert result.err.count("(widened)") == 4
    assert load_config(Path("runs/tune-c/best.yaml")).optimizer.lr == 3e-2


def test_a_run_that_diverges_is_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        optimizer={"name": "sgd", "lr": 1e3},
        training={"max_steps": 40, "max_grad_norm": 0},
    )
    result = finetune("tune", "c.yaml", "optimizer.weight_decay=[0]", "--trials", "1")
    assert result.code == 2
    assert "all 1 runs diverged" in result.err
    path = next(Path("runs/tune-c/runs/sgd").rglob("result.json"))
    assert "training stopped at step" in json.loads(path.read_text())["problem"]


@pytest.mark.parametrize(("model", "names"), [(LLAMA, "sgd,adamw"), (PYTHIA, "adamw,lazy_adamw")])
def test_optimizers_that_keep_rows_apart_differently_begin_alike(
    tmp_path, monkeypatch, model, names
):
    """The active rows of Adam share a shift, and those of SGD do not.

    lazy_adamw leaves the input table whole.
    """
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        model={"config": model},
        vocabulary={"mode": "active"},
        training={"max_steps": 2},
        evaluation={"every": 2},
    )
    compare = (
        "compare",
        "c.yaml",
        f"optimizer.name=[{names}]",
        "output_dir=out",
        "--trials",
        "1",
        "--seeds",
        "1",
    )
    result = finetune(*compare)
    assert result.code == 0, result.err
    assert {run["optimizer"] for run in comparison(tmp_path)["runs"]} == set(names.split(","))


def test_data_may_be_mended_until_something_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, training={"max_steps": 2})
    tune = ("tune", "c.yaml", "optimizer.weight_decay=0", "--trials", "1")
    whole = Path("chat.jsonl").read_text()
    Path("chat.jsonl").write_text(whole + '{"messages": []}\n')
    refused = finetune(*tune)
    assert (refused.code, "chat.jsonl" in refused.err or "train.jsonl" in refused.err) == (2, True)
    assert not Path("runs/tune-c/protocol.yaml").exists(), "nothing holds anyone to it"
    Path("chat.jsonl").write_text(whole)
    result = finetune(*tune)
    assert result.code == 0, result.err
    assert "every run has 2 steps" in result.err
    Path("chat.jsonl").write_text(whole.replace("What is 3 plus 3?", "What is 3 and 3?"))
    changed = finetune(*tune)
    assert changed.code == 2
    assert "the data is no longer that of runs/tune-c/data/" in changed.err
    Path("chat.jsonl").write_text(whole)
    assert finetune(*tune).code == 0
    other = finetune(*tune, "training.batch_size=2")
    assert "holds a comparison with other settings (in training" in other.err


def test_a_search_keeps_the_day_that_its_template_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = (
        "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
        "\n{% endif %}"
    )
    (tmp_path / "dated.jinja").write_text(template)
    write(tmp_path, training={"max_steps": 1}, model={"chat_template": "dated.jinja"})
    tune = ("tune", "c.yaml", "optimizer.weight_decay=0", "--trials")
    assert finetune(*tune, "1").code == 0
    protocol = Path("runs/tune-c/protocol.yaml")
    kept = yaml.safe_load(protocol.read_text())
    assert kept["template_date"] == f"{date.today():%Y-%m-%d}"
    protocol.write_text(yaml.safe_dump({**kept, "template_date": "2020-02-02"}))
    later = finetune(*tune, "1")  # the data is that of the day before: another one
    assert "the training data " in later.err


def test_values_that_no_optimizer_takes_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, training={"max_steps": 1})
    for given, says in (
        ("optimizer.weight_decay=[-0.1]", "optimizer.weight_decay = -0.1 is not allowed"),
        ("weight_decay=-0.1", "optimizer.weight_decay = -0.1 is not allowed"),
        ("optimizer.weight_decay=[.nan]", "optimizer.weight_decay = nan is not allowed"),
    ):
        result = finetune("tune", "c.yaml", given, "--trials", "1")
        assert (result.code, says in result.err) == (2, True), result.err
    lazy = finetune(
        *("tune", "c.yaml", "optimizer.name=adam", "optimizer.lazy=true", "--trials", "1"),
        "optimizer.weight_decay=[0, 0.1]",
    )
    assert (lazy.code, "adam's weight decay is a part" in lazy.err) == (2, True), lazy.err
    assert not list(Path().rglob("metrics.jsonl"))
    none = finetune("tune", "c.yaml", "optimizer.name=sparse_adam", "optimizer.weight_decay=[0, 1]")
    assert (none.code, "sparse_adam takes no weight decay" in none.err) == (2, True), none.err
    one = finetune("compare", "c.yaml", "optimizer.name=adam")
    assert (one.code, "needs at least two optimizers" in one.err) == (2, True), one.err


def test_a_grid_ends_at_the_highest_rate_that_a_config_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, optimizer={"name": "sgd", "lr": 500}, training={"max_steps": 1})
    result = finetune("tune", "c.yaml", "optimizer.weight_decay=0", "--trials", "3")
    assert "Traceback" not in result.err
    tried = {path.name for path in Path("runs/tune-c/runs/sgd").iterdir()}
    assert tried >= {"lr-150-weight-decay-0", "lr-500-weight-decay-0"}
    assert not any("1.5e+03" in name for name in tried)


def test_settings_that_no_run_of_a_search_follows_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        optimizer={"name": "adamw", "lr": 1e-2, "weight_decay": 0.3},
        training={"max_steps": 1},
        evaluation={"best": "chrf", "early_stopping_patience": 2, "generate": 0, "samples": 8},
        checkpoint={"every": 1},
    )
    tune = ("tune", "c.yaml", "tracking=[tensorboard]", "--trials", "1")
    result = finetune(*tune)
    assert result.code == 0, result.err
    (line,) = [line for line in result.err.splitlines() if "alone decides" in line]
    keys = "evaluation.best, evaluation.early_stopping_patience and tracking"
    assert line.startswith(f"{keys} have no effect here")
    assert "optimizer.weight_decay of the config has no effect here" in result.err
    assert "every run has 1 step, and the loss after the last one decides" in result.err
    before = snapshot(tmp_path)
    again = finetune(*tune, "overwrite_output_dir=true")
    assert (again.code, "tune-c holds a comparison, which goes on" in again.err) == (2, True)
    assert snapshot(tmp_path) == before
    compared = finetune("compare", "c.yaml", "data.validation_fraction=0")
    assert compared.code == 2
    assert "optimizer.lr has no effect here" in compared.err
    assert "optimizer.name of the config has no effect here" in compared.err
