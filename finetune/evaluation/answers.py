"""Metrics of the answers that a model writes to held-out prompts.

chrF (https://aclanthology.org/W15-3049) and BLEU (https://aclanthology.org/P02-1040) are those of
sacrebleu. Each comes with the signature that makes a score comparable with another one
(https://aclanthology.org/W18-6319).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor

from finetune.data.types import Prompt, Tokenizer
from finetune.errors import UserError, did_you_mean
from finetune.inference.generation import GenerationSettings, generate
from finetune.models.describe import CausalLM

TEXT_METRICS = {"chrf": CHRF, "bleu": BLEU}


class Answer(TypedDict):
    """A held-out prompt, the answer in the data, and the model's answer."""

    prompt: str
    reference: str
    output: str


def evaluate_generation(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    metrics: Sequence[str],
    settings: GenerationSettings,
    batch_size: int,
    inactive: Tensor | None = None,
    gather: Callable[[list[Any]], list[Any]] = lambda own: own,
    on_progress: Callable[[int, int], None] | None = None,
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
        settings=settings,
        batch_size=batch_size,
        on_progress=on_progress,
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


def text_metrics(
    names: Sequence[str], outputs: Sequence[str], references: Sequence[str]
) -> dict[str, float | str]:
    """Return the scores of a corpus for each metric in `names`, with the metric's signature.

    For example `{"chrf": 34.4, "chrf_signature": "nrefs:1|..."}`, from 0 to 100.
    An empty output is a wrong one. Raises UserError for an unknown name, or if there is nothing to
    score.
    """
    assert len(outputs) == len(references), (len(outputs), len(references))
    scores: dict[str, float | str] = {}
    for name in names:
        if name not in TEXT_METRICS:
            raise UserError(
                f"there is no metric {name!r}; known are {', '.join(TEXT_METRICS)}"
                f"{did_you_mean(name, TEXT_METRICS)}"
            )
        if not outputs:
            raise UserError(
                f"there is no output to compute {name} from: the held-out data gave no prompt"
            )
        metric = TEXT_METRICS[name]()
        scores[name] = metric.corpus_score(outputs, [references]).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores
