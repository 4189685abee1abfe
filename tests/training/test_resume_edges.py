"""A run that is resumed at an edge: over already, from a time to steps, after a divergence."""

import contextlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.loading import make_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.optim import registry
from finetune.recipes import evaluate
from finetune.recipes.build.evaluator import Evaluator
from finetune.recipes.runs import state_of
from finetune.recipes.train.train import run_training
from finetune.report import write_report
from finetune.run.claim import locked
from finetune.run.folder import RunDir, checkpoint_path, complete_steps
from finetune.run.log import VERBOSITY, MetricLogger
from finetune.run.records import (
    Evaluation,
    Evaluations,
    StepRecord,
    evaluations_by_step,
    read_metrics,
    read_run,
)
from tests.training.kills import kept


def train(tree: dict[str, Any], **options: Any) -> str:
    return run_training(make_config(tree), display=Display(enabled=False), **options)


def steps_of(run: Path) -> list[StepRecord]:
    return [record for record in read_metrics(RunDir(run))[0] if isinstance(record, StepRecord)]


def state(run: Path) -> str:
    return state_of(read_run(run), held=False)


class Killed(BaseException):
    """The end of the process."""


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch):
    """Return a function that lets something happen when a step is logged, once."""

    def after_step(step: int, happens: Any) -> None:
        log = MetricLogger.log

        def log_and_more(self: MetricLogger, record: Any) -> None:
            log(self, record)
            if isinstance(record, StepRecord) and record.step == step:
                monkeypatch.setattr(MetricLogger, "log", log)
                happens()

        monkeypatch.setattr(MetricLogger, "log", log_and_more)

    return after_step


def kill() -> None:
    raise Killed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_after_a_time_the_schedule_goes_on_at_the_place_of_the_steps(tiny, tmp_path, after_step):
    after_step(2, interrupt)
    timed = tiny(training={"max_steps": None, "max_time": "1h"}, scheduler={"warmup_ratio": 0.0})
    assert train(timed) == "signal"
    done = len(steps_of(tmp_path / "run"))
    counted = tiny(training={"max_steps": 10}, scheduler={"warmup_ratio": 0.0})
    notes = Display(enabled=False)
    assert run_training(make_config(counted), display=notes, resume="auto") == "finished"
    rates = [step.lr for step in steps_of(tmp_path / "run")[done:]]
    assert rates == pytest.approx([3e-3 * (1 - n / 10) for n in range(done, 10)])
    assert any("that of the whole schedule over 10 steps" in note for note in notes.notes)


@pytest.mark.parametrize("named", ["a copy", "a link", "."])
def test_a_checkpoint_may_be_named_in_any_way(tiny, tmp_path, monkeypatch, named):
    tree = tiny(training={"max_steps": 2, "batch_size": "auto"}, checkpoint={"every": 1})
    train(tree)
    newest = checkpoint_path(tmp_path / "run" / "checkpoints", 2)
    monkeypatch.chdir(newest if named == "." else tmp_path)
    if named == "a copy":
        newest.rename("best")
    elif named == "a link":
        Path("best").symlink_to(newest)
    longer = {**tree, "training": {**tree["training"], "max_steps": 4}}
    if named == "a copy":  # it is of no run
        longer["output_dir"] = str(tmp_path / "other")
    assert train(longer, resume="." if named == "." else "best") == "finished"
    assert steps_of(Path(longer["output_dir"]))[-1].step == 4


def test_a_run_that_diverged_and_went_on_is_finished(tiny, tmp_path):
    wild = tiny(
        optimizer={"name": "sgd", "lr": 300.0, "weight_decay": 0.0},
        training={"max_steps": 60, "divergence_threshold": 1.0},
        checkpoint={"every": 1, "keep": 60},
    )

    def show_live(record: Any) -> None:
        if record.step == 1:
            write_report(tmp_path / "run", live=True)

    with pytest.raises(UserError, match="training stopped at step"):
        train(wild, listener=show_live)
    run = RunDir(tmp_path / "run")
    assert state(run.root) == "diverged"
    assert 'http-equiv="refresh"' not in run.report.read_text(), "nothing more will come"
    calm = {**wild, "optimizer": {**wild["optimizer"], "lr": 1e-6}}
    calm["training"] = {**wild["training"], "max_steps": 2}
    assert train(calm, resume=str(checkpoint_path(run.checkpoints, 1))) == "finished"
    assert state(run.root) == "finished"
    assert not run.bad_batch.exists()


