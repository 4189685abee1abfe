"""Two aligned text files: line n of one is the translation of line n of the other."""

from collections.abc import Callable
from pathlib import Path

from finetune.data.formats.languages import is_language
from finetune.data.sources.files import KINDS, compression, kind_ending, local_files, read_lines
from finetune.data.sources.local import TextLines
from finetune.errors import UserError
from finetune.run.files import path_of


def aligned_sides(
    path: str, target_path: str | None
) -> list[tuple[list[Path], Callable[[Path], TextLines]]]:
    """Return (files, reader) for the two sides of aligned text files; nothing for another source.

    The columns are `source` and `target`, or the languages if the files end in them (corpus.en and
    corpus.fr). Raises UserError if the sides do not fit together.
    """
    target = target_path or _other_side(path)
    if target is None:
        return []
    sides = [local_files(side, is_text=True) for side in (path, target)]
    kinds = {KINDS.get(kind_ending(file), "text") for files in sides for file in files}
    if not all(sides) or kinds != {"text"}:
        raise UserError(f"path and target_path must be two text files, not {path!r} and {target!r}")
    counts = [sum(1 for file in files for _ in read_lines(file)) for files in sides]
    if counts[0] != counts[1]:
        raise UserError(
            f"{path!r} has {counts[0]} lines and {target!r} has {counts[1]}; aligned files "
            "must have equally many lines"
        )
    first, second = (_language_ending(files[0]) for files in sides)
    names = (first, second) if first and second and first != second else ("source", "target")
    return [(files, _lines_of(name)) for files, name in zip(sides, names)]


def _lines_of(column: str) -> Callable[[Path], TextLines]:
    return lambda file: TextLines(column, blanks=True)


def _language_ending(file: Path) -> str | None:
    """Return the language that a text file's name ends in: corpus.en, corpus.fr.gz."""
    ending = Path(file.stem).suffix if compression(file) else file.suffix
    is_code = kind_ending(file) not in KINDS and is_language(ending[1:])
    return ending[1:] if is_code else None


def _other_side(path: str) -> str | None:
    """Return the text file beside `path` that has another language's ending: corpus.fr.

    It is None if `path` is no file with such an ending. Raises UserError if there is not exactly
    one other file.
    """
    file = path_of(path)
    language = _language_ending(file)
    if language is None or not file.is_file():
        return None
    ending = f".{language}{compression(file)}"
    stem = file.name[: -len(ending)]
    others = [
        other
        for other in sorted(file.parent.iterdir())
        if other.is_file()
        and other != file
        and (found := _language_ending(other)) is not None
        and other.name == f"{stem}.{found}{compression(other)}"
    ]
    if len(others) != 1:
        beside = "no file" if not others else ", ".join(other.name for other in others)
        raise UserError(
            f"{path!r} is one side of a translation, and {beside} with another language's ending "
            "is beside it. Give the other side as target_path"
        )
    return str(others[0])
