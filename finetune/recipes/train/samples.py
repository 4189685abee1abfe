"""The answers before and after training, as a run shows them in the terminal at its end."""

from finetune.display import Display
from finetune.run.folder import RunDir
from finetune.run.records import Evaluations, read_samples

MOST_SAMPLES = 2
"""So many held-out prompts; the report has them all."""


def say_samples(run: RunDir, display: Display) -> None:
    """Say how the model answered the first held-out prompts, before and after training."""
    samples, _ = read_samples(run)
    after = Evaluations.read(run).after
    first = {sample.prompt: sample.output for sample in samples if sample.step == 0}
    last = [sample for sample in samples if after is not None and sample.step == after.step > 0]
    for sample in [sample for sample in last if sample.prompt in first][:MOST_SAMPLES]:
        display.say(f"\n{_line(sample.prompt)}")
        display.say(f"  before:    {_line(first[sample.prompt])}")
        display.say(f"  after:     {_line(sample.output)}")
        display.say(f"  reference: {_line(sample.reference)}")


def _line(text: str, width: int = 160) -> str:
    """Return the text on one line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
