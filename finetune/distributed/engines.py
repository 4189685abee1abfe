"""The engines of Accelerate that a run may use, and what each does with a lazily trained table.

The engine is one process, DDP or FSDP2, as `accelerate launch --config_file
configs/accelerate/….yaml` says. `docs/scaling.md` has a table of what works with what.

- DDP: every process has the whole model. Rows of the lazy table are exchanged (`row_gradients`).
- FSDP2 (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) shards everything
  but the lazy table, which would need a sparse reduce-scatter. The table stays whole on each
  process, and its rows are exchanged as under DDP.
- DeepSpeed is refused. Its ZeRO keeps parameters in flat buffers without rows, and shards the
  optimizer's state by them. So neither the lazy table nor a checkpoint that others can read
  survives. With an offloaded optimizer it also replaces the run's optimizer. FSDP2 shards the same
  things; `LOG.md` says what was tried.
"""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from finetune.display import Display
from finetune.distributed import RowGradients, keep_tables_out_of_ddp
from finetune.distributed.sharding import whole
from finetune.errors import UserError
from finetune.models.language_model import LanguageModel
from finetune.optim import LazyAdamW


def waiting_time(seconds: float) -> InitProcessGroupKwargs:
    """Return how long a process waits for another, for `Accelerator(kwargs_handlers=[...])`."""
    return InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))


def check_engine() -> None:
    """Raise UserError for an engine that is not supported.

    It must be called before there is an Accelerator, which would start that engine.
    """
    if _asked_for("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "DeepSpeed is not supported: it would replace or reshape the optimizer, and its state "
            "would resume nowhere else. Take configs/accelerate/fsdp2.yaml, which shards as ZeRO-3 "
            "does, or fsdp2_zero2.yaml, as ZeRO-2 does"
        )


def settle_engine(accelerator: Accelerator, display: Display) -> None:
    """Have Accelerate use the engine that it was told to. Raises UserError."""
    if not _asked_for("ACCELERATE_USE_FSDP"):
        return
    from torch.distributed.fsdp import FSDPModule  # here: it takes a second to import

    if accelerator.distributed_type is DistributedType.MULTI_CPU:
        # Accelerate would silently take DDP here. This is what it does on GPUs.
        fsdp = DistributedType.FSDP
        accelerator.state.distributed_type = PartialState().distributed_type = fsdp
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type is not DistributedType.FSDP:
        display.note("engine: FSDP was asked for and there is one process, so nothing is sharded")
        return
    if not accelerator.is_fsdp2:
        raise UserError(
            "the engine is FSDP 1, which is not supported. "
            "Set fsdp_version: 2 in Accelerate's config"
        )
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise UserError(
            f"FSDP2 needs torch 2.13 or later here, and this is {torch.__version__}. "
            "Upgrade it, or use DDP"
        )
    # every process has made the model, as all engines need it
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers reads it


class Prepared(NamedTuple):
    """What a step takes, after the engine has the model."""

    module: Any
    optimizer: Any
    average_rows: Callable[[], None]  # row-sparse gradients over the processes


def prepare(
    accelerator: Accelerator,
    language_model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    display: Display,
) -> Prepared:
    """Give the model and the optimizer to Accelerate's engine, and keep lazy tables out of it."""
    keep_tables_out_of_ddp(language_model, optimizer)
    if accelerator.distributed_type is DistributedType.FSDP:
        tables = lazy_modules(language_model, optimizer)
        accelerator.state.fsdp_plugin.ignored_modules = tables or None
        # the layers, which are sharded one by one
        language_model._no_split_modules = language_model.causal_lm._no_split_modules  # type: ignore[assignment]
        lazy = (
            "; the lazily trained embedding stays whole on each, and its rows are exchanged"
            if tables
            else ""
        )
        display.note(
            f"engine: FSDP2 shards the model over {accelerator.num_processes} processes{lazy}"
        )
    with warnings.catch_warnings():  # Accelerate has no other argument for it yet
        warnings.filterwarnings(
            "ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning
        )
        module, prepared = accelerator.prepare(language_model, optimizer)
    return Prepared(module, prepared, RowGradients(optimizer, say=display.note).average)


def lazy_modules(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Module]:
    """Return the embeddings that `optimizer` steps row by row."""
    if not isinstance(optimizer, LazyAdamW):
        return []
    weights = {id(weight) for weight in optimizer.registered_weights().values()}
    return [module for module in model.modules() if id(getattr(module, "weight", None)) in weights]


def with_whole_model(
    accelerator: Accelerator, module: nn.Module, evaluate: Callable[[int], Any]
) -> Callable[[int], Any]:
    """Return `evaluate`, with the whole model on every process while it is called."""
    if accelerator.distributed_type is not DistributedType.FSDP:
        return evaluate

    def evaluate_whole(step: int) -> Any:
        with whole(
            module, reshard_after_forward=bool(accelerator.state.fsdp_plugin.reshard_after_forward)
        ):
            return evaluate(step)

    return evaluate_whole


def _asked_for(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def let_go(module: nn.Module) -> None:
    """Free what DDP keeps to average gradients. `module` cannot be trained any more.

    It must happen while others hold the process group too. Otherwise DDP is the group's last holder
    and frees it without releasing Python's lock. It would wait for gloo's thread, and that thread,
    with a last result to free, for the lock (torch 2.13).
    """
    if isinstance(module, DistributedDataParallel):
        del module.logger, module.reducer
