"""Metrics of a loss and of generated text.

Floor 1. chrF (https://aclanthology.org/W15-3049) and BLEU (https://aclanthology.org/P02-1040) are sacrebleu's, each with the
signature that makes a score comparable with another one (https://aclanthology.org/W18-6319).
"""

import math
from collections.abc import Sequence

from sacrebleu.metrics import BLEU, CHRF

from finetune.errors import UserError, did_you_mean

TEXT_METRICS = {"chrf": CHRF, "bleu": BLEU}


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats per token; infinity where that is more than a float can hold."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return `nats` (a sum over tokens) as bits per byte of their text: comparable between tokenizers; NaN without bytes."""
    return nats / math.log(2) / num_bytes if num_bytes else math.nan


def text_metrics(
    names: Sequence[str], outputs: Sequence[str], references: Sequence[str]
) -> dict[str, float | str]:
    """Score a corpus: `{"chrf": 34.4, "chrf_signature": "nrefs:1|...", ...}` for each of `names`, from 0 to 100.

    An empty output is a wrong one. Raises UserError for an unknown name, and where there is nothing to score.
    """
    assert len(outputs) == len(references), (len(outputs), len(references))
    scores: dict[str, float | str] = {}
    for name in names:
        if name not in TEXT_METRICS:
            raise UserError(
                f"there is no metric {name!r}{did_you_mean(name, TEXT_METRICS)}; known are {', '.join(TEXT_METRICS)}"
            )
        if not outputs:
            raise UserError(
                f"there is no output to compute {name} from: the held-out data gave no prompt"
            )
        metric = TEXT_METRICS[name]()
        scores[name] = metric.corpus_score(outputs, [references]).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores
