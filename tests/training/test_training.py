"""Whole runs of a tiny model: what they leave, how a step may be cut, and how they end."""

import io
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.config.loading import make_config
from finetune.data.batches.steps import StepBatch
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.runs import print_runs
from finetune.recipes.train.train import run_training
from finetune.run.folder import checkpoint_path
from finetune.training.checkpoint import CheckpointStore, load
from finetune.training.step import take_step
from tests.conftest import LLAMA, PYTHIA, conversation


def train(tree, **options):
    return run_training(make_config(tree), display=Display(enabled=False), **options)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line]


def test_a_run_leaves_a_complete_folder(tiny, tmp_path):
    tree = tiny(evaluation={"before": True, "every": 3, "samples": 2})
    assert train(tree) == "finished"
    run = tmp_path / "run"
    steps = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert {
        "loss",
        "lr",
        "grad_norm",
        "num_target_tokens",
        "tokens_per_second",
        "seconds",
    } <= steps[0].keys()
    assert steps[0]["lr"] > 0
    evaluations = {
        line["step"]: line["evaluation"]["loss"]
        for line in lines(run / "metrics.jsonl")
        if "evaluation" in line
    }
    assert sorted(evaluations) == [0, 3, 6]
    assert evaluations[6] < evaluations[0]
    summary = json.loads((run / "evaluation.json").read_text())
    assert summary["before"]["loss"] == evaluations[0]
    assert summary["after"]["loss"] == evaluations[6]
    assert {line["step"] for line in lines(run / "samples.jsonl")} == {0, 3, 6}
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"].startswith("2.")
    assert json.loads((run / "data.json").read_text())["train"]["records"] == 43
    assert (run / "report.html").stat().st_size > 10_000
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tokenizer.decode(model.generation_config.eos_token_id) == "<|im_end|>"


PAIRS = {
    "train": {"path": "package:translation.en-fr.train", "max_records": 12},
    "validation": {"path": "package:translation.en-fr.test", "max_records": 3},
    "max_length": 128,
}


@pytest.mark.parametrize("samples", [0, 2])
def test_a_translation_run_without_metrics_of_generated_text(tiny, tmp_path, samples):
    """`evaluation.generate: 0` leaves chrF and BLEU out, and the samples are another setting."""
    evaluation = {"generate": 0, "samples": samples, "before": False}
    assert train(tiny(data=PAIRS, evaluation=evaluation, training={"max_steps": 1})) == "finished"
    after = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]
    assert "loss" in after
    assert not {"chrf", "bleu"} & after.keys()
    written = tmp_path / "run" / "samples.jsonl"
    assert len(lines(written) if written.is_file() else []) == samples


def test_bf16_products_follow_fp32_ones_in_one_process(tiny, tmp_path):
    """Weights, state and export stay float32, for any precision of an earlier run."""
    found = []
    for number, precision in enumerate(("fp32", "bf16", "fp32")):
        train(tiny(output_dir=str(tmp_path / str(number)), training={"precision": precision}))
        found.append(losses(tmp_path / str(number)))
    assert found[2] == found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=2e-3)
    state = CheckpointStore(tmp_path / "1" / "checkpoints", keep=1).newest()
    moments = load(state, "optimizer.pt")["state"].values()
    assert {value.dtype for entry in moments for value in entry.values()} == {torch.float32}
    exported = load_file(tmp_path / "1" / "model" / "model.safetensors")
    assert {value.dtype for value in exported.values()} == {torch.float32}


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_is_the_same_however_it_is_cut(tiny, tmp_path, packing):
    """1 x 8 = 8 x 1 = 2 x 4 rows, though rows differ in their number of target tokens."""
    found = {}
    for size in (8, 1, 4):
        tree = tiny(
            data={"packing": packing, "max_length": 48},
            training={"batch_size": 8, "micro_batch_size": size, "max_steps": 4},
        )
        train(
            {
                **tree,
                "output_dir": str(tmp_path / f"run{size}"),
                "optimizer": {"name": "sgd", "lr": 0.5, "weight_decay": 0.0},
            }
        )
        found[size] = losses(tmp_path / f"run{size}")
    assert found[1] == pytest.approx(found[8], abs=2e-6)
    assert found[4] == pytest.approx(found[8], abs=2e-6)
    assert all(len(values) == 4 and values[-1] < values[0] for values in found.values())


@pytest.mark.parametrize("name", ["adamw", pytest.param("adam", marks=pytest.mark.slow)])
def test_lazy_and_dense_train_the_same_untied_model(tiny, tmp_path, name):
    """A run says which it is. A checkpoint of either resumes in the other."""
    decay = {"weight_decay": 0.1} if name == "adamw" else {}
    runs: dict[bool, dict] = {}
    for lazy in ("auto", False):
        runs[lazy == "auto"] = tiny(
            model={"config": PYTHIA},
            optimizer={"name": name, "lazy": lazy, "no_decay": [], **decay},
            training={"max_steps": 12},
            checkpoint={"every": 6, "keep": 3},
            output_dir=str(tmp_path / str(lazy == "auto")),
        )
    for lazy, tree in runs.items():
        messages = io.StringIO()
        display = Display(enabled=True, console=Console(file=messages, width=500))
        assert run_training(make_config(tree), display=display) == "finished"
        line = "only the rows in use of" if lazy else "optimizer.lazy is false"
        assert f"optimizer: {name} computes" in messages.getvalue()
        assert line in messages.getvalue()
    weights = {}
    for lazy in runs:
        early = tmp_path / str(lazy) / "checkpoints" / "step-00000006"
        crossed = {**runs[not lazy], "output_dir": str(tmp_path / f"from {lazy}")}
        assert train(crossed, resume=str(early)) == "finished"
        weights[lazy] = load_file(tmp_path / f"from {lazy}" / "model" / "model.safetensors")
        assert losses(tmp_path / f"from {lazy}") == pytest.approx(
            losses(tmp_path / "False")[6:], abs=1e-5
        )
        weights[str(lazy)] = load_file(tmp_path / str(lazy) / "model" / "model.safetensors")
    for found in weights.values():
        for key, value in found.items():
            assert (value - weights["False"][key]).abs().max() < 1e-5


def test_early_stopping_keeps_the_best_model(tiny, tmp_path, capsys):
    """And all that speaks of the run has the figures of the model that it left."""
    tree = tiny(
        training={"max_steps": 40},
        evaluation={"before": True, "samples": 2, "every": 2, "early_stopping_patience": 2},
        optimizer={"lr": 0.1, "name": "adamw"},
    )
    tree["training"]["divergence_threshold"] = 1e9
    assert run_training(make_config(tree), display=Display()) == "early stopping"
    run = tmp_path / "run"
    summary = json.loads((run / "evaluation.json").read_text())
    best, last = summary["best"], summary["last_step"]
    assert best["step"] < last < 40
    assert (run / "checkpoints" / f"step-{best['step']:08d}").is_dir()
    assert summary["after"] == best
    said = capsys.readouterr().err
    assert f"held-out after:  loss {best['loss']:.3f}" in said
    assert f"(step {best['step']}, the best, in model/)" in said
    report = (run / "report.html").read_text()
    assert f"By step {best['step']} of {last}, the best, the held-out loss" in report
    assert f"After {best['step']} steps" in report
    assert f"After {last} steps" not in report
    print_runs(tmp_path)
    assert f"{best['loss']:.3f}" in capsys.readouterr().out


def test_a_nan_stops_the_run_and_saves_the_batch(tiny, tmp_path):
    broken = {**LLAMA, "model_type": "granite", "logits_scaling": 1e-40}
    tree = tiny(model={"config": broken}, data={"packing": False})
    with pytest.raises(
        UserError, match=r"training stopped at step \d: the (loss|gradient norm) is (nan|inf)"
    ):
        train(tree)
    saved = torch.load(tmp_path / "run" / "bad_batch.pt")
    assert saved["micro_batches"][0]["input_ids"].ndim == 2


def test_a_nan_is_told_where_the_disk_has_no_room_for_the_batch(tiny, tmp_path):
    broken = {**LLAMA, "model_type": "granite", "logits_scaling": 1e-40}
    tree = tiny(model={"config": broken}, data={"packing": False})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".bad_batch.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(
        UserError,
        match=r"is (nan|inf).*; the batch is lost \(.*bad_batch.pt could not be written: No space",
    ):
        train(tree)


