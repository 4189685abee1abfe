"""Each record of a run comes back as it was written; a damaged one names its file."""

import dataclasses
import json
import math

import pytest

from finetune.errors import UserError
from finetune.evaluation.loss import LossResult, VocabularyLoss
from finetune.run.claim import write_marker
from finetune.run.environment import collect_environment
from finetune.run.folder import RunDir
from finetune.run.log import MetricLogger, forget_after, keep_samples, tracker_values
from finetune.run.marker import Marker
from finetune.run.metrics import METRICS
from finetune.run.records import (
    DataCounts,
    Environment,
    Evaluation,
    Evaluations,
    JsonRecord,
    Sample,
    StepRecord,
    Vocabulary,
    evaluations_by_step,
    read_config,
    read_metrics,
    read_run,
    read_samples,
    write_config,
)
from finetune.run.trials import Result

FIGURES = {"loss": 2.5, "chrf": 20.25, "chrf_signature": "nrefs:1", "seconds": 1.5}
RECORDS = {
    "environment.json": Environment(
        command="finetune train c.yaml",
        started="2026-03-14T09:26:53+00:00",
        processes=2,
        device="cpu",
        precision="fp32",
        machine={"cores": 2, "accelerator": None},
        versions={"python": "3.11.9"},
        model={"parameters": 214_000, "tied": True},
        notes=["2 examples were cut"],
        warned=["2 examples were cut"],
    ),
    "data.json": DataCounts(
        format="translation",
        train={"examples": 1200},
        languages=["en", "fr"],
        validation={"examples": 120},
    ),
    "vocabulary.json": Vocabulary(chosen="vocabulary: active", used=[0, 3, 17]),
    "evaluation.json": Evaluations(
        before=Evaluation(0, FIGURES),
        after=Evaluation(52, {**FIGURES, "loss": 1.5}),
        best=Evaluation(26, {**FIGURES, "loss": 1.25}),
        test={"loss": 1.75, "num_records": 100, "precision": "fp32"},
    ),
    "result.json": Result(
        "adamw", "reported", 1, {"lr": 1e-3, "betas": [0.9, 0.99]}, "", {"the model": "a1"}, 16
    ),
}
STEP = StepRecord(3, 0.25, 2.5, 1e-4, 1.25, 180, 430, 320.5, 1.34)
SAMPLES = [Sample(0, "Où ?", "Là.", "two\u2028lines\x85"), Sample(3, "a\nb", "", "")]


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    write_marker(run.root, Marker("run"))
    write_config(run, "seed: 0\n")
    return run


def test_every_kind_of_record_is_tried():
    assert {type(record) for record in RECORDS.values()} == set(JsonRecord.__subclasses__())


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_comes_back(run, name):
    record = RECORDS[name]
    record.write(run)
    assert record.path(run) == run.root / name
    assert type(record).read(run) == record


@pytest.mark.parametrize("kind", [Environment, DataCounts, Vocabulary, Evaluations])
def test_a_record_that_is_not_there_has_its_defaults(run, kind):
    assert kind.read(run) == kind()


def test_the_files_have_the_keys_that_they_always_had(run):
    for record in RECORDS.values():
        record.write(run)
    found = {name: json.loads((run.root / name).read_text()) for name in RECORDS}
    assert list(found["environment.json"]) == [
        *("command", "started", "processes", "device", "precision", "machine"),
        *("versions", "model", "training", "settings", "notes", "warned"),
    ]
    assert list(found["data.json"]) == ["format", "train", "languages", "validation"]
    assert run.vocabulary.read_text() == '{"chosen": "vocabulary: active", "used": [0, 3, 17]}'
    assert list(found["evaluation.json"]) == ["before", "after", "best", "test"]
    assert found["evaluation.json"]["before"] == {"step": 0, **FIGURES}
    assert found["environment.json"]["machine"]["accelerator"] is None
    DataCounts(format="chat", train={}).write(run)
    assert json.loads(run.data.read_text()) == {"format": "chat", "train": {}}


@pytest.mark.parametrize("name", RECORDS)
def test_a_key_of_a_later_version_is_kept(run, name):
    record = RECORDS[name]
    record.write(run)
    path = record.path(run)
    path.write_text(json.dumps({**json.loads(path.read_text()), "energy_kwh": 1.5}))
    type(record).read(run).write(run)
    assert json.loads(path.read_text()) == {**record.as_dict(), "energy_kwh": 1.5}
    dataclasses.replace(type(record).read(run)).write(run)
    assert json.loads(path.read_text())["energy_kwh"] == 1.5


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", '"text"'])
@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_names_its_file(run, name, text):
    (run.root / name).write_text(text)
    with pytest.raises(UserError, match=rf"run/{name} is not a valid JSON object .*\. Restore or"):
        type(RECORDS[name]).read(run)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("evaluation.json", {"after": {"loss": 1.5}}),
        ("evaluation.json", {"best": 3}),
        ("result.json", {"optimizer": "adamw"}),
    ],
)
def test_a_record_of_another_shape_names_its_file(run, name, values):
    (run.root / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"run/{name} is not what a run writes \("):
        type(RECORDS[name]).read(run)


