"""Two hosts on a network: two network namespaces, a cable between them, torchrun on each.

The cable is cut in mid-run. No process learns that a host is gone, so each waits `training.timeout`
for the other, and then ends. What was saved before resumes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from finetune.config.loading import load_config
from finetune.display import Display
from finetune.recipes.train.train import run_training
from tests.conftest import PYTHIA, conversation

ROOT = Path(__file__).parents[2]
TIMEOUT = 5  # seconds that a process waits for the other host
HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Yield the names of two namespaces, joined by a veth pair called `cable` at both ends."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command `ip` (iproute2)")
    names = {host: f"finetune-{host}-{os.getpid()}" for host in HOSTS}
    try:
        ip("netns", "add", names["a"])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the right to make network namespaces: {error.stderr.strip()}")
    try:
        ip("netns", "add", names["b"])
        ip(
            "-n",
            names["a"],
            "link",
            "add",
            "cable",
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names["b"],
        )
        for host, name in names.items():
            ip("-n", name, "addr", "add", f"{HOSTS[host]}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names.values():
            for pid in subprocess.run(
                ["ip", "netns", "pids", name], check=False, capture_output=True, text=True
            ).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(host: str, names: dict[str, str], folder: Path) -> subprocess.Popen:
    """The command of docs/scaling.md on one of two hosts, of one process each."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
    ]
    command += [
        "--node-rank",
        str(list(HOSTS).index(host)),
        "--master-addr",
        HOSTS["a"],
        "--master-port",
        "29500",
    ]
    command += [str(ROOT / "scripts" / "train.py"), "c.yaml", "output_dir=run", "--resume", "auto"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "PYTHONPATH": str(ROOT)}
    with (folder / f"{host}.log").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", names[host], *command],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def losses(run: Path) -> list[float]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def wait(
    condition: Callable[[], bool],
    seconds: float,
    processes: dict[str, subprocess.Popen],
    folder: Path,
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            for process in processes.values():
                process.kill()
                process.wait()
            pytest.fail("\n".join((folder / f"{host}.log").read_text()[-3000:] for host in HOSTS))
        time.sleep(0.05)


@pytest.mark.slow
def test_a_host_that_is_cut_off_ends_the_run_in_bounded_time_and_it_resumes(
    hosts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps(conversation(n)) + "\n" for n in range(48))
    )
    tree = {
        "model": {"config": {**PYTHIA, "hidden_dropout": 0.0}, "tokenizer": {"vocab_size": 300}},
        "data": {"train": "chat.jsonl", "validation_fraction": 0.1, "max_length": 64},
        "optimizer": {"lr": 3e-3},
        "scheduler": {"name": "constant", "warmup_ratio": 0.0},
        "training": {
            "max_steps": 100_000,
            "batch_size": 4,
            "micro_batch_size": 2,
            "timeout": TIMEOUT,
            "precision": "fp32",
        },
        "checkpoint": {"every": 2},
        "evaluation": {"every": 100_000, "samples": 0, "generate": 0, "before": False},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    run = tmp_path / "run"
    processes = {host: start(host, hosts, tmp_path) for host in HOSTS}
    wait(
        lambda: len(losses(run)) >= 4 or any(p.poll() is not None for p in processes.values()),
        120,
        processes,
        tmp_path,
    )
    assert all(process.poll() is None for process in processes.values()), (
        tmp_path / "a.log"
    ).read_text()
    ip("-n", hosts["b"], "link", "set", "cable", "down")
    wait(
        lambda: all(p.poll() is not None for p in processes.values()),
        TIMEOUT + 45,
        processes,
        tmp_path,
    )
    assert all(process.returncode != 0 for process in processes.values())
    for host, rank in (("a", 0), ("b", 1)):
        log = (tmp_path / f"{host}.log").read_text()
        assert "Timed out waiting 5000ms" in log
        assert f"rank      : {rank} (local_rank: 0)" in log  # torchrun's report names the process
    survived = max(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*"))
    config = load_config(Path("c.yaml"), ["output_dir=run", f"training.max_steps={survived + 2}"])
    assert run_training(config, resume="auto", display=Display(enabled=False)) == "finished"
    alone = load_config(
        Path("c.yaml"), ["output_dir=alone", f"training.max_steps={min(survived + 2, 12)}"]
    )
    run_training(alone, display=Display(enabled=False))
    assert len(losses(run)) == survived + 2
    assert losses(run)[:12] == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
