"""The paths in a run's folder, and which of its checkpoints are complete."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

MARK = "complete.json"
"""The file in a checkpoint that lists all its other files with their sizes, and the step."""


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

    def is_run(self) -> bool:
        """Return whether a run has begun here."""
        return self.config.is_file()

    def has_started(self) -> bool:
        """Return whether there is something to lose: a logged step or evaluation."""
        return self.is_run() and self.metrics.is_file()

    def clear(self) -> None:
        """Delete the run. Other files in the folder stay."""
        for folder in (self.checkpoints, self.model):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (
            self.config,
            self.environment,
            self.data,
            self.metrics,
            self.samples,
            self.evaluation,
            self.vocabulary,
            self.result,
            self.updates,
            self.report,
            self.bad_batch,
        ):
            file.unlink(missing_ok=True)


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint that is taken after `step`."""
    return checkpoints / f"step-{step:08d}"


def complete_steps(checkpoints: Path) -> list[int]:
    """Return the steps of all complete checkpoints, oldest first."""
    folders = checkpoints.glob("step-*") if checkpoints.is_dir() else ()
    found = (re.fullmatch(r"step-(\d{8,})", folder.name) for folder in folders)
    return sorted(int(match[1]) for match in found if match and is_complete(checkpoints / match[0]))


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint, or None if there is none."""
    steps = complete_steps(checkpoints)
    return checkpoint_path(checkpoints, steps[-1]) if steps else None


def is_complete(checkpoint: Path) -> bool:
    """Return whether every file that the mark lists is there with its size."""
    try:
        sizes = json.loads((checkpoint / MARK).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def step_of(checkpoint: Path) -> int:
    """Return the step of a complete checkpoint. Its folder may have been renamed."""
    return json.loads((checkpoint / MARK).read_text())["step"]
