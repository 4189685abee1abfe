"""FSDP2 over gloo on the CPU, where no process has a whole parameter; and what is refused."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from finetune.config.loading import load_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.recipes.export.export import export_target
from finetune.recipes.train.train import run_training
from finetune.training.checkpoint import CheckpointStore, load
from tests.conftest import LLAMA, PYTHIA, conversation
from tests.distributed import engine_worker
from tests.distributed.processes import free_ports, run_forked


def write(folder: Path, name: str, **sections) -> None:
    tree = {
        "data": {"train": "chat.jsonl", "validation": "held.jsonl", "max_length": 64},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "no_decay": []},
        "training": {
            "max_steps": 8,
            "batch_size": 4,
            "micro_batch_size": 1,
            "timeout": 60,
            "precision": "fp32",
        },
        "checkpoint": {"every": 3, "keep": 4},
        "evaluation": {"every": 4, "samples": 1},  # one prompt: process 0 has none to answer
        "generation": {"max_new_tokens": 4},
        **sections,
    }
    (folder / name).write_text(yaml.safe_dump(tree))


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record.get("loss", record.get("evaluation", {}).get("loss")) for record in records(run)]


def alone(*overrides: str, config: str = "lazy.yaml", resume: str | None = None) -> None:
    assert (
        run_training(
            load_config(Path(config), overrides), resume=resume, display=Display(enabled=False)
        )
        == "finished"
    )


def write_inputs(folder: Path) -> Path:
    """Write conversations, lazy.yaml, auto.yaml and tied.yaml to `folder`."""
    (folder / "chat.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(48))
    )
    (folder / "held.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(100, 106))
    )
    write(
        folder,
        "lazy.yaml",
        model={"config": {**PYTHIA, "hidden_dropout": 0.0}, "tokenizer": {"vocab_size": 300}},
    )
    write(
        folder,
        "auto.yaml",
        model={"config": {**PYTHIA, "hidden_dropout": 0.0}, "tokenizer": {"vocab_size": 300}},
        optimizer={"lr": 3e-3, "name": "adamw", "weight_decay": 0.1, "no_decay": []},
        scheduler={"name": "constant"},
    )
    active = {"optimizer": {"lr": 3e-3, "name": "adamw"}, "vocabulary": {"mode": "active"}}
    write(folder, "tied.yaml", model={"config": LLAMA, "tokenizer": {"vocab_size": 300}}, **active)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Train on two processes under FSDP2, and the same on one: lazy/ and lazy1/, tied/ and tied1/.

    half/ and auto/ are begun by one. host0/, host1/ and full/ cannot be saved. killed/ is killed
    while it saves, and goes on with three processes. tied.yaml has an active vocabulary: the head
    has a table of few rows, and a frozen one.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        pytest.skip(f"FSDP2 needs torch 2.13 or later here, and this is {torch.__version__}")
    folder = write_inputs(tmp_path_factory.mktemp("fsdp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        alone("output_dir=lazy1")
        alone("output_dir=tied1", config="tied.yaml")
        alone("output_dir=half", "training.max_steps=4", "scheduler.name=constant")
        alone("output_dir=auto1", config="auto.yaml")
        alone("output_dir=auto", "training.max_steps=4", config="auto.yaml")
    assert under_fsdp2("begin", folder, 2)[1] == -signal.SIGKILL, (
        folder / "begin1.log"
    ).read_text()
    assert (folder / "refused0.json").exists(), (folder / "begin0.log").read_text()
    assert under_fsdp2("go_on", folder, 3) == [0, 0, 0], (folder / "go_on0.log").read_text()
    return folder


def under_fsdp2(work: str, folder: Path, num_processes: int) -> list[int | None]:
    """Let so many processes do their work; returns their exit codes."""
    (port,) = free_ports(1)
    return run_forked(
        engine_worker, [(work, folder, rank, num_processes, port) for rank in range(num_processes)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lazy", "tied"])
def test_fsdp2_trains_as_one_process_does(folder, name):
    ours, theirs = losses(folder / name), losses(folder / f"{name}1")
    assert len(ours) == 8 + 3  # steps and evaluations
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert (folder / name / "samples.jsonl").read_text() == (
        folder / f"{name}1" / "samples.jsonl"
    ).read_text()


@pytest.mark.slow
def test_all_is_sharded_but_the_lazy_table(folder):
    lazy, tied = (torch.load(folder / name / "shards.pt") for name in ("lazy", "tied"))
    whole = [name for name, share in lazy.items() if share == 1.0]
    assert whole == ["model.gpt_neox.embed_in.weight"]
    assert all(share < 1 for share in tied.values())
    assert len(tied) > 10
    notes = json.loads((folder / "lazy" / "environment.json").read_text())["notes"]
    assert any(
        note.startswith(
            "engine: FSDP2 shards the model over 2 processes; the lazily trained embedding"
        )
        for note in notes
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lazy", "tied"])
def test_each_process_writes_its_shards_and_the_checkpoint_reads_as_that_of_one(folder, name):
    checkpoints = [folder / run / "checkpoints" / "step-00000006" for run in (name, f"{name}1")]
    shards = {path.name: path.stat().st_size for path in (checkpoints[0] / "shards").iterdir()}
    assert shards.keys() == {"__0_0.distcp", "__1_0.distcp", ".metadata"}
    assert {f"shards/{file}": size for file, size in shards.items()}.items() <= marked(
        checkpoints[0]
    ).items()
    assert shards["__0_0.distcp"] == pytest.approx(shards["__1_0.distcp"], rel=0.2)
    assert marked(checkpoints[1]).keys() == {"model.pt", "optimizer.pt", "training.pt"}
    for file in marked(checkpoints[1]):
        same_shape(*(load(checkpoint, file) for checkpoint in checkpoints), file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lazy", "tied"])
def test_the_model_loads_and_so_does_one_exported_from_a_checkpoint(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    export_target(
        Path(name),
        Path(f"{name}-8"),
        dtype="float32",
        checkpoint=Path(name, "checkpoints", "step-00000008"),
    )
    expected = AutoModelForCausalLM.from_pretrained(folder / f"{name}1" / "model").state_dict()
    for path in (folder / name / "model", folder / f"{name}-8"):
        ours = AutoModelForCausalLM.from_pretrained(path).state_dict()
        assert ours.keys() == expected.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_run_goes_from_one_process_to_fsdp2_and_back(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [record["step"] for record in records(folder / "half") if "loss" in record] == list(
        range(1, 9)
    )
    for name in ("lazy", "lazy1"):
        alone(
            f"output_dir={name}-10",
            "training.max_steps=10",
            resume=f"{name}/checkpoints/step-00000006",
        )
    assert len(losses(folder / "lazy-10")) == 4 + 2
    assert losses(folder / "lazy-10") == pytest.approx(losses(folder / "lazy1-10"), abs=1e-5)


@pytest.mark.slow
def test_adamw_begun_on_the_lazy_path_goes_on_densely_over_shards(folder):
    """One process steps the table's rows lazily. FSDP2 shards the table, with its missed steps."""
    notes = json.loads((folder / "auto1" / "environment.json").read_text())["notes"]
    assert any("adamw computes only the rows in use" in note for note in notes)
    assert losses(folder / "auto") == pytest.approx(losses(folder / "auto1"), abs=1e-5)
    assert all(share < 1 for share in torch.load(folder / "auto" / "shards.pt").values())


@pytest.mark.slow
def test_what_one_process_could_not_write_no_process_takes_for_saved(folder):
    first, second = (json.loads((folder / f"refused{rank}.json").read_text()) for rank in (0, 1))
    assert (
        "does not see it (output_dir must be on a disk that all hosts share); there is no earlier"
        in first[0]
    )
    assert second[0] == first[0].replace("host0", "host1")
    assert first[1] == second[1]
    assert re.match(
        "the checkpoint of step 3 could not be written to full/checkpoints: File too large; there",
        first[1],
    )
    assert not list((folder / "full" / "checkpoints").iterdir())


@pytest.mark.slow
def test_what_would_change_a_sharded_table_between_steps_is_refused(folder):
    for rank in (0, 1):
        sampled, stream = json.loads((folder / f"refused{rank}.json").read_text())[2:]
        assert sampled.startswith(
            "vocabulary.mode is sampled, but FSDP2 shards the rows to draw from. Set vocabulary"
        )
        assert stream.startswith(
            "vocabulary.mode is active, but later tokens of a stream get rows of the table, and "
            "FSDP2 shards it"
        )
    assert not (folder / "sampled").exists()
    assert not (folder / "stream").exists()


@pytest.mark.slow
def test_a_run_killed_in_mid_save_goes_on_with_another_number_of_processes(folder):
    left = json.loads((folder / "left.json").read_text())
    assert left == [
        ".step-00000006",
        "step-00000003",
        "step-00000004",
    ]  # the best evaluation so far is saved besides
    assert len(losses(folder / "killed")) == 8 + 3
    assert losses(folder / "killed") == pytest.approx(losses(folder / "lazy1"), abs=1e-5)
    last = CheckpointStore(folder / "killed" / "checkpoints", keep=4).path(8)
    assert {path.name for path in (last / "shards").glob("*.distcp")} == {
        f"__{rank}_0.distcp" for rank in range(3)
    }


def marked(checkpoint: Path) -> dict[str, int]:
    """Return the files that the mark lists, with their sizes in bytes."""
    files = json.loads((checkpoint / "complete.json").read_text())["files"]
    return {name: file["bytes"] for name, file in files.items()}


def same_shape(ours, theirs, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            same_shape(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, torch.Tensor):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), where


def test_deepspeed_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(write_inputs(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as `accelerate launch` sets it
    with pytest.raises(
        UserError, match=r"DeepSpeed is not supported.*configs/accelerate/fsdp2.yaml"
    ):
        alone("output_dir=never")
    assert not Path("never").exists()
