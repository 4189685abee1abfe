"""The folder of a run at its start: refused if it is occupied, claimed, and its records written."""

import tempfile
from dataclasses import replace
from typing import Any

import yaml
from accelerate import Accelerator

from finetune.config import RunConfig, dump_config
from finetune.data.formats.translation import TranslationFormat
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import describe_model
from finetune.recipes.build.parts import Parts
from finetune.run.environment import collect_environment
from finetune.run.folder import RunDir
from finetune.run.records import DataCounts, Environment, read_config, write_config


def refuse_occupied(
    run: RunDir, config: RunConfig, accelerator: Accelerator, *, resuming: bool
) -> None:
    """Raise UserError if the folder holds another run. Process 0 looks, the others wait."""
    if (
        accelerator.is_main_process
        and run.has_started()
        and not resuming
        and not config.overwrite_output_dir
    ):
        raise UserError(
            f"{run.root} holds another run. Continue it with --resume auto, name another "
            "output_dir, or set overwrite_output_dir=true to delete it"
        )
    accelerator.wait_for_everyone()


def claim(run: RunDir, accelerator: Accelerator, *, resuming: bool) -> None:
    """Make the folder ours, once everything else is in order. Process 0 acts, the others wait."""
    if accelerator.is_main_process:
        if run.is_run() and not resuming:
            run.clear()
        try:
            run.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=run.root):
                pass
        except OSError as error:
            raise UserError(
                f"the run's folder {run.root} cannot be written: {error.strerror}"
            ) from error
    accelerator.wait_for_everyone()


def write_records(parts: Parts, run: RunDir) -> None:
    """Write what the run is made of. A resumed run keeps the command that it was started with."""
    accelerator = parts.accelerator
    if run.is_run():
        _say_changes(run, parts.config, parts.display)
    write_config(run, dump_config(parts.config))
    record = collect_environment(
        processes=accelerator.num_processes,
        device=str(accelerator.device),
        precision=accelerator.mixed_precision.replace("no", "fp32"),
    )
    replace(
        record,
        command=Environment.read(run).command or record.command,
        model=describe_model(parts.model),
        notes=parts.display.notes,
    ).write(run)
    write_counts(parts, run)


def write_counts(parts: Parts, run: RunDir) -> None:
    """Write what was read and what became of it; for a stream, so far."""
    format, held_out = parts.material.format, parts.material.validation
    DataCounts(
        format=format.name,
        train=parts.statistics.as_dict(),
        languages=format.languages if isinstance(format, TranslationFormat) else None,
        validation=None if held_out is None else held_out.statistics.as_dict(),
    ).write(run)


def _say_changes(run: RunDir, config: RunConfig, display: Display) -> None:
    """Note the settings that differ from those that the run was started with."""
    try:
        then = flat_settings(yaml.safe_load(read_config(run)))
    except yaml.YAMLError as error:
        raise UserError(f"{run.config} is not valid YAML. Restore it, or remove it") from error
    now = flat_settings(yaml.safe_load(dump_config(config)))
    changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if changed:
        display.note(
            "resumed with changed settings: "
            + ", ".join(f"{key} {then.get(key)} -> {now.get(key)}" for key in changed)
        )


def flat_settings(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested config as one level: {"data.train": ...}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, item in tree.items()
        for key, value in flat_settings(item, f"{prefix}.{name}".lstrip(".")).items()
    }
