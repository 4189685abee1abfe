"""One source of records, opened, or a sentence why it cannot be opened.

Local files of text are read by `finetune.data.sources.local`. Everything else (Parquet, the hub,
folders of other files) is read by `datasets`, which only this file and `explained` import.
"""

import contextlib
import copy
import glob
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import datasets
from datasets.data_files import (
    DataFilesDict,
    EmptyDatasetError,
    get_data_patterns,
    resolve_pattern,
)
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from finetune.data.bad_records import BadRecords
from finetune.data.encoding.store import Store, hash_bytes
from finetune.data.sources.aligned import aligned_sides
from finetune.data.sources.explained import explained
from finetune.data.sources.files import (
    KINDS,
    kind_ending,
    kind_of,
    local_files,
    require_all,
    require_no_held_out,
)
from finetune.data.sources.local import (
    AlignedStream,
    AlignedTable,
    FileStream,
    FileTable,
    Item,
    PickedTable,
    TextLines,
    reader_of,
)
from finetune.data.types import Record, without_padding
from finetune.errors import UserError
from finetune.run.files import path_of

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

    def __str__(self) -> str:
        name = f" {self.name}" if self.name else ""
        split = f" ({self.split})" if self.split != "train" else ""
        return f"{self.path}{name}{split}"


class Table(Protocol):
    """Records that are found by their number."""

    def __len__(self) -> int: ...

    def __getitems__(self, numbers: Sequence[int]) -> list[Record]: ...

    def where(self, number: int) -> str:
        """Return where a record is, for messages."""
        ...

    def fingerprint(self) -> str | None:
        """Return what differs if the records do; None if that is not known."""
        ...


class Stream(Protocol):
    """Records that are read one after the other, as often as wanted."""

    def read(self, place: Any, bad: BadRecords) -> Iterator[Item]:
        """Yield what follows a place, or everything for None; lines that are none go to `bad`."""
        ...


class _DatasetTable:
    def __init__(self, dataset: Any, label: str) -> None:
        self._dataset, self._label = dataset, label

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, numbers: Sequence[int]) -> list[Record]:
        with explained(self._label):
            records = self._dataset.__getitems__(list(numbers))
        return list(map(without_padding, records))

    def where(self, number: int) -> str:
        return f"{self._label}, row {number + 1}"

    def fingerprint(self) -> str | None:
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        hashes = [hash_bytes(file) for file in files]
        # The fingerprint of `datasets` says which rows of these files there are.
        return f"{self._label} {hashes} {self._dataset._fingerprint}" if files else None


class _DatasetStream:
    def __init__(self, dataset: Any, label: str) -> None:
        self._dataset, self._label = dataset, label

    def read(self, place: Any, bad: BadRecords) -> Iterator[Item]:
        # Copied here and not when the first record is asked for: that may happen in another thread,
        # where fsspec fills the cache of file systems that is being copied.
        dataset = copy.deepcopy(self._dataset)
        if place is not None:
            dataset.load_state_dict(place[0])
        return self._read(dataset, 0 if place is None else place[1])

    def _read(self, dataset: Any, count: int) -> Iterator[Item]:
        records = iter(dataset)
        while True:
            with explained(self._label):
                record = next(records, None)
            if record is None:
                return
            count += 1
            where, record = f"{self._label}, row {count}", without_padding(record)
            yield lambda n=count: [dataset.state_dict(), n], where, record  # type: ignore[misc]


def open_table(source: Source, bad: BadRecords, store: Store | None = None) -> Table:
    """Return the records of a source. Lines that are no records are noted in `bad`.

    `store` keeps where the records are from one run to the next. Raises UserError if the source
    cannot be opened.
    """
    limit = source.max_records
    with explained(str(source)):
        if sides := _aligned(source):
            return AlignedTable([FileTable(f, reader, limit, bad, store) for f, reader in sides])
        splits = _splits(source)
        if not _are_ours(splits):
            return _DatasetTable(_open_dataset(source, splits, streaming=False), str(source))
        if source.split in splits:
            return FileTable(splits[source.split], reader_of, limit, bad, store)
        tables = {
            name: FileTable(files, reader_of, None, bad, store)
            for name, files in splits.items()
            if re.search(rf"\b{re.escape(name)}\b", source.split)
        }
        sizes = {name: len(tables.get(name, ())) for name in splits}
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(sizes)
        numbers = {name: number for number, name in enumerate(tables)}
        picks = [(numbers[p.splitname], i) for p in parts for i in range(p.from_, p.to)]
        return PickedTable(list(tables.values()), picks)


def open_stream(source: Source) -> Stream:
    """Return the records of a source as a stream; see `open_table`."""
    limit = source.max_records
    with explained(str(source)):
        if sides := _aligned(source):
            return AlignedStream([FileStream(f, reader, limit) for f, reader in sides])
        splits = _splits(source)
        if not _are_ours(splits):
            dataset = _open_dataset(source, splits, streaming=True)
            return _DatasetStream(dataset if limit is None else dataset.take(limit), str(source))
        if source.split in splits:
            return FileStream(splits[source.split], reader_of, limit)
        datasets.ReadInstruction.from_spec(source.split).to_absolute(dict.fromkeys(splits, 10**9))
        raise UserError(
            f"{source}: a part of a split cannot be streamed. Name a whole split, and set "
            "max_records"
        )


