"""The paths in a run's folder, and which of its checkpoints are complete."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.run.marker import MARKER, is_marked, own_files, read_marker, remove_own

MARK = "complete.json"
"""The file in a checkpoint that lists its other files with sizes and hashes, and the step."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """`runs/<name>/` and the paths in it."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config, with every default written out."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """The versions, the machine, the command line and the start time."""
        return self.root / "environment.json"

    @property
    def data(self) -> Path:
        """The counts of the prepared data."""
        return self.root / "data.json"

    @property
    def metrics(self) -> Path:
        """One JSON object for each step and for each evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object for each answer that is kept for a person."""
        return self.root / "samples.jsonl"

    @property
    def log(self) -> Path:
        """What the run said on the terminal, line by line with the time."""
        return self.root / "train.log"

    @property
    def evaluation(self) -> Path:
        """The evaluations before and after training, the best one, and one on test data."""
        return self.root / "evaluation.json"

    @property
    def vocabulary(self) -> Path:
        """The ids of the tokens that the run uses, and which rows train."""
        return self.root / "vocabulary.json"

    @property
    def result(self) -> Path:
        """The outcome of a run of a comparison, written when the run is over."""
        return self.root / "result.json"

    @property
    def updates(self) -> Path:
        """The size of a few updates relative to the weights, in a run of a comparison."""
        return self.root / "updates.jsonl"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.root / "report.html"

    @property
    def checkpoints(self) -> Path:
        """One folder for each checkpoint that is kept."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """A plain Hugging Face folder, loadable by `AutoModelForCausalLM.from_pretrained`."""
        return self.root / "model"

    @property
    def bad_batch(self) -> Path:
        """The batch on which a run stopped with a NaN or diverging loss (`torch.load`)."""
        return self.root / "bad_batch.pt"

    def written(self) -> tuple[Path, ...]:
        """Return every path that a run writes, but for the marker and the lock."""
        return (
            self.config,
            self.environment,
            self.data,
            self.metrics,
            self.samples,
            self.log,
            self.evaluation,
            self.vocabulary,
            self.result,
            self.updates,
            self.report,
            self.bad_batch,
            self.checkpoints,
            self.model,
        )

    def is_run(self) -> bool:
        """Return whether a run was ever begun here. Raises UserError for a damaged marker."""
        return is_marked(self.root, "run")

    def has_started(self) -> bool:
        """Return whether there is something to lose: a step or an evaluation was logged."""
        return self.is_run() and self.metrics.is_file()

    def holds(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is one of this run's, under whichever path it is named.

        The folder of a run's checkpoints, or one of them, may be a link to another disk.
        """
        parents = (checkpoint.resolve().parent, checkpoint.absolute().parent.resolve())
        own = self.checkpoints.resolve() in parents
        return own or run_of(checkpoint).root == self.root.resolve()

    def clear(self) -> None:
        """Delete what the run wrote. Other files stay, also those in its folders.

        A link to a folder stays too: the next run writes there, on the disk that was chosen for it.
        Raises UserError if the disk refuses.
        """
        try:
            remove_checkpoints(self.checkpoints)
            model = read_marker(self.model)
            if model is not None and model.kind == "model":
                remove_own(self.model, model.files, MARKER)
            for path in self.written():
                if path.is_file() or (path.is_symlink() and not path.is_dir()):
                    path.unlink()
        except OSError as error:
            raise UserError(
                f"the run {self.root} could not be deleted: {error.strerror or error}"
            ) from error


def as_path(path: object, of: str) -> Path:
    """Return a caller's path, with ~ written out. `of`: what it should name. Raises UserError."""
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise UserError(f"{path!r:.80} is no path, but of type {kind}. Give the path of {of}")
    return Path(os.path.expanduser(os.fsdecode(path)))


def run_of(checkpoint: Path) -> RunDir:
    """Return the run that a checkpoint lies in."""
    return RunDir(checkpoint.resolve().parent.parent)


