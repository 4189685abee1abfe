"""Row gradients over real processes (gloo, loopback): the same bits, and the run of one process.

Two and three processes are started once each and do everything (row_worker.py). The tests look at
what they left.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.distributed import RowGradients
from finetune.optim import LazyAdamW
from tests.conftest import LLAMA, PYTHIA, conversation
from tests.distributed import row_worker
from tests.distributed.processes import free_ports, run_forked

NUM_STEPS, CHECKPOINT = 24, 18
Launched = tuple[Path, list[dict[str, Any]]]  # the folder of the runs, and what each process found


def start(
    folder: Path, num_processes: int, runs: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> Launched:
    """Let so many processes do everything, the runs included.

    The runs are name -> (config tree, options of run_training).
    """
    *ports, port = free_ports(len(runs) + 1)
    plan = [
        row_worker.Run(name, tree, options, port)
        for port, (name, (tree, options)) in zip(ports, runs.items())
    ]
    exit_codes = run_forked(
        row_worker, [(folder, rank, num_processes, plan, port) for rank in range(num_processes)]
    )
    logs = (folder / f"rank{rank}.log" for rank in range(num_processes))
    assert exit_codes == [0] * num_processes, "\n".join(log.read_text() for log in logs)
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in range(num_processes)]


def lazy_tree(data: Path, output_dir: Path) -> dict[str, Any]:
    """Untied, stepped lazily, clipped.

    Steps of four sequences in micro-batches of one; the last step of an epoch has one.
    """
    return {
        "output_dir": str(output_dir),
        "model": {"config": {**PYTHIA, "hidden_dropout": 0.0}, "tokenizer": {"vocab_size": 400}},
        "data": {
            "train": str(data / "train.jsonl"),
            "validation": str(data / "held.jsonl"),
            "max_length": 64,
            "packing": False,
        },
        "optimizer": {"name": "lazy_adamw", "lr": 3e-3, "weight_decay": 0.1, "no_decay": []},
        "training": {
            "max_steps": NUM_STEPS,
            "batch_size": 4,
            "micro_batch_size": 1,
            "max_grad_norm": 0.5,
            "precision": "fp32",
        },
        "checkpoint": {"every": CHECKPOINT, "keep": 9},
        "evaluation": {"samples": 0, "generate": 0, "before": False, "every": 6, "batch_size": 2},
    }


def tied_tree(data: Path, output_dir: Path) -> dict[str, Any]:
    """The same with a table that has a dense gradient."""
    tree = lazy_tree(data, output_dir)
    return {
        **tree,
        "model": {"config": LLAMA, "tokenizer": {"vocab_size": 400}},
        "training": {"max_steps": 8, "batch_size": 4, "precision": "fp32"},
    }


def before_the_end(run: Path, copy: Path) -> Path:
    """A copy of a finished run as it was when the checkpoint to resume from was its newest."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name > f"step-{CHECKPOINT:08d}":
            shutil.rmtree(checkpoint)
    return copy


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Launched]:
    """By the number of processes. The run `resumed` continues a checkpoint of another number."""
    data = tmp_path_factory.mktemp("data")
    (data / "train.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(21))
    )
    (data / "held.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(100, 107))
    )
    folders = {n: tmp_path_factory.mktemp(f"processes{n}") for n in (1, 2, 3)}
    results: dict[int, Launched] = {}
    for n, folder in folders.items():
        runs: dict[str, Any] = {
            "lazy": (lazy_tree(data, folder / "lazy"), {}),
            "tied": (tied_tree(data, folder / "tied"), {}),
        }
        if n > 1:
            resumed = before_the_end(folders[n - 1] / "lazy", folder / "resumed")
            runs["resumed"] = (lazy_tree(data, resumed), {"resume": "auto"})
            results[n] = start(folder, n, runs)
        else:
            for tree, options in runs.values():
                row_worker.run(tree, **options)
            results[n] = folder, []
    resumed = before_the_end(folders[3] / "lazy", folders[1] / "resumed")
    row_worker.run(lazy_tree(data, resumed), resume="auto")
    return results


