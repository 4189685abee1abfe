"""`finetune push`: a run's model on the Hugging Face hub, with its card. No weight is loaded."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from finetune.config.yaml12 import parse
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.locate import check_hub_name, check_weight_file, push_files
from finetune.recipes.build.look import look_at_target
from finetune.report.card import HERE
from finetune.run.files import read_text
from finetune.run.marker import MARKER, read_marker
from finetune.run.wording import size

CARD = "README.md"


def push_run(
    root: Path,
    name: str,
    *,
    gguf: Sequence[Path] = (),
    private: bool = False,
    dry_run: bool = False,
    display: Display | None = None,
) -> list[str]:
    """Put the model/ of a run, its card and .gguf files on the hub; return the paths there.

    `gguf`: files besides those in the run's folder. `dry_run` lists the files only. A file that
    someone put into model/ is not sent. Raises UserError if `root` is no finished run, if a file is
    missing or cut, if the hub refuses, or if the repository is public and is to be `private`.
    """
    display = display or Display()
    check_hub_name(name)
    run = look_at_target(str(root)) if root.is_dir() else None
    if run is None:
        raise UserError(f"{root} is not a run's folder. Give the folder of a finished run")
    extra = [*gguf, *sorted(root.glob("*.gguf"))]
    for path in extra:
        if not path.is_file():
            raise UserError(f"the file {path} does not exist (looked in {Path.cwd()})")
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(f"{path} is no GGUF file. Give one that `finetune export` wrote")
    local = _files_of_model(run.model)
    if added := sorted(set(_files_in(run.model)) - {*local, MARKER}):
        display.warn(f"not sent, as finetune did not write it: {', '.join(added)}")
    for path in extra:
        other = local.setdefault(path.name, path)
        if other.resolve() != path.resolve():
            raise UserError(
                f"{other} and {path} would have the same name on the hub. Rename one of them"
            )
    files: dict[str, Path | bytes] = {**local}
    if CARD in files:
        files[CARD] = card_on_hub(read_text(run.model / CARD), name).encode()
    for there, file in files.items():
        count = len(file) if isinstance(file, bytes) else file.stat().st_size
        print(f"{there}  {size(count)}")
    if dry_run:
        display.say(f"{len(files)} files would go to {name}; nothing was sent")
        return list(files)
    display.say(f"sending {len(files)} files")
    said = f"{run.root.resolve().name}, by finetune"
    place = push_files(name, files, private=private, said=said, note=display.say)
    display.say(f"the model is at {place}")
    return list(files)


def _files_of_model(folder: Path) -> dict[str, Path]:
    """Return what the export wrote, by the paths in the folder.

    Raises UserError if a file is not there, or if weights are cut.
    """
    marker = read_marker(folder)
    if marker is None:
        raise UserError(
            f"{folder} has no {MARKER}, so it is not known what of it finetune wrote. Copy the "
            "whole run again"
        )
    there = set(_files_in(folder))
    files = {name: folder / name for name in marker.files if name in there}
    if missing := sorted(set(marker.files) - there):
        raise UserError(f"{folder / missing[0]} is missing. Copy the whole run again")
    for name, file in files.items():
        if name.endswith(".safetensors"):
            check_weight_file(file)
    return files


def _files_in(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def card_on_hub(card: str, name: str) -> str:
    """Return a card as it is on the hub under `name`: the code loads it from there.

    A base model that is no hub name, such as a folder, is no longer named in the front matter. One
    that a person wrote in another way, such as a list, stays.
    """
    card = card.replace(f'model="{HERE}"', f'model="{name}"')
    front = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    line = re.search(r"^base_model:.*\n", front[1], re.MULTILINE) if front else None
    if front is None or line is None:
        return card
    begin, end = (front.start(1) + place for place in line.span())
    others = front[1][: line.start()] + front[1][line.end() :]
    try:
        values = parse(front[1])
        base = values.pop("base_model") if isinstance(values, dict) else None
        is_one_line = (parse(others) or {}) == values
    except (yaml.YAMLError, KeyError, ValueError):
        return card
    if not isinstance(base, str) or not is_one_line or re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return card
    return card[:begin] + card[end:]
