"""The names of the files in a run's folder: the only thing that training and reading share.

Floor 0.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunDir:
    """`runs/<name>/` and what lies in it."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config, every default written out."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, machine, command line, start time."""
        return self.root / "environment.json"

    @property
    def data(self) -> Path:
        """Counts of the prepared data: rows, examples, tokens, truncated, dropped."""
        return self.root / "data.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step: step, epoch, loss, lr, grad_norm, num_target_tokens, num_tokens, tokens_per_second, seconds.

        A line with an "evaluation" key holds the metrics of an evaluation at that step instead of a loss.
        """
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object a generated sample: step, prompt, reference, output."""
        return self.root / "samples.jsonl"

    @property
    def evaluation(self) -> Path:
        """Metrics before and after training: {"before": {...}, "after": {...}, "best": {...}}."""
        return self.root / "evaluation.json"

    @property
    def vocabulary(self) -> Path:
        """The ids of the tokens that the run uses: {"used": [...]}. Not there where it uses the whole vocabulary."""
        return self.root / "vocabulary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def checkpoints(self) -> Path:
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
        return self.config.is_file()

    def has_started(self) -> bool:
        """Whether there is something to lose: an evaluation or a step was logged."""
        return self.is_run() and self.metrics.is_file()