def _aligned(source: Source) -> list[tuple[list[Path], Callable[[Path], TextLines]]]:
    sides = aligned_sides(source.path, source.target_path)
    if sides and source.split != "train":
        raise UserError(
            f"{source.path} is aligned text, which has no splits, and split is {source.split!r}. "
            "Leave split out, or set max_records"
        )
    return sides


def _are_ours(splits: Mapping[str, Sequence[Path]]) -> bool:
    """Return whether there are files, and `local` reads them."""
    kinds = {kind_of(file) for files in splits.values() for file in files}
    return bool(kinds) and "parquet" not in kinds


def _splits(source: Source) -> dict[str, list[Path]]:
    """Return split -> the local data files in it; nothing if the source has none.

    Raises UserError if the files are of several kinds.
    """
    folder = path_of(source.path)
    files = local_files(source.path)
    splits = {"train": files} if files else {}
    if folder.is_dir() and not _is_saved(folder):
        splits = _splits_of_folder(folder, source.name)
        _require_train(source, splits)
    kinds = {kind_of(file) for files in splits.values() for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{source.path}: files of several kinds in one source ({', '.join(sorted(kinds))}). "
            "Make a source of each kind"
        )
    return splits


def _require_train(source: Source, splits: Mapping[str, Sequence[Path]]) -> None:
    """Raise UserError if a folder's training data is asked for, and it has other splits alone."""
    if source.split == "train" and splits and "train" not in splits:
        split, files = next(iter(splits.items()))
        raise UserError(
            f"{source.path} has no split 'train': {files[0]} is in the split {split!r}, as its "
            f"name or the README of the folder says. Set split to {split!r}, or give the files"
        )


def _splits_of_folder(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """Return split -> data files, by the rules of `datasets`; nothing if there are no data files.

    Text files beside data of another kind are no data: they are licences and notes.
    """
    base, card = glob.escape(str(folder.absolute())), folder / "README.md"
    has_configs = card.is_file() and "configs:" in card.read_text("utf-8", "replace")
    is_by_name = name is None and not has_configs
    if not is_by_name:
        found = datasets.load_dataset_builder(str(folder), name=name).config.data_files
    else:
        try:
            found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
        except EmptyDatasetError:
            return {}
    paths = {str(split): [Path(str(file)) for file in files] for split, files in found.items()}
    if is_by_name:
        require_all(folder, paths, [Path(file) for file in resolve_pattern("**", base)])
    splits = {
        split: [f for f in files if kind_ending(f) in KINDS] for split, files in paths.items()
    }
    if any(kind_of(file) != "text" for files in splits.values() for file in files):
        splits = {
            split: [file for file in files if kind_of(file) != "text"]
            for split, files in splits.items()
        }
    if is_by_name:
        require_no_held_out(folder, splits.get("train", ()))
    return {split: files for split, files in splits.items() if files}


def data_files(source: Source) -> list[Path]:
    """Return the local files of a source; none for aligned text, saved folders and hub names.

    Raises UserError as `open_table` does.
    """
    with explained(str(source)):
        splits = {} if aligned_sides(source.path, source.target_path) else _splits(source)
    return [file for split in splits.values() for file in split]


def _open_dataset(source: Source, splits: dict[str, list[Path]], *, streaming: bool) -> Any:
    """Return what `datasets` reads, with pictures and sounds as their bytes and names."""
    dataset = _open_encoded(source, splits, streaming=streaming)
    for name, feature in (dataset.features or {}).items():
        if (stored := _without_decoding(feature)) != feature:
            dataset = dataset.cast_column(name, stored)
    return dataset


def _without_decoding(feature: Any) -> Any:
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_without_decoding(feature.feature))
    if hasattr(feature, "decode_example") and not isinstance(feature, datasets.Json):
        return replace(feature, decode=False)
    return feature


def _open_encoded(source: Source, splits: dict[str, list[Path]], *, streaming: bool) -> Any:
    """Open Parquet files, a folder, or a dataset of the hub."""
    folder = path_of(source.path)
    if _is_saved(folder):
        return _open_saved(folder, source.split, streaming=streaming)
    with _quietly():
        if splits:
            # Kept under the bytes of the files, and not under their names and times as is usual.
            digest = hashlib.sha256()
            for file in itertools.chain.from_iterable(splits.values()):
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            return datasets.load_dataset(
                "parquet",
                data_files={
                    split: [glob.escape(str(file)) for file in files]
                    for split, files in splits.items()
                },
                split=source.split,
                streaming=streaming,
                cache_dir=str(Path(datasets.config.HF_DATASETS_CACHE) / digest.hexdigest()[:32]),
            )
        if folder.is_dir():
            return datasets.load_dataset(
                str(folder), name=source.name, split=source.split, streaming=streaming
            )
    return _open_from_hub(source, streaming=streaming)


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of `datasets` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _open_saved(folder: Path, split: str, *, streaming: bool) -> Any:
    """Return the records that `save_to_disk` of `datasets` wrote."""
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    if split not in found:
        raise ValueError(f"Unknown split {split!r}. Should be one of {list(found)}.")
    return found[split].to_iterable_dataset() if streaming else found[split]


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