@pytest.fixture(params=[2, 3])
def launched(request: pytest.FixtureRequest, found: dict[int, Launched]) -> Launched:
    return found[request.param]


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if (kind == "evaluation") == ("evaluation" in line)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", row_worker.USED)
def test_the_average_is_that_of_the_dense_gradients(
    launched: Launched, case: str, dtype: torch.dtype
) -> None:
    _, ranks = launched
    gradients = [row_worker.gradient(case, rank, len(ranks), dtype) for rank in range(len(ranks))]
    averages = [rank[str(dtype)][case] for rank in ranks]
    if all(gradient is None for gradient in gradients):
        assert averages == [None] * len(ranks)
        return
    sparse = [gradient for gradient in gradients if gradient is not None]
    dense = sum(gradient.double().to_dense() for gradient in sparse) / len(ranks)
    rounding = (
        1e-6 if dtype is torch.float32 else 2**-8
    )  # of the result alone: bfloat16 is summed in float32
    for is_coalesced, rows, values in averages:
        assert is_coalesced
        assert rows.tolist() == sorted(
            {row for gradient in sparse for row in gradient._indices()[0].tolist()}
        )
        assert values.dtype == dtype
        torch.testing.assert_close(values.double(), dense[rows], rtol=rounding, atol=1e-6)
        assert torch.equal(values, averages[0][2])


@pytest.mark.slow
def test_tables_begin_as_those_of_process_0(launched: Launched) -> None:
    _, ranks = launched
    torch.manual_seed(0)
    expected = torch.nn.Embedding(row_worker.VOCABULARY, row_worker.WIDTH).weight
    assert all(torch.equal(rank["torch.float32"]["weight"], expected) for rank in ranks)


@pytest.mark.slow
def test_turning_dense_is_said_once(found: dict[int, Launched]) -> None:
    for n, expected in (
        (2, []),
        (3, ["3 processes used up to 5 rows each, 5 together, of an embedding's 50"]),
    ):
        said = [rank["torch.float32"]["said"] for rank in found[n][1]]
        assert all(len(lines) == len(expected) for lines in said), said
        assert all(text in line for lines in said for text, line in zip(expected, lines)), said


@pytest.mark.slow
def test_200_steps_leave_the_same_bits_on_every_process(launched: Launched) -> None:
    _, ranks = launched
    digests = [rank["digests"]["classifier"] for rank in ranks]
    assert len(digests[0]) == 200 == len({weights for weights, _ in digests[0]})
    assert all(steps == digests[0] for steps in digests)


@pytest.mark.slow
def test_200_steps_are_those_of_dense_adamw_in_one_process(launched: Launched) -> None:
    _, ranks = launched
    model, norms = row_worker.train_classifier(range(len(ranks)), len(ranks), torch.optim.AdamW)
    assert max(norms) > 0.3 > min(norms), "some steps are clipped"
    assert ranks[0]["norms"] == pytest.approx(norms, rel=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ranks[0]["classifier"][name], value, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "num_steps"), [("lazy", NUM_STEPS), ("tied", 8), ("resumed", NUM_STEPS - CHECKPOINT)]
)
def test_a_run_leaves_the_same_bits_on_every_process(
    launched: Launched, run: str, num_steps: int
) -> None:
    _, ranks = launched
    digests = [rank["digests"][run] for rank in ranks]
    assert len(digests[0]) == num_steps
    assert all(steps == digests[0] for steps in digests)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["lazy", "tied", "resumed"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_any_number_of_processes_trains_what_one_does(
    found: dict[int, Launched], n: int, run: str
) -> None:
    """Loss, tokens and gradient norm of each step, and the evaluations, resumed or not."""
    one, many = found[1][0] / ("tied" if run == "tied" else "lazy"), found[n][0] / run
    expected, steps = records(one, "step"), records(many, "step")
    assert [step["step"] for step in steps] == list(range(1, len(expected) + 1))
    assert expected[-1]["loss"] < expected[0]["loss"]
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in steps] == pytest.approx(
            [step[key] for step in expected], abs=1e-4
        )
    for key in ("num_target_tokens", "num_tokens", "epoch", "lr"):
        assert [step[key] for step in steps] == [step[key] for step in expected]
    evaluations = [
        [line["evaluation"] for line in records(folder, "evaluation")] for folder in (one, many)
    ]
    assert len(evaluations[0]) == len(evaluations[1]) >= 2
    for of_one, of_many in zip(*evaluations):
        assert of_many["loss"] == pytest.approx(of_one["loss"], abs=1e-5)
        assert all(of_many[key] == of_one[key] for key in ("num_target_tokens", "num_target_bytes"))


def test_one_process_sends_nothing() -> None:
    table = torch.nn.Embedding(5, 4)
    optimizer = LazyAdamW(table.parameters(), embeddings=[table])
    table(torch.tensor([1, 1])).sum().backward()
    grad = table.weight.grad
    RowGradients(optimizer, say=pytest.fail).average()
    assert table.weight.grad is grad
