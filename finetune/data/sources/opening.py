"""Opening one source of rows with Hugging Face `datasets`, and saying in one sentence why it cannot be opened.

Floor 2, and the only file that imports `datasets`.
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

_HUB_TIMEOUT = 5.0  # seconds until the hub counts as out of reach


@dataclass(frozen=True, slots=True)
class Source:
    """One source of rows; see `finetune.config` for what the fields mean."""

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    target_path: str | None = None
    weight: float | None = None
    max_rows: int | None = None

    def files(self) -> list[Path]:
        """Those of `path` on this machine; see `finetune.data.sources.files.local_files`."""
        return local_files(self.path, is_text=self.target_path is not None)

    def __str__(self) -> str:
        return " ".join(
            [
                self.path,
                *([self.name] if self.name else []),
                *([f"({self.split})"] if self.split != "train" else []),
            ]
        )


def open_source(source: Source, *, streaming: bool) -> Any:
    """A `datasets.Dataset`, or an `IterableDataset` where `streaming`."""
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
            f"files of several kinds in one source ({', '.join(sorted(kinds))}); make a source of each kind"
        )
    kind = kinds.pop()
    if kind == "text":
        return _from_lines({"text": files}, split, streaming=streaming)
    options = table_options(files[0], kind)
    if options:  # as text, and nothing in it means "missing": the pair ("None", "Aucun") is a pair
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
    """Two text files, line n of one beside line n of the other, as columns `source` and `target`, or named by their languages where
    these are their endings (corpus.en and corpus.fr)."""
    if (
        not sources
        or not targets
        or {KINDS.get(file.suffix, "text") for file in sources + targets} != {"text"}
    ):
        raise UserError(
            f"path and target_path must be two text files, not {source.path!r} and {source.target_path!r}"
        )
    counts = [sum(1 for file in side for _ in read_lines(file)) for side in (sources, targets)]
    if counts[0] != counts[1]:
        raise UserError(
            f"{source.path!r} has {counts[0]} lines and {source.target_path!r} has {counts[1]}; aligned files must "
            "have as many lines"
        )
    endings = sources[0].suffix[1:], targets[0].suffix[1:]
    names = (
        endings
        if endings[0] != endings[1] and all(map(is_language, endings))
        else ("source", "target")
    )
    return _from_lines(
        dict(zip(names, (sources, targets), strict=True)), source.split, streaming=streaming
    )


def _from_lines(sides: dict[str, list[Path]], split: str, *, streaming: bool) -> Any:
    """One row for each line; a column for each list of text files."""
    if split != "train":
        raise ValueError(f"Unknown split {split!r}. Should be one of ['train'].")
    if streaming:
        files = tuple(
            (name, tuple(side)) for name, side in sides.items()
        )  # tuples: `datasets` would cut lists into shards
        return datasets.IterableDataset.from_generator(_rows_of_lines, gen_kwargs={"sides": files})
    return datasets.Dataset.from_dict(
        {name: [line for file in side for line in read_lines(file)] for name, side in sides.items()}
    )


def _rows_of_lines(sides: tuple[tuple[str, tuple[Path, ...]], ...]) -> Iterator[dict[str, str]]:
    names = [name for name, _ in sides]
    for lines in zip(
        *(itertools.chain.from_iterable(map(read_lines, files)) for _, files in sides), strict=True
    ):
        yield dict(zip(names, lines))


def _open_from_hub(source: Source, *, streaming: bool) -> Any:
    """Ask the hub once whether it is there: `datasets` alone would try for half a minute. Where it is not, the cache must do."""
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
        where = f"it is no file or folder here (looked in {Path.cwd()}), and "
        hub = (
            "the Hugging Face hub has no such dataset, or it is private (log in with `hf auth login`)"
            if reachable
            else "the Hugging Face hub is out of reach and the cache has no copy; check the connection, or give a local file"
        )
        raise UserError(f"dataset {source.path!r} not found: {where}{hub}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _hub_answers(path: str) -> bool:
    try:
        HfApi().dataset_info(path, timeout=_HUB_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):
        return True  # an answer, though not the one hoped for
    except Exception:  # whatever the network layer raises
        return False
    return True


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars of `datasets`: local files take no time."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def explained(label: str, files: Sequence[Path]) -> Iterator[None]:
    """Turn what `datasets` raises, and logs besides, into a UserError that says what is wrong with the source."""
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
        cause = error.__cause__ or error
        message = " ".join(str(cause).split())
        if message.startswith("Unknown split"):
            raise UserError(
                f"{label}: {message[0].lower()}{message[1:].replace('. Should', '; it should').rstrip('.')}"
            ) from error
        if isinstance(cause, CastError):
            first, other = (
                ", ".join(names)
                for names in (cause.requested_column_names, cause.table_column_names)
            )
            raise UserError(
                f"{label}: its rows do not have the same columns ({first}; further on {other}); "
                f"put each kind into files of its own, and list these as several sources"
            ) from error
        if "corresponds to no data" in message:
            raise UserError(f"{label} is empty: there are no rows in it") from error
        raise UserError(
            f"{label} cannot be read: {message[:1].lower()}{message[1:].rstrip('.')}"
        ) from error
    finally:
        logger.setLevel(level)
