"""`finetune push`: a run's model on the Hugging Face hub, with its card. No weight is loaded."""

from collections.abc import Sequence
from pathlib import Path

from finetune.display import Display
from finetune.errors import UserError
from finetune.models.locate import check_hub_name, push_files
from finetune.recipes.build.look import look_at_target
from finetune.report.card import card_on_hub
from finetune.run.marker import MARKER
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

    `gguf`: files besides those in the run's folder. `dry_run` lists the files only. Raises
    UserError if `root` is no finished run, if a file is missing, or if the hub refuses.
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
    found = [path for path in sorted(run.model.rglob("*")) if path.is_file()]
    local = {path.relative_to(run.model).as_posix(): path for path in found if path.name != MARKER}
    for path in extra:
        other = local.setdefault(path.name, path)
        if other.resolve() != path.resolve():
            raise UserError(
                f"{other} and {path} would have the same name on the hub. Rename one of them"
            )
    files: dict[str, Path | bytes] = {**local}
    if CARD in files:
        card = (run.model / CARD).read_text(encoding="utf-8")
        files[CARD] = card_on_hub(card, name).encode()
    for there, file in files.items():
        count = len(file) if isinstance(file, bytes) else file.stat().st_size
        print(f"{there}  {size(count)}")
    if dry_run:
        display.say(f"{len(files)} files would go to {name}; nothing was sent")
        return list(files)
    display.say(f"sending {len(files)} files")
    place = push_files(name, files, private=private, said=f"{run.root.resolve().name}, by finetune")
    display.say(f"the model is at {place}")
    return list(files)