def test_a_long_epoch_is_saved_before_its_end(tiny, tmp_path, after_step, monkeypatch):
    tree = tiny(training={"max_steps": 4}, evaluation={"every": 4})
    train({**tree, "output_dir": str(tmp_path / "whole")})
    saved = complete_steps(tmp_path / "whole" / "checkpoints")
    assert saved == [4], "no time to speak of has passed"
    monkeypatch.setattr("finetune.recipes.train.train.AT_MOST_LOST", 0.0)
    after_step(3, kill)
    with pytest.raises(Killed):
        train(tree)
    assert complete_steps(tmp_path / "run" / "checkpoints") == [1, 2]
    assert train(tree, resume="auto") == "finished"
    losses = [[step.loss for step in steps_of(tmp_path / name)] for name in ("whole", "run")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("resume", ["auto", "the same"])
def test_a_run_from_another_that_died_before_its_first_checkpoint_begins_again(
    tiny, tmp_path, after_step, resume
):
    tree = tiny(training={"max_steps": 6}, checkpoint={"every": 2, "keep": 9})
    train(tree)
    source = str(checkpoint_path(tmp_path / "run" / "checkpoints", 2))
    fork = {**tree, "output_dir": str(tmp_path / "fork")}
    after_step(3, kill)
    with pytest.raises(Killed):
        train(fork, resume=source)
    assert train(fork, resume="auto" if resume == "auto" else source) == "finished"
    losses = [step.loss for step in steps_of(tmp_path / "run")]
    assert [step.loss for step in steps_of(tmp_path / "fork")] == losses[2:]
    with pytest.raises(UserError, match="holds a run already"):
        train(fork, resume=source)  # it has checkpoints of its own now


@pytest.mark.parametrize("best", [True, False])
def test_a_run_that_is_ended_where_it_stopped_is_evaluated(tiny, tmp_path, after_step, best):
    tree = tiny(training={"max_steps": 9}, evaluation={"every": 3, "before": True})
    if not best:
        tree["optimizer"] = {"lr": 1.0}  # it gets worse
        tree["training"]["divergence_threshold"] = 1e9
    after_step(4, interrupt)
    assert train(tree) == "signal"
    run = RunDir(tmp_path / "run")
    last = steps_of(run.root)[-1].step
    assert last not in evaluations_by_step(run)
    tree["training"]["max_steps"] = last
    assert state(run.root) == "stopped"
    for _ in range(2):  # the second time there is nothing to do
        assert train(tree, resume="auto") == "finished"
        assert state(run.root) == "finished"
        found = json.loads(run.evaluation.read_text())
        assert found["last_step"] == last
        losses = {step: e.metrics["loss"] for step, e in evaluations_by_step(run).items() if step}
        assert found["best"]["step"] == min(losses, key=losses.__getitem__)
        assert (found["best"]["step"] == last) == best
        assert last in losses
        assert found["after"] == found["best"]


@pytest.mark.parametrize("num_steps", [4, 6])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_run_that_is_stopped_at_an_evaluation_ends_as_one_that_is_not(
    tiny, tmp_path, when, num_steps
):
    """One that was to begin is made by the resumed run, and once, also if that one is killed."""
    tree = tiny(
        training={"max_steps": num_steps},
        evaluation={"every": 2, "before": True, "early_stopping_patience": 9},
        checkpoint={"keep": 9},
    )
    train({**tree, "output_dir": str(tmp_path / "whole")})
    at = (StepRecord, 3) if when == "before" else (Evaluation, 4)

    def stop(record: Any) -> None:
        if isinstance(record, at[0]) and record.step == at[1]:
            interrupt()

    def die(record: Any) -> None:
        if isinstance(record, Evaluation):
            raise Killed

    run = RunDir(tmp_path / "run")
    assert train(tree, listener=stop) == "signal"
    assert steps_of(run.root)[-1].step == complete_steps(run.checkpoints)[-1] == 4
    assert (4 in evaluations_by_step(run)) == (when == "during")
    if when == "before":
        with pytest.raises(Killed):
            train(tree, resume="auto", listener=die)
    assert train(tree, resume="auto") == "finished"
    assert kept(run.root) == kept(tmp_path / "whole")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_signal_is_answered_at_once(tiny, after_step, monkeypatch, capfd, quiet):
    monkeypatch.setenv(VERBOSITY, "quiet" if quiet else "")
    after_step(2, interrupt)
    assert run_training(make_config(tiny()), display=Display()) == "signal"
    said = capfd.readouterr().err
    answer = "stopping after this step or evaluation, and a checkpoint; a second Ctrl-C ends"
    assert (answer in said) != quiet


def test_a_run_without_held_out_data_is_finished_also_after_a_test(tiny, tmp_path):
    tree = tiny(data={"validation_fraction": 0.0})
    tree["data"]["test"] = tree["data"]["train"]
    train(tree)
    assert state(tmp_path / "run") == "finished"
    evaluate.evaluate_target(str(tmp_path / "run"), config=None, overrides=[], as_json=True)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["test"]
    assert state(tmp_path / "run") == "finished"


def overwritten(tree: dict[str, Any], after_step: Any) -> None:
    """Begin the run anew, which is killed before its first checkpoint."""
    after_step(1, kill)
    with pytest.raises(Killed):
        train({**tree, "overwrite_output_dir": True})


def extended(tree: dict[str, Any], after_step: Any) -> None:
    train({**tree, "training": {**tree["training"], "max_steps": 6}}, resume="auto")


@pytest.mark.parametrize("meanwhile", [overwritten, extended, None])
def test_figures_of_a_model_that_is_gone_are_not_kept(
    tiny, tmp_path, after_step, monkeypatch, capfd, meanwhile
):
    """`evaluate` measured one model, and the run has another one when it is done."""
    tree, run = tiny(training={"max_steps": 2}), RunDir(tmp_path / "run")
    train(tree)
    measure = evaluate.evaluate_opened

    def measure_meanwhile(*given: Any) -> dict[str, Any]:
        results = measure(*given)
        if meanwhile is not None:
            meanwhile(tree, after_step)
        return results

    monkeypatch.setattr(evaluate, "evaluate_opened", measure_meanwhile)
    with locked(run.root, print) if meanwhile is None else contextlib.nullcontext():
        evaluate.evaluate_target(str(run.root), config=None, overrides=[], as_json=True)
    said = capfd.readouterr()
    assert json.loads(said.out)["loss"] > 0
    why = "is in use by process" if meanwhile is None else "was trained meanwhile. Evaluate it"
    assert "these metrics are not kept in" in said.err
    assert why in said.err
    assert Evaluations.read(run).test is None
    assert train(tree, resume="auto") == "finished"


def test_figures_on_test_data_alone_are_no_end_of_a_run(tiny, tmp_path, after_step):
    tree, run = tiny(training={"max_steps": 2}), RunDir(tmp_path / "run")
    after_step(1, kill)
    with pytest.raises(Killed):
        train(tree)
    Evaluations(test={"loss": 2.5}).write(run)
    assert train(tree, resume="auto") == "finished"
    assert Evaluations.read(run).end == 2


@pytest.mark.parametrize("bad", [1, 3])
def test_an_evaluation_that_is_no_number_is_never_the_best(tiny, tmp_path, monkeypatch, bad):
    """fp16 products may overflow on a held-out text. The first is not kept, the last is read."""
    evaluate, calls = Evaluator.evaluate, []

    def overflow(self: Evaluator) -> Any:
        results, answers = evaluate(self)
        calls.append(results)
        return ({**results, "loss": math.nan} if len(calls) == bad else results), answers

    monkeypatch.setattr(Evaluator, "evaluate", overflow)
    tree = tiny(training={"max_steps": 3}, evaluation={"every": 1})
    assert train(tree) == "finished"
    best = read_run(tmp_path / "run").best
    assert best is not None
    assert best.step != bad
    assert math.isfinite(best.metrics["loss"])
    assert train(tree, resume="auto") == "finished"


class Shampoo(torch.optim.Optimizer):
    """Shampoo (https://arxiv.org/abs/1802.09568): its state has the form of no parameter."""

    def __init__(self, params: Any, lr: float = 1e-3, eps: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state, update = self.state[weight], weight.grad
                if not state:
                    state["factors"] = [group["eps"] * torch.eye(size) for size in weight.shape]
                    state["seen"] = {"steps": 0, "traces": torch.zeros(1 + weight.ndim)}
                for side, factor in enumerate(state["factors"]):
                    rows = weight.grad.movedim(side, 0).reshape(len(factor), -1)
                    factor.addmm_(rows, rows.T)
                    values, vectors = torch.linalg.eigh(factor)
                    powers = values.clamp(min=group["eps"]) ** (-1 / (2 * weight.ndim))
                    root = (vectors * powers) @ vectors.T
                    update = torch.tensordot(root, update, ([1], [side])).movedim(0, side)
                    state["seen"]["traces"][side] = factor.trace()
                state["seen"]["steps"] += 1
                weight.sub_(update, alpha=group["lr"])


def test_a_state_that_has_the_form_of_no_parameter_is_resumed(
    tiny, tmp_path, after_step, monkeypatch
):
    for names in ("_BY_NAME", "_BY_SPELLING"):  # it is registered for this test alone
        monkeypatch.setattr(registry, names, dict(getattr(registry, names)))
    registry.register_optimizer("shampoo", Shampoo, what="Shampoo", paper="", state_bytes=8)
    tree = tiny(
        optimizer={"name": "shampoo", "lr": 0.01},
        checkpoint={"every": 2},
        evaluation={"every": 2},
    )
    assert train({**tree, "output_dir": str(tmp_path / "whole")}) == "finished"
    after_step(5, kill)
    with pytest.raises(Killed):
        train(tree)
    assert train(tree, resume="auto") == "finished"
    losses, right = ([step.loss for step in steps_of(tmp_path / name)] for name in ("run", "whole"))
    assert losses == pytest.approx(right, rel=1e-5)
    assert len(losses) == 6