def test_a_diverging_loss_stops_the_run(tiny):
    tree = tiny(
        optimizer={"name": "sgd", "lr": 300.0, "weight_decay": 0.0},
        training={"max_steps": 60, "divergence_threshold": 1.0},
    )
    with pytest.raises(UserError, match=r"at step \d+: the loss (is \d|rose to)"):
        train(tree)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_leaves_a_run_that_resumes(tiny, tmp_path, monkeypatch, number):
    if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup, which makes a run ignore this signal")
    tree = tiny(training={"max_steps": 5})
    train({**tree, "output_dir": str(tmp_path / "whole")})
    from finetune.run.log import MetricLogger

    log = MetricLogger.log

    def log_and_terminate(self, record):
        log(self, record)
        if record.step == 2:
            for _ in range(2 if number == signal.SIGHUP else 1):  # the kernel's and the shell's
                os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricLogger, "log", log_and_terminate)
    assert train(tree) == "signal"
    monkeypatch.undo()
    assert len(losses(tmp_path / "run")) == 3  # the step in progress is finished
    assert train(tree, resume="auto") == "finished"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_folder_with_another_run_is_refused_or_replaced(tiny, tmp_path):
    train(tiny(training={"max_steps": 1}))
    with pytest.raises(UserError, match=r"holds a run already\. Continue it with --resume auto"):
        train(tiny())
    train({**tiny(training={"max_steps": 2}), "overwrite_output_dir": True})
    assert len(losses(tmp_path / "run")) == 2


def test_a_dry_run_writes_nothing(tiny, tmp_path, capsys):
    train(tiny(), dry_run=True)
    assert "max_grad_norm: 1.0" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_resuming_with_changed_model_or_data_is_refused(tiny, tmp_path, chat_file):
    train(tiny(training={"max_steps": 1}))
    with pytest.raises(UserError, match="the model changed"):
        train(tiny(model={"config": {**PYTHIA}}), resume="auto")
    with pytest.raises(UserError, match=r"training.batch_size changed \(then 4, now 2\)"):
        train(tiny(training={"batch_size": 2}), resume="auto")
    with chat_file.open("a") as file:
        file.write(chat_file.read_text().splitlines()[3] + "\n")
    with pytest.raises(UserError, match=r"the training data changed|the model changed"):
        train(tiny(), resume="auto")


@pytest.mark.parametrize("name", ["adamw", "lazy_adamw", "sgd"])
def test_a_resumed_run_takes_the_options_it_is_given_now(tiny, tmp_path, name):
    """lr, decay and the schedule are this run's; where nothing changed, nothing does."""
    model = {"config": PYTHIA} if name == "lazy_adamw" else {}
    old = {"name": name, "lr": 1e-3, "weight_decay": 0.0}
    tree = tiny(
        model=model,
        optimizer=old,
        training={"max_steps": 4},
        scheduler={"name": "linear", "warmup_steps": 0},
    )
    train(tree)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    changed = {
        **tree,
        "training": {**tree["training"], "max_steps": 8},
        "optimizer": {**old, "lr": 4e-4, "weight_decay": 0.5},
    }
    train(changed, resume="auto")
    steps = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [step["lr"] for step in steps[4:]] == pytest.approx(
        [4e-4 * (8 - n) / 8 for n in range(4, 8)]
    )
    groups = load(CheckpointStore(checkpoint.parent, keep=1).newest(), "optimizer.pt")[
        "param_groups"
    ]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}


def test_a_resume_that_is_refused_leaves_the_records_alone(tiny, tmp_path):
    train(tiny(training={"max_steps": 1}))
    before = {
        path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()
    }
    with pytest.raises(UserError, match="parameter groups of"):
        train(tiny(optimizer={"no_decay": []}), resume="auto")
    assert {
        path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()
    } == before


def test_a_run_that_goes_back_to_an_earlier_checkpoint_ends_with_its_own(tiny, tmp_path):
    tree = tiny(
        training={"max_steps": 6}, checkpoint={"every": 1, "keep": 6}, evaluation={"every": 2}
    )
    train(tree)
    whole, run = losses(tmp_path / "run"), tmp_path / "run"
    early = run / "checkpoints" / "step-00000003"
    shutil.rmtree(run / "checkpoints" / "step-00000002")  # the best evaluation of that time
    assert train(tree, resume=str(early)) == "finished"
    assert losses(run) == whole
    assert CheckpointStore(run / "checkpoints", keep=1).steps() == [1, 3, 4, 5, 6]


