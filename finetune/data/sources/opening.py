"""One source of records, opened with `datasets`, or a sentence why it cannot be opened.

This is the only file that imports `datasets`.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.table import CastError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from finetune.data.formats.languages import is_language
from finetune.data.sources.files import (
    KINDS,
    check_json,
    kind_of,
    local_files,
    read_lines,
    table_options,
)
from finetune.errors import UserError

_HUB_TIMEOUT = 5.0  # seconds after which the hub counts as unreachable


@dataclass(frozen=True, slots=True)
class Source:
    """One source of records; see `finetune.config.schema.SourceSection` for its fields."""

    path: str
    name: str | None
    split: str
    revision: str | None
    target_path: str | None
    weight: float | None
    max_records: int | None

    def files(self) -> list[Path]:
        """Return the local files of `path`; see `finetune.data.sources.files.local_files`."""
        return local_files(self.path, is_text=self.target_path is not None)

    def __str__(self) -> str:
        name = f" {self.name}" if self.name else ""
        split = f" ({self.split})" if self.split != "train" else ""
        return f"{self.path}{name}{split}"


def open_source(source: Source, *, streaming: bool) -> Any:
    """Return a `datasets.Dataset`, or an `IterableDataset` if `streaming`.

    Raises UserError if the source cannot be opened.
    """
    files = source.files()
    folder = Path(source.path).expanduser()
    with explained(str(source), files):
        if source.target_path is not None:
            return _open_aligned(
                source, files, local_files(source.target_path, is_text=True), streaming=streaming
            )
        if files:
            return _open_files(files, source.split, streaming=streaming)
        if not folder.is_dir():
            return _open_from_hub(source, streaming=streaming)
        with _quietly():
            return datasets.load_dataset(
                str(folder), name=source.name, split=source.split, streaming=streaming
            )


def _open_files(files: list[Path], split: str, *, streaming: bool) -> Any:
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"files of several kinds in one source ({', '.join(sorted(kinds))}). Make a source of "
            "each kind"
        )
    kind = kinds.pop()
    if kind == "text":
        return _from_lines({"text": files}, split, streaming=streaming)
    options = table_options(files[0], kind)
    if options:
        # Every value is text and none means "missing": the pair ("None", "Aucun") is a pair.
        options["features"] = datasets.Features(
            {name: datasets.Value("string") for name in options.pop("columns")}
        )
    builder, names = "csv" if kind == "tsv" else kind, [str(file) for file in files]
    with _quietly():
        return datasets.load_dataset(
            builder, data_files=names, split=split, streaming=streaming, **options
        )


def _open_aligned(
    source: Source, sources: list[Path], targets: list[Path], *, streaming: bool
) -> Any:
    """Open two text files whose lines n belong together, as two columns.

    The columns are `source` and `target`, or the languages if the files end in them (corpus.en and
    corpus.fr).
    """
    kinds = {KINDS.get(file.suffix, "text") for file in sources + targets}
    if not sources or not targets or kinds != {"text"}:
        raise UserError(
            f"path and target_path must be two text files, not {source.path!r} and "
            f"{source.target_path!r}"
        )
    counts = [sum(1 for file in side for _ in read_lines(file)) for side in (sources, targets)]
    if counts[0] != counts[1]:
        raise UserError(
            f"{source.path!r} has {counts[0]} lines and {source.target_path!r} has {counts[1]}; "
            "aligned files must have equally many lines"
        )
    endings = sources[0].suffix[1:], targets[0].suffix[1:]
    languages = endings[0] != endings[1] and all(map(is_language, endings))
    names = endings if languages else ("source", "target")
    return _from_lines(
        dict(zip(names, (sources, targets), strict=True)), source.split, streaming=streaming
    )


def _from_lines(sides: dict[str, list[Path]], split: str, *, streaming: bool) -> Any:
    """Return one record for each line, with a column for each list of text files."""
    if split != "train":
        raise ValueError(f"Unknown split {split!r}. Should be one of ['train'].")
    if streaming:  # tuples: `datasets` would cut lists into shards
        files = tuple((name, tuple(side)) for name, side in sides.items())
        return datasets.IterableDataset.from_generator(_line_records, gen_kwargs={"sides": files})
    return datasets.Dataset.from_dict(
        {name: [line for file in side for line in read_lines(file)] for name, side in sides.items()}
    )


def _line_records(sides: tuple[tuple[str, tuple[Path, ...]], ...]) -> Iterator[dict[str, str]]:
    names = [name for name, _ in sides]
    texts = [itertools.chain.from_iterable(map(read_lines, files)) for _, files in sides]
    for lines in zip(*texts, strict=True):
        yield dict(zip(names, lines))


def _open_from_hub(source: Source, *, streaming: bool) -> Any:
    """Open a dataset of the hub, or its copy in the cache if the hub does not answer.

    The hub is asked once whether it answers. `datasets` alone would try for half a minute.
    """
    reachable = _hub_answers(source.path)
    offline, datasets.config.HF_HUB_OFFLINE = (
        datasets.config.HF_HUB_OFFLINE,
        datasets.config.HF_HUB_OFFLINE or not reachable,
    )
    try:
        return datasets.load_dataset(
            source.path,
            source.name,
            split=source.split,
            revision=source.revision,
            streaming=streaming,
        )
    except (ConnectionError, FileNotFoundError, HFValidationError) as error:
        hub = (
            "the Hugging Face hub has no such dataset, or it is private. Check the name, or log in "
            "with `hf auth login`"
            if reachable
            else "the Hugging Face hub cannot be reached and the cache has no copy. Check the "
            "connection, or give a local file"
        )
        raise UserError(
            f"dataset {source.path!r} not found: it is not a file or folder here (looked in "
            f"{Path.cwd()}), and {hub}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _hub_answers(path: str) -> bool:
    try:
        HfApi().dataset_info(path, timeout=_HUB_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):
        return True  # the hub refuses, but it answers
    except Exception:  # the network layer may raise anything
        return False
    return True


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide the progress bars of `datasets`, since local files take no time."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def explained(label: str, files: Sequence[Path]) -> Iterator[None]:
    """Turn an exception of `datasets` into a UserError that says what is wrong with the source.

    What `datasets` logs meanwhile is hidden.
    """
    logger = datasets.logging.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for file in files:
            if kind_of(file) == "json":
                check_json(file)
        raise UserError(_explanation(label, error)) from error
    finally:
        logger.setLevel(level)


def _explanation(label: str, error: Exception) -> str:
    cause = error.__cause__ or error
    message = " ".join(str(cause).split()).rstrip(".")
    if isinstance(cause, CastError):
        first, other = (
            ", ".join(names) for names in (cause.requested_column_names, cause.table_column_names)
        )
        return (
            f"{label}: its rows do not have the same columns ({first}; further on {other}). Put "
            "each kind into files of its own, and list these as several sources"
        )
    if "corresponds to no data" in message:
        return f"{label} is empty: it has no rows"
    message = message[:1].lower() + message[1:]
    if message.startswith("unknown split"):
        return f"{label}: {message.replace('. Should', '; it should')}"
    return f"{label} cannot be read: {message}"
