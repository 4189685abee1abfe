"""The first look: what can be seen to be wrong before anything large is imported.

torch, transformers and datasets take ten seconds of a slow CPU. So a wrong path, column, model
folder or optimizer is found without them, by the functions that find it later too. A config that
passes may still be wrong: names on the hub and the values of options need these libraries.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from finetune.config import RunConfig, load_config
from finetune.config.loading import make_config, validate
from finetune.config.other_tools import ALIASES
from finetune.config.places import field_of
from finetune.config.schema import DataSection, GenerationSection, SourceSection
from finetune.config.yaml12 import parse
from finetune.data.formats.detect import find_shape, first_that_fits
from finetune.data.formats.languages import (
    as_named,
    is_other_way,
    language_tag,
    require_language,
    require_name,
)
from finetune.data.sources.aligned import aligned_sides
from finetune.data.sources.files import KINDS, kind_ending, local_files
from finetune.data.sources.peek import first_records, require_plain_text
from finetune.data.types import Record
from finetune.errors import UserError
from finetune.models.locate import find_local
from finetune.optim.registry import check_names, optimizer_info
from finetune.run.claim import check_claim, is_held
from finetune.run.files import path_of
from finetune.run.folder import RunDir, no_checkpoint
from finetune.run.marker import read_marker
from finetune.run.records import has_ended, trained_languages

_SIDES = ("the source language", "the target language")


def look_at(config: RunConfig, *, trained: bool = False) -> None:
    """Raise UserError for what is wrong with a config's optimizer, model folder or local data.

    `trained`: the model comes with its chat template, so that the config's is not read.
    """
    section = config.optimizer
    check_names(optimizer_info(section.name), section.options)
    if not trained:
        _look_at_template(config)
    _look_at_files(config)


def _look_at_template(config: RunConfig) -> None:
    template = config.model.chat_template
    if template not in (None, "chatml") and not path_of(template).is_file():
        raise UserError(
            f'model.chat_template {template!r} is neither "chatml" nor a file. Give chatml, or the '
            "path of a Jinja file"
        )


def _look_at_files(config: RunConfig) -> None:
    if config.model.name is not None and config.model.tokenizer is None:
        find_local(config.model.name)
    data = config.data
    for sources in (data.train, data.validation, data.test, data.unrelated):
        for source in sources or ():
            _files_of(source)
    require_no_other_kind(data)
    typical_record(first_records(_files_of(data.train[0])), data)


def look_at_start(config: RunConfig, resume: str | None) -> None:
    """Raise UserError if a run cannot begin in its folder, or if `--resume` names nothing."""
    run = RunDir(config.output_dir)
    marker = read_marker(run.root)
    if is_held(run.root) or (marker is not None and marker.emptying):
        return  # said when the folder is locked, or finished then
    check_claim(run.root, "run", run.written())
    if resume is None and run.has_started() and not config.overwrite_output_dir:
        raise another_run(run)
    if resume == "auto":
        require_checkpoints(run)
    if resume not in (None, "auto") and not (folder := path_of(resume)).is_dir():
        raise no_checkpoint(folder, run.checkpoints)


def require_checkpoints(run: RunDir) -> None:
    """Raise UserError for a run that reached its end and has no checkpoint to go on from."""
    if has_ended(run) and not any(run.checkpoints.glob("step-*")):
        raise lost_checkpoints(run, "its checkpoints were deleted")


def lost_checkpoints(run: RunDir, how: str) -> UserError:
    """Return the mistake of going on with a run that reached its end. `how`: what became of it."""
    return UserError(
        f"{run.root} is finished, and {how}, so it cannot go on. Name another output_dir, or train "
        "it anew with overwrite_output_dir=true and no --resume"
    )


def another_run(run: RunDir) -> UserError:
    """Return the mistake of a run that is to begin in the folder of another one."""
    return UserError(
        f"{run.root} holds a run already. Continue it with --resume auto, name another output_dir, "
        "or set overwrite_output_dir=true to delete it"
    )


def look_at_search(path: Path, overrides: Sequence[str], *, key: str) -> None:
    """Look at a config with a list of values for `key`. Raises UserError as `look_at` does."""
    values, others = take_list(overrides, key)
    config = load_config(path, others)
    if key == "optimizer.name" and values is not None:  # an option may be that of one of them
        for name in values:
            optimizer_info(str(name))
        _look_at_files(config)
    else:
        look_at(config)


def take_list(overrides: Sequence[str], key: str) -> tuple[list[Any] | None, list[str]]:
    """Return the values of an override `key=[…]`, or None, and the other overrides.

    The key may have another tool's name. One value without brackets is a list of one.
    """
    found, others = None, []
    for override in overrides:
        name, _, text = override.partition("=")
        name = name.strip().removeprefix("--")
        try:
            value = parse(text) if ALIASES.get(name, name) == key else None
        except yaml.YAMLError:
            value = None  # the reader of the config reports what is wrong with it
        if value is not None:
            found = value if isinstance(value, list) else [value]
        else:
            others.append(override)
    return found, others


def sources_of(files: Sequence[str]) -> list[Any]:
    """Return `data.train` for the files that a config is to be written for.

    Two files whose endings name no kind of data are the two sides of aligned text.
    """
    paths = [path_of(file) for file in files]
    is_pair = len(paths) == 2 and not any(kind_ending(path) in KINDS for path in paths)
    if is_pair and any(path.is_file() for path in paths):  # and not names on the hub, or folders
        return [{"path": files[0], "target_path": files[1]}]
    return list(files)


def look_at_files(
    files: Sequence[str],
    *,
    model: str,
    languages: tuple[str | None, str | None],
    output: Path,
) -> None:
    """Raise UserError for what is wrong with the files of a config that is to be written.

    That is: data files or the model are missing, no format fits the first file, or `output` is
    there or cannot be written.
    """
    if "" in files:
        raise UserError("the name of a data file is empty. Give a file")
    for name in (*files, model, str(output)):
        if name.encode("utf-8", "ignore").decode() != name:
            raise UserError(f"the name {name!r} is not UTF-8 text, as a config is. Rename the file")
    if output.exists():
        raise UserError(f"{output} already exists. Name another file with --output")
    if not os.access(output.absolute().parent, os.W_OK):
        raise UserError(
            f"{output} cannot be written: {output.absolute().parent} is no folder to "
            "write to. Name another file with --output"
        )
    for file in files:
        if RunDir(Path(file)).is_run():
            raise UserError(f"{file} is a run, and data is needed. Give its data files")
        key, is_setting, _ = file.partition("=")
        if is_setting and field_of(key) is not None:
            raise UserError(
                f"{file} is a setting, and files are needed. Write it into a config of your own, "
                "with model.name and data.train"
            )
    kinds: dict[str, str] = {}  # format -> the first file of it
    for file in files if not all(file.endswith(".txt") for file in files) else ():
        path = path_of(file)
        if kind_ending(path) not in KINDS or not path.is_file():
            continue
        record = first_that_fits(first_records([path]), "auto", columns={}, languages=languages)
        if record is not None:
            kind, _, _ = find_shape("auto", record, columns={}, languages=languages)
            kinds.setdefault(kind, file)
    if len(kinds) > 1:
        said = " and ".join(f"{file} is {kind}" for kind, file in kinds.items())
        raise UserError(f"{said}. Make a config for each")
    data = {
        "train": sources_of(files),
        "translation": dict(zip(("source_language", "target_language"), languages)),
    }
    look_at(make_config({"output_dir": "run", "model": {"name": model}, "data": data}))


def look_at_target(target: str) -> RunDir | None:
    """Return the run that `target` names; None for a model, which may still be on the hub.

    Raises UserError if the run has no model yet, or for a local name without a model.
    """
    run = RunDir(path_of(target))
    if not run.is_run():
        find_local(target)
        return None
    if not (run.model / "config.json").is_file():
        raise UserError(
            f"the run {target} has no model/ yet. "
            f"Finish it with `finetune train {quote(str(run.config))} --resume auto`"
        )
    return run


def look_at_use(
    target: str, settings: Mapping[str, Any], *, trust: bool = False
) -> tuple[RunDir | None, RunConfig | None]:
    """Return the run that `target` names, and its config; None for a model.

    Raises UserError as `look_at_target` does, and for generation settings that are not allowed.
    """
    run = look_at_target(target)
    config = None if run is None else load_config(run.config, trusting(trust))
    changed_generation(config, settings)
    return run, config


def look_at_evaluation(
    target: str, path: Path | None, overrides: Sequence[str], *, trust: bool
) -> None:
    """Raise UserError as `look_at_target` and `look_at` do, and if there is no data to score.

    The arguments are those of `evaluation_config`.
    """
    config = evaluation_config(target, look_at_target(target), path, overrides, trust=trust)
    look_at(config, trained=True)
    data = config.data
    if data.test is None and data.validation is None and data.validation_fraction == 0:
        raise no_held_out_data()


def evaluation_config(
    target: str, run: RunDir | None, path: Path | None, overrides: Sequence[str], *, trust: bool
) -> RunConfig:
    """Return the config that has the data to evaluate `target` on: that at `path`, or the run's.

    Raises UserError if there is neither.
    """
    if path is not None:
        return load_config(path, overrides)
    if run is not None:
        return load_config(run.config, [*trusting(trust), *overrides])
    raise UserError(
        f"{target} is no run here, and no data is known to evaluate a model on. "
        "Name a run, or give --config FILE"
    )


def no_held_out_data() -> UserError:
    """Return the mistake of an evaluation without data."""
    return UserError(
        "the config names no held-out data. "
        "Set data.test, data.validation or data.validation_fraction"
    )


def trusting(trust: bool) -> list[str]:
    """Return the overrides of a run's own config; `trust`: the model's code may run."""
    return ["model.trust_remote_code=true"] if trust else []


def changed_generation(config: RunConfig | None, given: Mapping[str, Any]) -> GenerationSection:
    """Return the generation section of a run, or the defaults, changed by `given`.

    Raises UserError for a value that is not allowed.
    """
    section = config.generation if config is not None else GenerationSection()
    return validate(GenerationSection, {**section.model_dump(), **given}, where="generation")


def languages_asked(
    run: RunDir | None, config: RunConfig | None, source: str | None, to: str | None
) -> tuple[str, str]:
    """Return the languages of a translation, by the names that the run's data has for them.

    By default they are those of the run, in the direction that it was trained in. Raises UserError
    if they are not known, for a text that is no language, and for one language twice.
    """
    asked = (source, to)
    for side, language in zip(_SIDES, asked):
        if language is not None:
            require_name(language, side)
    trained = trained_languages(run)
    direction = None if config is None else config.data.translation.direction
    if direction == "backward" or (direction == "both" and is_other_way(asked, trained)):
        trained = trained[::-1]
    if trained:
        source = trained[0] if source is None else as_named(source, trained)
        to = trained[1] if to is None else as_named(to, trained)
    if source is None or to is None:
        raise UserError(
            "the source and target languages are not both known. Give both, such as en and fr (on "
            "the command line --from en --to fr)"
        )
    for side, language in zip(_SIDES, (source, to)):
        if language not in trained:
            require_language(language, side)
    if language_tag(source) == language_tag(to) and asked != (None, None):
        raise UserError(
            f"the translation would be from {source!r} to {to!r}, which are the same language. "
            "Give another source or target"
        )
    return source, to


def look_at_texts(texts: object, *, input: Path | None, output: Path | None) -> None:
    """Raise UserError for arguments of a translation that contradict each other."""
    if texts and input is not None:
        raise UserError("both sentences and --input are given. Give sentences or --input, not both")
    if output is not None and input is None:
        raise UserError("--output is given without --input. Give --input, or redirect the output")
    if input is not None and not input.is_file():
        raise UserError(f"the input {input} is not a file (looked in {Path.cwd()})")
    if output is not None and output.exists():
        raise UserError(f"{output} already exists. Name another --output, or delete it")
    if output is not None and not os.access(folder := output.absolute().parent, os.W_OK):
        raise UserError(
            f"{output} cannot be written: {folder} is no folder to write to. Name another --output"
        )


def look_at_export(target: str, dest: Path, checkpoint: Path | None) -> RunDir | None:
    """Return the run that `target` is, or None for a model.

    Raises UserError if it has no such model, or `dest` exists.
    """
    try:
        is_there = dest.exists() or dest.is_symlink()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{dest} cannot be made: {error.strerror}. Name another folder") from error
    if is_there:
        raise UserError(f"{dest} already exists. Name a folder that does not exist yet")
    above = next(folder for folder in dest.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        kind = "cannot be written to" if above.is_dir() else "is not a folder"
        raise UserError(f"{dest} cannot be made, since {above} {kind}. Name another folder")
    run = RunDir(Path(target))
    if not run.is_run():
        if checkpoint is not None:
            raise UserError(
                f"--checkpoint is given, and {target} is not a run's folder. "
                "Give the folder of the run"
            )
        return look_at_target(target)
    if checkpoint is None and not (run.model / "config.json").is_file():
        raise UserError(
            f"the run {target} has no model/ yet. "
            f"Finish it with `finetune train {quote(str(run.config))} --resume auto`, "
            "or name one of its checkpoints with --checkpoint"
        )
    return run


def require_no_other_kind(data: DataSection) -> None:
    """Raise UserError if a text file of the data is a table or JSON, and nobody says it is text."""
    for sources in (data.train, data.validation, data.test, data.unrelated):
        for source in sources or () if data.format == "auto" else ():
            require_plain_text(_files_of(source))


def _files_of(source: SourceSection) -> list[Path]:
    """Return the local files of a source; none for a folder, a hub name or aligned text files."""
    if source.target_path is not None:
        for side in (source.path, source.target_path):
            local_files(side, is_text=True)
        return []
    is_file = path_of(source.path).is_file()
    return [] if is_file and aligned_sides(source.path, None) else local_files(source.path)


def typical_record(records: Iterable[Record], data: DataSection) -> Record | None:
    """Return the first record that a format fits, or None without records. Raises UserError."""
    languages = data.translation.languages
    return first_that_fits(records, data.format, columns=data.columns, languages=languages)