def test_a_run_may_begin_from_a_checkpoint_of_another_folder_but_not_over_another_run(
    tiny, tmp_path
):
    tree = tiny(
        training={"max_steps": 4}, checkpoint={"every": 1, "keep": 4}, evaluation={"every": 2}
    )
    train(tree)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert (
        train({**tree, "output_dir": str(tmp_path / "fork")}, resume=str(checkpoint)) == "finished"
    )
    assert losses(tmp_path / "fork") == losses(tmp_path / "run")[2:]
    train({**tree, "output_dir": str(tmp_path / "third"), "seed": 1})
    kept = (tmp_path / "third" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="holds a run already"):
        train({**tree, "output_dir": str(tmp_path / "third")}, resume=str(checkpoint))
    assert (tmp_path / "third" / "metrics.jsonl").read_text() == kept


def test_a_resumed_run_keeps_the_command_it_was_started_with(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["finetune", "train", "c.yaml"])
    train(tiny(training={"max_steps": 1}))
    monkeypatch.setattr("sys.argv", ["finetune", "train", "c.yaml", "--resume", "auto"])
    train(tiny(training={"max_steps": 2}), resume="auto")
    assert (
        json.loads((tmp_path / "run" / "environment.json").read_text())["command"]
        == "finetune train c.yaml"
    )


def test_a_stream_is_counted_as_it_was_read(tiny, tmp_path, chat_file):
    with chat_file.open("a") as file:
        long = {"role": "user", "content": " ".join(map(str, range(100)))}
        file.write(
            json.dumps({"messages": [long, {"role": "assistant", "content": "So many."}]}) + "\n"
        )
    train(tiny(data={"streaming": True, "validation_fraction": 0.0, "overlong": "drop"}))
    counts = json.loads((tmp_path / "run" / "data.json").read_text())["train"]
    assert counts["records"] == counts["examples"] + counts["dropped"] >= 49
    assert counts["dropped"] > 0
    notes = json.loads((tmp_path / "run" / "environment.json").read_text())["notes"]
    assert any(f"{counts['dropped']} were dropped" in note for note in notes)


def test_a_stream_is_evaluated_and_saved_after_each_tenth(tiny, tmp_path, chat_file):
    """It has no epochs, and its end may be far."""
    data = {"streaming": True, "validation": str(chat_file), "validation_fraction": 0.0}
    config = make_config(tiny(data=data, training={"max_steps": 25}, checkpoint={"keep": 99}))
    display = Display(enabled=False)
    assert run_training(config, display=display) == "finished"
    tenths = [*range(3, 25, 3), 25]
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in found if "evaluation" in line] == tenths
    assert CheckpointStore(tmp_path / "run" / "checkpoints", keep=1).steps() == tenths
    (note,) = [note for note in display.notes if note.startswith("evaluation.every is not set")]
    assert note.endswith("is evaluated and saved after each tenth of it (3 steps)")


