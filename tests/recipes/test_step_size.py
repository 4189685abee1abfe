"""`training.batch_size: auto` in whole runs: chosen once, said, kept with the run, and fair."""

import json
import re
from pathlib import Path

import pytest
import yaml

from finetune.config import load_config
from finetune.config.loading import make_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.build.material import read_material
from finetune.recipes.build.size import idle_processes, step_size_in_words, with_step_size
from finetune.recipes.compare.study import prepare_study
from finetune.recipes.plan.plan import plan_run
from finetune.recipes.train.train import run_training
from finetune.run.folder import RunDir
from finetune.run.records import Environment


def auto(tiny, **training):
    """Return a tree whose data, 43 conversations of about 20 tokens, makes 10 sequences."""
    training = {"max_steps": None, "batch_size": "auto", **training}
    return tiny(training=training, evaluation={"every": 1000, "samples": 0, "generate": 0})


def train(tree, **options) -> list[str]:
    """Train, and return what was noted."""
    display = Display(enabled=False)
    run_training(make_config(tree), display=display, **options)
    return display.notes


def chosen(folder: Path) -> tuple[int, int | None]:
    config = load_config(folder / "run" / "config.yaml")
    return config.training.batch_size, config.data.packed_length


LIMITS = [
    # changes of the training section, what is said
    ({"max_steps": 3}, "training.batch_size: auto is 8 sequences a step, since training.max_steps"),
    ({"max_time": 1.0}, "is 8 sequences a step, since training.max_time is set"),
    ({"epochs": 5}, "auto is 1 sequence a step, packed to 48 tokens at most (data.packed_length)"),
    ({"epochs": 10}, "training.batch_size: auto is 1 sequence a step, so that small data makes"),
    ({"epochs": 40}, "training.batch_size: auto is 4 sequences a step, so that small data makes"),
    ({"epochs": 200}, "training.batch_size: auto is 16 sequences a step"),
]


@pytest.mark.parametrize(("training", "said"), LIMITS)
def test_what_is_chosen_is_said(tiny, training, said):
    config = make_config(auto(tiny, **training))
    material = with_step_size(read_material(config, Display(enabled=False)))
    words = step_size_in_words(config, material.config)
    assert words is not None
    assert said in words
    assert material.examples_per_step > 0.9
    assert step_size_in_words(material.config, material.config) is None


def test_a_stream_has_8_sequences_a_step_and_no_length_of_its_own(tiny):
    tree = auto(tiny, max_steps=2)
    tree["data"] |= {"streaming": True, "validation_fraction": 0.0}
    config = make_config(tree)
    material = with_step_size(read_material(config, Display(enabled=False)))
    assert material.config.training.batch_size == 8
    said = step_size_in_words(config, material.config)
    assert said is not None
    assert said.endswith("is 8 sequences a step, since training.max_steps is set")
    assert material.steps_per_epoch is None
    assert 8 <= material.examples_per_step <= len(material.train)
    tree["data"]["packed_length"] = 64
    with pytest.raises(UserError, match="a stream is packed in sequences of"):
        train(tree)


@pytest.mark.parametrize(("processes", "idle"), [(1, None), (4, None), (5, 1), (16, 12)])
def test_processes_without_a_sequence_are_said(tiny, processes, idle):
    said = idle_processes(make_config(tiny()), processes)
    if idle is None:
        assert said is None
    else:
        assert said is not None
        assert said.startswith(f"{idle} of {processes} processes have no sequence in a step, since")


def test_a_resumed_run_keeps_what_it_began_with(tiny, tmp_path, capsys):
    notes = train(auto(tiny, epochs=2))
    assert any("training.batch_size: auto is 1 sequence" in note for note in notes)
    assert chosen(tmp_path) == (1, 24)
    first = Environment.read(RunDir(tmp_path / "run")).training["step"]
    assert first == "1 sequence, about 1 example"
    page = (tmp_path / "run" / "report.html").read_text()
    assert re.search(r"A step has.{0,40}1 sequence, about 1 example", page, flags=re.DOTALL)
    capsys.readouterr()
    for resume, size in (("auto", (1, 24)), (None, (4, None))):
        train(auto(tiny, epochs=40), resume=resume, dry_run=True)
        printed = yaml.safe_load(capsys.readouterr().out)
        assert (printed["training"]["batch_size"], printed["data"]["packed_length"]) == size
    notes = train(auto(tiny, epochs=5), resume="auto")
    assert chosen(tmp_path) == (1, 24), "five epochs alone would have sequences of 48 tokens"
    assert not any("batch_size" in note or "packed_length" in note for note in notes)
    assert any("training.epochs 2.0 -> 5.0" in note for note in notes)
    steps = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    epochs = [line["epoch"] for line in steps if "loss" in line]
    assert epochs == sorted(epochs)
    assert epochs[-1] == 5
    with pytest.raises(UserError, match=r"training.batch_size changed \(then 1, now 2\)"):
        train(auto(tiny, epochs=5, batch_size=2), resume="auto")
    other = auto(tiny, epochs=5, batch_size=1)
    other["data"]["packed_length"] = 48
    with pytest.raises(UserError, match=r"data.packed_length changed \(then 24, now 48\)"):
        train(other, resume="auto")


def test_a_model_that_cannot_be_packed_has_a_size_of_its_own(tiny, tmp_path):
    tree = auto(tiny, epochs=5)
    tree["model"] = {"config": {"model_type": "bloom", "hidden_size": 32, "n_layer": 1,
                                "n_head": 4}}  # fmt: skip
    notes = train(tree)
    assert chosen(tmp_path) == (2, None), "of 43 sequences of one example"
    assert sum("training.batch_size: auto" in note for note in notes) == 1
    plan = plan_run(make_config({**tree, "output_dir": str(tmp_path / "other")}))
    assert plan.work.batch_size == 2


def test_the_plan_says_what_a_step_has(tiny, capsys):
    plan = plan_run(make_config(auto(tiny, epochs=40)))
    assert plan.work.batch_size == 4
    assert plan.work.num_steps >= 100
    printed = capsys.readouterr()
    assert "training.batch_size: auto is 4 sequences a step" in printed.err
    lines = {line.strip()[:18]: line.split() for line in printed.out.splitlines()}
    assert lines["sequences of a ste"][4] == "4"
    assert lines["examples of a step"][4] == f"{plan.work.examples_per_step:.0f}"


@pytest.mark.parametrize("training", [{"epochs": 5}, {"epochs": 40}, {"max_steps": 7}])
def test_a_run_of_a_search_is_as_long_and_as_large_as_the_run_of_its_config(
    tiny, tmp_path, training
):
    config = make_config(auto(tiny, **training))
    quiet = Display(enabled=False)
    base = prepare_study(config, trials=1, budget=None, test=False, display=quiet)
    run = make_config({**auto(tiny, **training), "output_dir": str(tmp_path / "alone")})
    plan = plan_run(run)
    assert base.training.max_steps == plan.work.num_steps
    assert base.training.batch_size == plan.work.batch_size
    short = prepare_study(config.model_copy(update={"output_dir": tmp_path / "short"}),
                          trials=1, budget=5, test=False, display=quiet)  # fmt: skip
    assert short.training.max_steps == 5
    assert short.training.batch_size == base.training.batch_size
    assert short.data.packed_length == base.data.packed_length
