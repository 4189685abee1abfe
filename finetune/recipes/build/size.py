"""The size of a run's steps: what `training.batch_size: auto` becomes, once and for all resumes."""

from typing import Literal

from finetune.config import RunConfig
from finetune.data.batches.size import LARGEST, OF_A_LIMIT, step_size
from finetune.errors import UserError
from finetune.recipes.build.material import Material
from finetune.run.wording import counted


def with_step_size(material: Material) -> Material:
    """Return the material with the size of its steps in the config.

    Raises UserError if a stream is to be packed in a length of its own.
    """
    config, data = material.config, material.config.data
    if data.streaming and data.packed_length is not None:
        raise UserError(
            "data.packed_length is given, and a stream is packed in sequences of data.max_length. "
            "Leave it out"
        )
    if config.training.batch_size != "auto":
        return material
    if why_limited(config) is not None:
        return material.with_config(with_limited_size(config))
    chosen = step_size(
        material.train.lengths,
        epochs=config.training.epochs,
        max_length=data.packed_length or data.max_length,
        packing=data.packing,
    )
    length = chosen.packed_length or data.packed_length
    return material.with_config(_sized(config, chosen.batch_size, length))


def with_limited_size(config: RunConfig) -> RunConfig:
    """Return the config of a run that something else than epochs ends, with the size of steps."""
    is_auto = config.training.batch_size == "auto"
    return _sized(config, OF_A_LIMIT, config.data.packed_length) if is_auto else config


def with_size_of(earlier: RunConfig, config: RunConfig) -> RunConfig:
    """Return the config with the size of steps that the run began with, unless it names another."""
    size, length = config.training.batch_size, config.data.packed_length
    return _sized(
        config,
        earlier.training.batch_size if size == "auto" else size,
        earlier.data.packed_length if length is None else length,
    )


def batch_size_of(config: RunConfig) -> int:
    """Return the sequences of a step, once they are known."""
    size = config.training.batch_size
    assert size != "auto", "with_step_size comes first"
    return size


def packed_length_of(config: RunConfig) -> int:
    """Return the most tokens of a packed sequence of several examples."""
    return config.data.packed_length or config.data.max_length


def why_limited(config: RunConfig) -> str | None:
    """Return what ends the run, if it is something else than epochs."""
    if config.training.max_steps is not None:
        return "training.max_steps is set"
    if config.training.max_time is not None:
        return "training.max_time is set"
    return "a stream has no known length" if config.data.streaming else None


def step_size_in_words(given: RunConfig, config: RunConfig) -> str | None:
    """Return what was chosen in `config` and why, or None if `given` has the user's choice."""
    if given.training.batch_size != "auto":
        return None
    size, length = batch_size_of(config), config.data.packed_length
    said = f"training.batch_size: auto is {counted(size, 'sequence')} a step"
    if (reason := why_limited(given)) is not None:
        return f"{said}, since {reason}"
    if length != given.data.packed_length:
        said += f", packed to {length:,} tokens at most (data.packed_length)"
    return said if size == LARGEST else f"{said}, so that small data makes many steps"


def idle_processes(config: RunConfig, num_processes: int) -> str | None:
    """Return a sentence if a step has too few sequences for so many processes."""
    size = batch_size_of(config)
    if (idle := num_processes - size) <= 0:
        return None
    return (
        f"{idle} of {num_processes} processes have no sequence in a step, since it has {size}. "
        "Raise training.batch_size, or start fewer processes"
    )


def _sized(config: RunConfig, size: int | Literal["auto"], length: int | None) -> RunConfig:
    training = config.training.model_copy(update={"batch_size": size})
    data = config.data.model_copy(update={"packed_length": length})
    return config.model_copy(update={"training": training, "data": data})