def test_a_bad_record_of_a_stream_costs_no_step(tiny, tmp_path, chat_file, monkeypatch, capsys):
    for name in ("STREAM_SAMPLE", "TOKENIZER_RECORDS"):  # it is not among the first ones
        monkeypatch.setattr(f"finetune.recipes.build.data.{name}", 8)
    records = [json.dumps(conversation(number)) + "\n" for number in range(300)]
    chat_file.write_text("".join(records))
    tree = tiny(
        data={"streaming": True, "validation_fraction": 0.0, "shuffle_buffer": 8},
        training={"max_steps": 40},
        checkpoint={"every": 100},
    )
    train({**tree, "output_dir": str(tmp_path / "whole")})
    chat_file.write_text("".join([*records[:249], '{"messages": []}\n', *records[250:]]))
    for resume in (None, "auto"):  # nothing changes while the record is as it is
        with pytest.raises(UserError, match="line 250"):
            run_training(make_config(tree), display=Display(), resume=resume)
        done = len(losses(tmp_path / "run"))
        assert 5 < done < 40
        saved = checkpoint_path(tmp_path / "run" / "checkpoints", done)
        assert f"{saved} is saved. Once the data is mended, go on with" in capsys.readouterr().err
    chat_file.write_text("".join(records))
    assert train(tree, resume="auto") == "finished"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_what_is_odd_late_in_a_stream_is_said_at_its_end(tiny, tmp_path, chat_file, monkeypatch):
    for name in ("STREAM_SAMPLE", "TOKENIZER_RECORDS"):
        monkeypatch.setattr(f"finetune.recipes.build.data.{name}", 20)
    late = [conversation(24) | {"score": 3}, conversation(25), {"messages": []}]
    late[1]["messages"][0]["content"] = "What is <|im_end|>?"
    records = [*map(conversation, range(24)), *late]
    chat_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    display = Display(enabled=False)
    data = {"streaming": True, "validation_fraction": 0.0, "on_bad_record": "drop"}
    run_training(make_config(tiny(data=data)), display=display)
    notes = json.loads((tmp_path / "run" / "environment.json").read_text())["notes"]
    bad, unused, control = (note for note in notes if note.startswith("training: "))
    assert "chat.jsonl line 27: the conversation has no assistant turn" in bad
    assert "not used: the column 'score' (" in unused
    assert "a control token such as '<|im_end|>' in the text" in control


@pytest.mark.parametrize(("best", "step"), [("chrf", 2), ("loss", 1)])
def test_the_best_checkpoint_is_that_of_the_highest_chrf_or_the_lowest_loss(
    tiny, tmp_path, monkeypatch, best, step
):
    """Whatever the model does: the evaluations' values are given."""
    from finetune.recipes.train.evaluations import RunEvaluations

    evaluate = RunEvaluations.__call__
    values = {
        1: {"chrf": 10.0, "loss": 1.0},
        2: {"chrf": 30.0, "loss": 3.0},
        3: {"chrf": 20.0, "loss": 2.0},
    }
    monkeypatch.setattr(
        RunEvaluations, "__call__", lambda self, at: {**evaluate(self, at), **values[at]}
    )
    metrics = {"metrics": ["chrf"], "generate": 2}
    tree = tiny(
        training={"max_steps": 3},
        evaluation={"every": 1, "best": best, **metrics},
        generation={"max_new_tokens": 2},
    )
    train(tree)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["best"]["step"] == step


def test_trackers_get_the_numbers(tiny, tmp_path):
    train({**tiny(training={"max_steps": 2}), "tracking": ["tensorboard"]})
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_perplexity_is_that_of_the_loss(tiny, tmp_path):
    train(tiny(evaluation={"every": 6}))
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))


@pytest.mark.parametrize(
    "groups",
    [{}, {"layer_decay": 0.5}, {"overrides": [{"pattern": "*embed_tokens*", "lr": 1e-5}]}],
)
def test_the_rate_of_a_step_is_the_run_s_own_whatever_the_groups_have(tiny, tmp_path, groups):
    scheduler = {"name": "linear", "warmup_ratio": 0.0}
    train(tiny(optimizer=groups, scheduler=scheduler, training={"max_steps": 3}))
    steps = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [step["lr"] for step in steps] == pytest.approx([3e-3, 2e-3, 1e-3])


class Sum(torch.nn.Module):
    """The loss of a micro-batch is a weight times the sum of its numbers."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, numbers):
        return (self.weight * numbers).sum()


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_overflowed_is_seen_whatever_kernel_took_it(fused):
    """A fused kernel is called on an overflow too, and leaves the weights as they were."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's may hold a GPU
    accelerator, model = Accelerator(cpu=True), Sum()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    inner = torch.optim.AdamW(model.parameters(), fused=fused)
    optimizer = AcceleratedOptimizer(inner, scaler=accelerator.scaler)
    before, skipped = model.weight.detach().clone(), []
    for size in (1e38, 1.0):
        batch = StepBatch([{"numbers": torch.full((4,), size)}], 4, 4, 4, 1.0, [[[0]]])
        skipped.append(take_step(model, optimizer, batch, accelerator=accelerator).skipped)
        assert torch.equal(model.weight, before) == skipped[-1]
    assert skipped == [True, False]
