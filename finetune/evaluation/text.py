"""Metrics of the answers that a model writes to held-out prompts.

Floor 3.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

from torch import Tensor

from finetune.data.rendering import Tokenizer
from finetune.data.types import Prompt
from finetune.generation import SamplingSettings, generate
from finetune.metrics import text_metrics


class Answer(TypedDict):
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
) -> tuple[dict[str, float | str], list[Answer]]:
    """Answer `prompts`; return the metrics (see `text_metrics`) and all answers.

    `prompts` are this process's share, a block of the whole, so that the answers keep their order.
    `gather` joins the lists of all processes. `metrics` may be empty, for the answers alone.
    `inactive`: [V] bool; the scores then have `generated_outside`, the share of such tokens in all
    that was generated.
    """
    generated = generate(
        model,
        [prompt.input_ids for prompt in prompts],
        batch_size=batch_size,
        on_progress=on_progress,
        **settings,
    )
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in generated]
    own = [
        Answer(prompt=p.text, reference=p.reference, output=text) for p, text in zip(prompts, texts)
    ]
    answers = gather(own)
    scores = text_metrics(
        metrics, [a["output"] for a in answers], [a["reference"] for a in answers]
    )
    if inactive is not None:
        outside = gather([bool(inactive[token]) for tokens in generated for token in tokens])
        scores["generated_outside"] = sum(outside) / max(1, len(outside))
    return scores, answers