def is_written_by_a_run(file: Path) -> bool:
    """Return whether `file` is in a folder that holds a run, also one whose marker was lost."""
    run = RunDir(file.parent)
    return any(map(os.path.lexists, (run.root / MARKER, run.environment, run.metrics)))


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint that is taken after `step`."""
    return checkpoints / f"step-{step:08d}"


@dataclass(frozen=True)
class Mark:
    """complete.json: what a checkpoint holds."""

    step: int  # after which it was taken
    sizes: Mapping[str, int]  # of its files, in bytes
    hashes: Mapping[str, str]

    def as_text(self) -> str:
        """Return what the file holds."""
        files = {
            name: {"bytes": size, "xxh3": self.hashes[name]} for name, size in self.sizes.items()
        }
        return json.dumps({"step": self.step, "files": files}, indent=1)


def read_mark(checkpoint: Path) -> Mark | None:
    """Return the mark of a checkpoint, or None if there is none that can be read."""
    try:
        values = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        files = {
            str(name): (int(f["bytes"]), str(f["xxh3"])) for name, f in values["files"].items()
        }
        step = int(values["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    sizes = {name: size for name, (size, _) in files.items()}
    return Mark(step, sizes, {name: hashed for name, (_, hashed) in files.items()})


def complete_steps(checkpoints: Path) -> list[int]:
    """Return the steps of all complete checkpoints, oldest first."""
    return [step for step, folder in step_folders(checkpoints).items() if is_complete(folder)]


def no_checkpoint(path: Path, checkpoints: Path) -> UserError:
    """Return the mistake of a resume from `path`, with the folders in `checkpoints` to choose."""
    there = [str(folder) for folder in step_folders(checkpoints).values()]
    found = f"Give {' or '.join(there)}" if there else "Give the folder of a checkpoint"
    return UserError(f"there is no checkpoint at {path}. {found}, or auto")


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Return the folders of all checkpoints by their steps, also those that are not complete."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in checkpoints.glob("step-*"))
    return dict(sorted((int(match[1]), checkpoints / match[0]) for match in found if match))


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint, or None if there is none."""
    steps = complete_steps(checkpoints)
    return checkpoint_path(checkpoints, steps[-1]) if steps else None


def is_complete(checkpoint: Path) -> bool:
    """Return whether every file that the mark lists is there with its size."""
    mark = read_mark(checkpoint)
    if mark is None:
        return False
    files = own_files(checkpoint, tuple(mark.sizes))
    try:
        sizes = [file.stat().st_size for file in files]
    except OSError:
        return False
    return sizes == list(mark.sizes.values())


def step_of(checkpoint: Path) -> int:
    """Return the step after which a complete checkpoint was taken. Its folder may be renamed."""
    mark = read_mark(checkpoint)
    assert mark is not None, checkpoint
    return mark.step


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete what a save wrote into the folder of a checkpoint, complete or not. Raises OSError.

    A folder whose mark cannot be read stays, because it is not known what in it is ours.
    """
    mark = read_mark(checkpoint)
    if mark is not None:
        remove_own(checkpoint, tuple(mark.sizes), MARK)
    elif checkpoint.is_dir() and not any(checkpoint.iterdir()):
        checkpoint.rmdir()


def remove_checkpoints(checkpoints: Path) -> None:
    """Delete all checkpoints of a run, what a killed save left, and the folder. Raises OSError."""
    for folder in reversed(step_folders(checkpoints).values()):
        remove_checkpoint(folder)
    remove_unfinished(checkpoints)
    if checkpoints.is_dir() and not checkpoints.is_symlink() and not os.listdir(checkpoints):
        checkpoints.rmdir()


def remove_unfinished(checkpoints: Path) -> None:
    """Delete the folders of saves that were killed. Raises OSError."""
    for folder in checkpoints.glob(".step-*"):
        shutil.rmtree(folder)
