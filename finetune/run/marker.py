"""The marker `.finetune.json`: the sign that a folder was made by this package, and what is in it.

Every command that writes into a folder asks it first. A folder without the marker belongs to
someone else: nothing in it is deleted or replaced. The marker is the first file that is written.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from finetune.errors import UserError

MARKER = ".finetune.json"
FORMAT = 1  # of the marker; a later version may give a folder another meaning

Kind = Literal["run", "comparison", "model", "landscape"]


@dataclass(frozen=True)
class Marker:
    """What a folder is."""

    kind: Kind
    files: tuple[str, ...] = ()  # of a model: all that was written, relative to the folder
    emptying: bool = False  # of a run: its deletion was begun, and has to be finished

    def as_text(self) -> str:
        """Return what the file holds."""
        values: dict[str, object] = {"format": FORMAT, "kind": self.kind}
        if self.files:
            values["files"] = sorted(self.files)
        if self.emptying:
            values["emptying"] = True
        return json.dumps(values, indent=1) + "\n"


def read_marker(folder: Path) -> Marker | None:
    """Return the marker of `folder`, or None if it has none.

    Raises UserError if the marker is damaged or from a later version.
    """
    path = folder / MARKER
    if not os.path.lexists(path):
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version, kind = int(values["format"]), values["kind"]
        files, emptying = tuple(map(str, values.get("files", ()))), bool(values.get("emptying"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}), so it is not known what finetune made in {folder}. "
            "Name another folder, or restore that file"
        ) from error
    if version != FORMAT or kind not in get_args(Kind):
        raise UserError(
            f"{path} has format {version} and kind {kind!r}; this version knows format {FORMAT} "
            f"and the kinds {', '.join(get_args(Kind))}. Update finetune, or name another folder"
        )
    return Marker(kind, files, emptying)


def is_marked(folder: Path, kind: Kind) -> bool:
    """Return whether `folder` was made as a `kind`. Raises UserError for a damaged marker."""
    marker = read_marker(folder)
    return marker is not None and marker.kind == kind


def own_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the files that a mark lists. A name that leads out of the folder is not one."""
    inside = (PurePosixPath(name) for name in names)
    return [
        folder / name
        for name in inside
        if name.parts and not name.is_absolute() and ".." not in name.parts
    ]


def remove_own(folder: Path, names: tuple[str, ...], mark: str) -> None:
    """Delete the files of `folder` that its mark lists, then the mark, then the folder.

    The mark goes last, so that a deletion that is broken off can be finished. A folder that holds
    anything else stays, with that. Raises OSError.
    """
    files = own_files(folder, names)
    for file in files:
        if file.is_dir() and not file.is_symlink():  # somebody put it in the place of the file
            _remove_empty(file)
        else:
            with contextlib.suppress(NotADirectoryError):
                file.unlink(missing_ok=True)
    for inner in sorted({file.parent for file in files} - {folder}, reverse=True):
        _remove_empty(inner)
    (folder / mark).unlink(missing_ok=True)
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
