"""One process of the tests of FSDP2: all of its runs, in one start."""

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint  # imported once, by the server of the forks
import torch.distributed.fsdp
from accelerate import PartialState
from accelerate.state import AcceleratorState

from finetune.config.loading import load_config
from finetune.display import Display
from finetune.distributed import engines
from finetune.errors import UserError
from finetune.recipes.train import train as training
from finetune.training import checkpoint
from tests.distributed.processes import log_to

FSDP2 = {  # what `accelerate launch --config_file configs/accelerate/fsdp2.yaml` sets
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def run(config: str, *overrides: str, resume: str | None = None) -> None:
    """Train; how much of each parameter this process had is left in shards.pt."""
    shares = {}

    def prepare_and_look(*arguments: Any) -> Any:
        prepared = engines.prepare(*arguments)
        for name, parameter in prepared.module.named_parameters():
            shares[name] = (
                parameter.to_local().numel() / parameter.numel()
                if hasattr(parameter, "to_local")
                else 1.0
            )
        return prepared

    training.prepare = prepare_and_look
    settings = load_config(Path(config), overrides)
    try:
        assert (
            training.run_training(settings, resume=resume, display=Display(enabled=False))
            == "finished"
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    if os.environ["RANK"] == "0":
        torch.save(shares, settings.output_dir / "shards.pt")


def refused(*overrides: str) -> str:
    """What the run is stopped with."""
    try:
        run("lazy.yaml", *overrides)
    except UserError as error:
        return str(error)
    return "nothing"


def begin() -> None:
    """Do the runs of `test_engines.folder`.

    Process 1 meets a full disk in one of them, and dies while saving in the last.
    """
    rank = int(os.environ["RANK"])
    run("lazy.yaml", "output_dir=lazy")
    run("lazy.yaml", "output_dir=half", resume="auto")
    run("auto.yaml", "output_dir=auto", resume="auto")
    run("tied.yaml", "output_dir=tied")
    refusals = [refused(f"output_dir=host{rank}")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    refusals.append(refused("output_dir=full"))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refusals.append(
        refused("output_dir=sampled", "vocabulary.mode=sampled", "vocabulary.num_sampled=1")
    )
    refusals.append(refused("output_dir=stream", "vocabulary.mode=active", "data.streaming=true"))
    Path(f"refused{rank}.json").write_text(json.dumps(refusals))
    if rank == 1:
        checkpoint.write_shards = die_at_step_6
    run("lazy.yaml", "output_dir=killed")


def die_at_step_6(folder: Path, shards: Any, write: Any = checkpoint.write_shards) -> None:
    if folder.parent.name == ".step-00000006":
        folder.mkdir(exist_ok=True)
        (folder / "__1_0.distcp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, shards)


def go_on() -> None:
    """What was killed, to its end."""
    left = sorted(os.listdir("killed/checkpoints"))
    run("lazy.yaml", "output_dir=killed", resume="auto")
    Path("left.json").write_text(json.dumps(left))


def share() -> None:
    """The run of `test_sharing` under FSDP2."""
    run("shared.yaml", "output_dir=fsdp2")


def main(work: str, folder: Path, rank: int, num_processes: int, port: int) -> None:
    """`begin`, `go_on` or `share`, as process `rank` of so many."""
    os.chdir(folder)
    log_to(Path(f"{work}{rank}.log"))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        **FSDP2,
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    PartialState.destroy_process_group = lambda self, group=None: None  # the next run uses it
    {"begin": begin, "go_on": go_on, "share": share}[work]()