def test_a_file_that_is_no_text_is_named(run):
    run.config.write_bytes(b"seed: \xff\n")
    run.data.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(UserError, match=r"config\.yaml cannot be read: .*utf-8"):
        read_config(run)
    with pytest.raises(UserError, match=r"data\.json cannot be read: .*utf-8"):
        DataCounts.read(run)
    run.metrics.mkdir()
    assert read_metrics(run) == ([], 0)


def test_what_is_logged_comes_back_in_its_order(run):
    heard = []
    logger = MetricLogger(run.metrics, listeners=(heard.append,))
    logged = [Evaluation(0, FIGURES), STEP, Evaluation(3, {**FIGURES, "loss": 2.25})]
    for record in logged:
        logger.log(record)
    assert heard == logged
    assert read_metrics(run) == (logged, 0)
    assert evaluations_by_step(run) == {0: logged[0], 3: logged[2]}
    lines = run.metrics.read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 0, "evaluation": FIGURES}
    assert list(json.loads(lines[1])) == [field.name for field in dataclasses.fields(StepRecord)]


def test_nan_and_infinity_are_valid_json_and_come_back(run):
    diverged = dataclasses.replace(STEP, loss=math.nan, grad_norm=math.inf)
    MetricLogger(run.metrics).log(diverged)
    assert '"loss": "nan"' in run.metrics.read_text()
    ((found,), _) = read_metrics(run)
    assert math.isnan(found.loss)
    assert found.grad_norm == math.inf
    Evaluations(after=Evaluation(3, {"loss": -math.inf})).write(run)
    assert Evaluations.read(run).after.number("loss") == -math.inf
    Result("sgd", "reported", 1, {"lr": 1.0}, "", {}, test={"all": math.inf}).write(run)
    assert Result.read(run).test == {"all": math.inf}


def test_samples_come_back_with_any_character(run):
    keep_samples(run, SAMPLES[:1])
    keep_samples(run, SAMPLES[1:])
    assert read_samples(run) == (SAMPLES, 0)
    assert "Où" in run.samples.read_text(encoding="utf-8")


def test_lines_of_a_killed_run_are_counted_and_forgotten(run):
    logger = MetricLogger(run.metrics)
    for step in (1, 2, 3):
        logger.log(dataclasses.replace(STEP, step=step))
    keep_samples(run, [*SAMPLES, Sample(2, "c", "d", "e")])
    with run.metrics.open("a") as metrics, run.samples.open("ab") as samples:
        metrics.write('{"step": 4, "lo')
        samples.write('{"step": 2, "prompt": "é'.encode()[:-1])  # cut within a letter
    assert [record.step for record in read_metrics(run)[0]] == [1, 2, 3]
    assert read_metrics(run)[1] == read_samples(run)[1] == 1
    assert read_run(run.root).notes == [
        "metrics.jsonl: 1 line could not be read and had to be left out.",
        "samples.jsonl: 1 line could not be read and had to be left out.",
    ]
    before = run.metrics.read_text().splitlines()
    forget_after(run, 2)
    assert run.metrics.read_text().splitlines() == before[:2]
    assert read_samples(run) == ([SAMPLES[0], Sample(2, "c", "d", "e")], 0)
    forget_after(run, -1)
    assert run.metrics.read_text() == run.samples.read_text() == ""


def test_a_line_of_an_earlier_run_lacks_keys_and_of_a_later_one_has_more(run):
    run.metrics.write_text('{"step": 1, "loss": 4.0, "energy_kwh": 0.5, "lr": null}\n{"loss": 1}\n')
    run.samples.write_text('{"step": 1, "prompt": "a", "reference": "b", "output": "c", "x": 0}\n')
    ((found,), unreadable) = read_metrics(run)
    assert (found.step, found.loss, found.num_tokens, unreadable) == (1, 4.0, 0, 1)
    assert math.isnan(found.lr)
    assert read_samples(run) == ([Sample(1, "a", "b", "c")], 0)


def test_what_a_tracker_is_given():
    values = tracker_values(STEP)
    assert values["train/loss"] == 2.5
    assert len(values) == len(dataclasses.fields(StepRecord)) - 1
    assert tracker_values(Evaluation(3, FIGURES)) == {
        "evaluation/loss": 2.5,
        "evaluation/chrf": 20.25,
        "evaluation/seconds": 1.5,
    }


def test_the_environment_of_this_process(run):
    record = collect_environment(processes=1, device="cpu", precision="fp32")
    assert record.versions["torch"].startswith("2.")
    record.write(run)
    assert Environment.read(run).versions == record.versions


def test_every_loss_that_is_computed_is_in_the_list_of_metrics():
    kinds = (LossResult, VocabularyLoss)
    computed = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    listed = {metric.key for metric in METRICS}
    assert len(computed) > 5
    apart = {"vocabulary", "by_group", "num_target_tokens", "num_target_bytes"}
    assert computed - apart <= listed
    assert len(listed) == len(METRICS)
