"""Metrics of the answers that a model writes to held-out prompts.

chrF (https://aclanthology.org/W15-3049) and BLEU (https://aclanthology.org/P02-1040) are those of
sacrebleu. Each comes with the signature that makes a score comparable with another one
(https://aclanthology.org/W18-6319).
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NotRequired, TypedDict

from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor

from finetune.data.formats.languages import script_of
from finetune.data.types import Prompt, Tokenizer
from finetune.errors import UserError, did_you_mean
from finetune.evaluation.tool_calls import call_scores, judge_calls
from finetune.inference.decoder import GenerationSettings, answer_room
from finetune.inference.generation import generate
from finetune.models.describe import CausalLM

TEXT_METRICS = ("chrf", "bleu")
_TOKENIZERS = {  # script -> sacrebleu's tokenizer; others have blanks between words
    **dict.fromkeys(("Hans", "Hant", "Hani"), "zh"),
    "Jpan": "ja-mecab",
    "Kore": "ko-mecab",
    **dict.fromkeys(("Thai", "Laoo", "Khmr", "Mymr", "Tibt"), "char"),
}
TOOL_CALLS = "tool_calls"
"""The metric of the answers that should call tools (see `tool_calls`)."""


class Answer(TypedDict):
    """A held-out prompt, the answer in the data, and the model's answer."""

    prompt: str
    reference: str
    output: str
    language: str | None  # of the reference, if it is known
    cut: bool  # it has all the tokens that it may have
    calls: NotRequired[tuple[bool, bool]]  # see `judge_calls`; only until the scores are made


def evaluate_generation(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    metrics: Sequence[str],
    settings: GenerationSettings,
    batch_size: int,
    first: int = 0,
    inactive: Tensor | None = None,
    gather: Callable[[list[Any]], list[Any]] = lambda own: own,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, float | str], list[Answer]]:
    """Answer `prompts`; return the metrics (see `text_metrics`) and all answers.

    `prompts` are this process's share, a block of the whole, so that the answers keep their order.
    `first` is the number of its first prompt in the whole.
    `gather` joins the lists of all processes. `metrics` may be empty, for the answers alone. Calls
    of tools are judged whenever references have some.
    `inactive`: [V] bool; the scores then have `generated_outside`, the share of such tokens in all
    that was generated.
    """
    generated = generate(
        model,
        [prompt.input_ids for prompt in prompts],
        settings=settings,
        batch_size=batch_size,
        first=first,
        on_progress=on_progress,
    )
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in generated]
    own = [
        Answer(
            prompt=prompt.text,
            reference=prompt.reference,
            output=text,
            language=prompt.language,
            cut=len(tokens) >= answer_room(model, prompt.input_ids, settings.max_new_tokens),
        )
        for prompt, text, tokens in zip(prompts, texts, generated)
    ]
    for number, (prompt, tokens) in enumerate(zip(prompts, generated)):
        if prompt.tool_calls:
            own[number]["calls"] = judge_calls(tokenizer, prompt, tokens)
    answers = gather(own)
    texts_of = [name for name in metrics if name != TOOL_CALLS]
    scores = text_metrics(
        texts_of,
        [a["output"] for a in answers],
        [a["reference"] for a in answers],
        languages=[a["language"] for a in answers],
    )
    scores |= call_scores([a.pop("calls") for a in answers if "calls" in a])
    if inactive is not None:
        outside = gather([bool(inactive[token]) for tokens in generated for token in tokens])
        scores["generated_outside"] = sum(outside) / max(1, len(outside))
    return scores, answers


def text_metrics(
    names: Sequence[str],
    outputs: Sequence[str],
    references: Sequence[str],
    *,
    languages: Sequence[str | None] = (),
) -> dict[str, float | str]:
    """Return the scores of a corpus for each metric in `names`, with the metric's signature.

    For example `{"chrf": 34.4, "chrf_signature": "nrefs:1|..."}`, from 0 to 100. `languages` are
    those of the references, if they are known: BLEU cuts each into words by its language's rules.
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
        scores[name], scores[f"{name}_signature"] = (
            _bleu(outputs, references, languages) if name == "bleu" else _chrf(outputs, references)
        )
    return scores


def _chrf(outputs: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    metric = CHRF()
    return metric.corpus_score(outputs, [references]).score, str(metric.get_signature())


def _bleu(
    outputs: Sequence[str], references: Sequence[str], languages: Sequence[str | None]
) -> tuple[float, str]:
    """Return BLEU and its signature, with each sentence cut into words by its language's rules."""
    used = [_tokenizer_of(language) for language in languages] or ["13a"] * len(outputs)
    names = sorted(set(used))
    if len(names) == 1:
        metric = BLEU(tokenize=names[0])
        return metric.corpus_score(outputs, [references]).score, str(metric.get_signature())
    cut = {name: BLEU(tokenize=name).tokenizer for name in names}
    outputs, references = (
        [cut[name](text.rstrip()) for name, text in zip(used, side, strict=True)]
        for side in (outputs, references)
    )
    metric = BLEU(tokenize="none", force=True)  # the words are cut already
    score = metric.corpus_score(outputs, [references]).score
    return score, str(metric.get_signature()).replace("tok:none", f"tok:{'+'.join(names)}")


@cache
def _tokenizer_of(language: str | None) -> str:
    """Return sacrebleu's name of what cuts text of a language into words.

    It is "char" if the script has no blanks between words, or if MeCab is not installed.
    """
    name = _TOKENIZERS.get(script_of(language) or "", "13a") if language else "13a"
    try:
        BLEU(tokenize=name)
    except (ImportError, RuntimeError):
        return "char"
    return name
