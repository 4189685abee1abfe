"""Metrics of the answers that a model writes to held-out prompts.

Floor 3.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

from torch import Tensor

from finetune.data.types import Prompt, Tokenizer
from finetune.generation import SamplingSettings, generate
from finetune.metrics import text_metrics


class Sample(TypedDict):
    """A held-out prompt, the answer in the data, and the model's answer."""

    prompt: str
    reference: str
    output: str


def evaluate_generation(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    metrics: Sequence[str],
    batch_size: int,
    inactive: Tensor | None = None,
    gather: Callable[[list[Any]], list[Any]] = lambda own: own,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Unpack[SamplingSettings],
) -> tuple[dict[str, float | str], list[Sample]]:
    """Answer `prompts` and score the answers: the metrics with their signatures (see `text_metrics`), and all samples.

    `prompts` are this process's share (a block of the whole, so that the samples keep their order); `gather` joins the lists of all
    processes. `metrics` may be empty, for the samples alone. `inactive`: [V] bool; the scores then have `generated_outside`, the
    share of such tokens in all that was generated.
    """
    answers = generate(
        model,
        [prompt.input_ids for prompt in prompts],
        batch_size=batch_size,
        on_progress=on_progress,
        **settings,
    )
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    own = [
        Sample(prompt=p.text, reference=p.reference, output=text) for p, text in zip(prompts, texts)
    ]
    samples = gather(own)
    scores = text_metrics(
        metrics, [s["output"] for s in samples], [s["reference"] for s in samples]
    )
    if inactive is not None:
        outside = gather([bool(inactive[token]) for answer in answers for token in answer])
        scores["generated_outside"] = sum(outside) / max(1, len(outside))
    return scores, samples
