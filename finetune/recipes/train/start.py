"""The folder of a run at its start: locked, refused if it is occupied, claimed, and filled."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from finetune.config import RunConfig, dump_config, load_config
from finetune.config.yaml12 import parse
from finetune.data.formats.translation import TranslationFormat
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import describe_model
from finetune.models.locate import find_local
from finetune.recipes.build.look import another_run, lost_checkpoints, require_checkpoints
from finetune.recipes.build.material import with_template_date
from finetune.recipes.build.parts import Parts
from finetune.recipes.build.size import batch_size_of, with_size_of
from finetune.run.claim import check_claim, claim_folder, locked, write_marker
from finetune.run.environment import collect_environment
from finetune.run.folder import RunDir, newest_checkpoint, run_of
from finetune.run.marker import Marker, read_marker
from finetune.run.records import DataCounts, Environment, has_ended, read_config, write_config
from finetune.run.replace import check_replaceable
from finetune.run.wording import clock, counted
from finetune.training.checkpoint import agree_on_checkpoint, damage_of, find_checkpoint


@contextlib.contextmanager
def hold_folder(run: RunDir, accelerator: Accelerator, display: Display) -> Iterator[None]:
    """Keep other runs out of the folder. Process 0 holds it; the others wait until it does.

    A deletion that was broken off is finished. Raises UserError if another process holds it.
    """
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(locked(run.root, display.note))
            marker = read_marker(run.root)
            if marker is not None and marker.kind == "run" and marker.emptying:
                _make_empty(run)
        accelerator.wait_for_everyone()
        yield


def find_start(
    resume: str | None, run: RunDir, config: RunConfig, accelerator: Accelerator, display: Display
) -> tuple[Path | None, bool]:
    """Return the checkpoint to begin from, if any, and whether the run in the folder goes on.

    Process 0 looks, and the others take what it finds. Raises UserError if there is no such
    checkpoint, if the folder holds a run already, or if it holds files of someone else.
    """
    checkpoint = None
    if accelerator.is_main_process and resume is not None:
        checkpoint = find_beginning(resume, run, note=display.note)
    checkpoint = agree_on_checkpoint(checkpoint, accelerator)
    own = checkpoint is None or run.holds(checkpoint)
    resuming = resume == "auto" or (resume is not None and (own or _goes_on(run, checkpoint)))
    if accelerator.is_main_process:
        check_claim(run.root, "run", run.written())
        check_replaceable(run.model)
        _check_inputs(run, config)
        if run.has_started() and not resuming and not config.overwrite_output_dir:
            raise another_run(run)
    accelerator.wait_for_everyone()
    return checkpoint, resuming


def find_beginning(
    resume: str, run: RunDir, *, note: Callable[[str], None] = lambda text: None
) -> Path | None:
    """Return the checkpoint that `--resume` means; None if `auto` finds none.

    A run that began from another one's checkpoint and has none of its own begins there again.
    Raises UserError if there is no such checkpoint, also for a run that reached its end: it would
    be trained anew in the place of its model.
    """
    if resume == "auto":
        require_checkpoints(run)
    checkpoint = find_checkpoint(resume, run.checkpoints, note=note)
    if checkpoint is None and has_ended(run):
        raise lost_checkpoints(run, "none of its checkpoints is whole")
    if checkpoint is not None or (source := _source_of(run)) is None:
        return checkpoint
    if damage_of(Path(source)) is not None:
        raise UserError(
            f"{run.root} began from {source}, which is no longer a complete checkpoint. Name "
            "another one with --resume PATH and another output_dir, or delete the folder"
        )
    return Path(source)


def _source_of(run: RunDir) -> str | None:
    """Return the checkpoint of another run that this run began from, if it did."""
    try:
        return Environment.read(run).begun_from
    except UserError:  # damaged; `write_records` names it
        return None


def _goes_on(run: RunDir, checkpoint: Path | None) -> bool:
    """Return whether the run began from `checkpoint` of another run and has none of its own yet."""
    return (
        checkpoint is not None
        and newest_checkpoint(run.checkpoints) is None
        and _source_of(run) == _begun_from(run, checkpoint)
    )


def _check_inputs(run: RunDir, config: RunConfig) -> None:
    """Raise UserError if the run would replace the model or the data that it reads."""
    parts = {name: getattr(config.data, name) for name in ("train", "validation", "test")}
    inputs = [(f"data.{name}", source.path) for name in parts for source in parts[name] or ()]
    written = {path.resolve() for path in run.written()}
    for key, name in [("model.name", config.model.name), *inputs]:
        if name is None:  # a random model
            continue
        try:
            place = Path(name).resolve()
        except (OSError, ValueError):  # no path: a hub name, or a mistake
            continue
        if written & {place, *place.parents}:
            raise UserError(
                f"{key} is {name}, and the run writes its own files there. Name another output_dir"
            )


def claim(run: RunDir, accelerator: Accelerator, *, resuming: bool) -> None:
    """Make the folder ours, once everything else is in order. Process 0 acts, the others wait."""
    if accelerator.is_main_process:
        if run.is_run() and not resuming:
            _make_empty(run)
        claim_folder(run.root, "run", run.written())
    accelerator.wait_for_everyone()


def _make_empty(run: RunDir) -> None:
    """Delete the run in the folder. The marker has it finished if this process dies on the way."""
    write_marker(run.root, Marker("run", emptying=True))
    run.clear()
    write_marker(run.root, Marker("run"))


def write_records(parts: Parts, run: RunDir, checkpoint: Path | None) -> None:
    """Write what the run is made of. A resumed run keeps the command that it was started with.

    `checkpoint`: the one that the run goes on from. A file of an earlier start that is damaged is
    named in a note, and made again.
    """
    accelerator, earlier = parts.accelerator, Environment()
    if run.config.is_file():
        _say_changes(run, parts)
    try:
        earlier = Environment.read(run)
    except UserError:
        parts.display.warn(f"{run.environment} is damaged. It is made again")
    write_config(run, dump_config(parts.config))
    record = collect_environment(
        processes=accelerator.num_processes,
        device=str(accelerator.device),
        precision=accelerator.mixed_precision.replace("no", "fp32"),
    )
    replace(
        record,
        command=earlier.command or record.command,
        begun_from=_begun_from(run, checkpoint) or earlier.begun_from,
        model={"name": _model_name(parts.config), **describe_model(parts.model)},
        training={
            "optimizer": parts.config.optimizer.name,
            "method": _method(parts.config),
            "vocabulary": parts.vocabulary.line(),
            "step": _step(parts),
        },
        settings=flat_settings(parts.config.model_dump(mode="json", exclude_defaults=True)),
        notes=parts.display.notes,
        warned=parts.display.warned,
        peak_memory_gib=earlier.peak_memory_gib,
    ).write(run)
    write_counts(parts, run)


def _begun_from(run: RunDir, checkpoint: Path | None) -> str | None:
    """Return the place of a checkpoint of another run."""
    return None if checkpoint is None or run.holds(checkpoint) else str(checkpoint.resolve())


def _model_name(config: RunConfig) -> str:
    """Return what the report calls the model: of a package also the name of the file in it."""
    name = config.model.name
    if name is not None and name.startswith("package:") and (place := find_local(name)):
        return f"{place.stem} ({name})"
    return name or f"{(config.model.config or {}).get('model_type')}, random weights"


def _step(parts: Parts) -> str:
    """Return in words what a step has."""
    said = counted(batch_size_of(parts.config), "sequence")
    return f"{said}, about {counted(parts.material.examples_per_step, 'example')}"


def _method(config: RunConfig) -> str:
    return "full" if config.model.lora is None else f"LoRA, rank {config.model.lora.rank}"


def as_begun(checkpoint: Path, config: RunConfig) -> RunConfig:
    """Return the config with what the run of `checkpoint` settled when it began.

    That is the day that its chat template prints, and the size of its steps. If the config in its
    folder is damaged, the run's identity shows whether these mattered.
    """
    run = run_of(checkpoint)
    if not run.is_run():
        return config
    try:
        earlier = load_config(run.config, ["model.trust_remote_code=false"])
    except UserError:
        return config
    return with_size_of(earlier, with_template_date(config, earlier.data.template_date))


def write_counts(parts: Parts, run: RunDir) -> None:
    """Write what was read and what became of it; for a stream, so far."""
    format, held_out = parts.material.format, parts.material.validation
    DataCounts(
        format=format.name,
        train=parts.statistics.as_dict(),
        languages=format.languages if isinstance(format, TranslationFormat) else None,
        validation=None if held_out is None else held_out.statistics.as_dict(),
        system_prompt=format.common_system_prompt,
        shared_beginnings=parts.sharing.line(),
    ).write(run)


def changed_settings(run: RunDir, config: RunConfig, prefix: str = "") -> list[str] | None:
    """Return the settings that differ from those of `run`: "data.max_length 96 -> 64".

    Only those that begin with `prefix`. None if the run's config is damaged.
    """
    try:
        then = flat_settings(parse(read_config(run)))
    except (UserError, yaml.YAMLError):
        return None
    if "" in then:
        return None
    now = flat_settings(parse(dump_config(config)))
    keys = [key for key in sorted({*then, *now}) if key.startswith(prefix)]
    return [f"{k} {then.get(k)} -> {now.get(k)}" for k in keys if then.get(k) != now.get(k)]


def _say_changes(run: RunDir, parts: Parts) -> None:
    """Note the settings that differ from those that the run was started with."""
    changed, display = changed_settings(run, parts.config), parts.display
    if changed is None:
        display.warn(f"{run.config} is damaged. It is made again")
        return
    if changed:
        display.note("resumed with changed settings: " + ", ".join(changed))
    if any(
        text.startswith(
            ("training.max_steps ", "training.max_time ", "training.epochs ", "scheduler.")
        )
        for text in changed
    ):
        limit = parts.config.training.max_time
        length = f"{parts.num_steps:,} steps" if limit is None else clock(limit)
        display.note(
            f"the learning rate is now that of the whole schedule over {length}, from this step on"
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
