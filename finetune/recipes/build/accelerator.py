"""The accelerator of a run: this process, its device, its precision, and the other processes."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from finetune.config import RunConfig
from finetune.display import Display
from finetune.distributed.engines import check_engine, settle_engine, waiting_time
from finetune.errors import UserError, did_you_mean
from finetune.models.speed import resolve_precision

TRACKING = "tracking"  # the folder of a run in which TensorBoard's files are


def make_accelerator(config: RunConfig, display: Display) -> Accelerator:
    """Return Accelerate's view of this process, in the precision that is fastest here.

    It is one process on the CPU or a GPU, or one of many. Raises UserError for a device, precision,
    tracker or engine that cannot be had.
    """
    device = resolve_device(config.training.device)
    precision, reason = resolve_precision(config.training.precision, device)
    check_trackers(config.tracking)
    check_engine()
    mixed_precision = "no" if precision == "fp32" else precision
    if AcceleratorState._shared_state:  # of an earlier run in this process
        state = AcceleratorState()
        moved = state.device.type != device
        if moved or state.mixed_precision != mixed_precision:
            AcceleratorState._reset_state(reset_partial_state=moved)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=device == "cpu",
        log_with=list(config.tracking) or None,
        project_config=ProjectConfiguration(
            project_dir=str(config.output_dir), logging_dir=str(config.output_dir / TRACKING)
        ),
        kwargs_handlers=[
            # no buffer changes while a language model trains
            DistributedDataParallelKwargs(broadcast_buffers=False),
            waiting_time(config.training.timeout),
        ],
    )
    display.heard = display.heard and accelerator.is_main_process
    settle_engine(accelerator, display)
    display.say(reason)
    return accelerator


def resolve_device(wanted: str) -> str:
    """Return the device that `training.device` means here: "cpu", "cuda" or "mps".

    A Mac's GPU is taken only if it is asked for. Raises UserError for one that is not there.
    """
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if wanted == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[wanted]:
        named = [name for name, found in there.items() if found]
        raise UserError(
            f"training.device is {wanted}, which torch does not find here; it finds "
            f"{', '.join(named)}. Set training.device=auto"
        )
    return wanted


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is unknown or not installed.

    Accelerate would leave it out silently.
    """
    known = list(LOGGER_TYPE_TO_CLASS)
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(
                f"tracking: there is no tracker {name!r}; known are {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
        if name not in installed:
            raise UserError(
                f"tracking: {name} is not installed. "
                f"Install it with: pip install {name.replace('_', '-')}"
            )
