"""How a model can read several prompts at once, found out by trying it.

An answer must not depend on the prompts beside it. Full attention knows from the mask what is
padding. A window that counts places, learned positions without position ids, and recurrent states
do not. So the ways are tried on a few tokens, the fastest first, against forwards of each text
alone. The last way needs nothing but such forwards.
"""

import logging
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from finetune.compute.rotary import keep_texts_apart
from finetune.inference.decoder import Decoder, GenerationSettings, Way
from finetune.models.describe import CausalLM, context_length, inner_model, taken
from finetune.models.language_model import evaluating
from finetune.models.probes import enough_alike, exact, some_ids

_logger = logging.getLogger(__name__)

WAYS = (
    Way(shares=True, pads=True, batches=True, caches=True),
    Way(pads=True, batches=True, caches=True),
    Way(batches=True, caches=True),
    Way(caches=True),
    Way(),
)
NEW_TOKENS = 3  # of each text in a trial
SHORT_WINDOW = 64  # places: a trial outgrows windows up to this length
PLACES = re.compile(r"window|chunk|local")
"""What the keys of a config say of attention that counts places, padding included."""

_found: weakref.WeakKeyDictionary[Any, Way] = weakref.WeakKeyDictionary()


def way_of(model: CausalLM) -> Way:
    """Return the fastest way in which `model` answers as it does alone. It is tried once a model.

    Logs a warning if prompts of several lengths cannot be answered together.
    """
    inner = inner_model(cast(Any, model))
    if inner not in _found:
        keep_texts_apart(inner)
        probed = exact(cast(Any, model))
        with evaluating(probed), torch.autocast(model.device.type, enabled=False):
            way = _found[inner] = _first_right(probed)
        if not way.pads:
            _logger.warning(
                "%s does not know padding from text: %s",
                type(inner).__name__,
                "only prompts of one length are answered together"
                if way.batches
                else "prompts are answered one by one"
                + ("" if way.caches else ", and each token reads the whole text again"),
            )
    return _found[inner]


def batches_of(prompts: Sequence[Sequence[int]], way: Way, size: int) -> Iterator[list[int]]:
    """Yield the numbers of the prompts that are read together, at most `size`, longest first."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True):
        fits = way.pads or not batch or len(prompts[i]) == len(prompts[batch[0]])
        if len(batch) == (size if way.batches else 1) or not fits:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _first_right(model: CausalLM) -> Way:
    window, limit = window_of(model.config.get_text_config().to_dict()), context_length(model) or 64
    length = 16 if window is None or window > SHORT_WINDOW else window + 12
    length = max(6, min(length, limit - NEW_TOKENS))
    for way in WAYS[:-1]:
        if not (way.shares and window is not None) and _is_as_alone(model, way, length):
            return way
    return WAYS[-1]


def window_of(config: Mapping[str, Any]) -> int | None:
    """Return the shortest window of places in a config; None without one, 0 if it is not known."""
    found = [0] if re.search("sliding|chunk|local", str(config.get("layer_types"))) else []
    for key, value in config.items():
        if isinstance(value, Mapping):
            inner = window_of(value)
            found += [] if inner is None else [inner]
        elif PLACES.search(str(key)) and not re.search("num_|layers", str(key)):
            found += [value] if isinstance(value, int) and value > 1 else []
    return min((places for places in found if places), default=0) if found else None


class _Trial(Decoder):
    """A decoder that keeps its logits, and whose answers are given."""

    def __init__(self, model: CausalLM, texts: dict[int, list[int]], way: Way) -> None:
        prompts = {i: text[:-NEW_TOKENS] for i, text in texts.items()}
        super().__init__(
            model, prompts, dict.fromkeys(prompts, GenerationSettings.greedy(NEW_TOKENS)), way
        )
        self.texts, self.logits = texts, dict[int, list[Tensor]]((i, []) for i in texts)
        if len(texts) > 1:
            self.room[max(texts)] -= 1  # it leaves the batch before the others

    def _choose(self, logits: Tensor) -> Tensor:
        chosen = []
        for i, row in zip(self.rows, logits, strict=True):
            self.logits[i].append(row)
            chosen.append(self.texts[i][len(self.logits[i]) - 1 - NEW_TOKENS])
        return torch.tensor(chosen, device=self.device)


def _is_as_alone(model: CausalLM, way: Way, length: int) -> bool:
    """Return whether texts of up to `length` tokens have the logits that they have alone."""
    ids = some_ids(model, 4 * length)
    *texts, fourth = (ids[n * length : (n + 1) * length] for n in range(4))
    texts = [text[: length - 2 * n * way.pads] for n, text in enumerate(texts)]
    start = texts[0][: length // 3]
    cases = [texts[1:]]
    if way.shares:
        cases.append([start + text[len(start) :] for text in texts])
        other = texts[2][: max(1, len(start) - 2)]  # a second start, of another length
        cases.append([*cases[1][:2], texts[2], other + fourth[len(other) :]])
    try:
        return all(_case_is_right(model, way, case, start) for case in cases)
    except Exception:  # a cache of another kind, or a forward that takes other arguments
        return False


def _case_is_right(model: CausalLM, way: Way, texts: list[list[int]], start: list[int]) -> bool:
    """Return whether `texts` have the logits that they have alone. `start` is of another text."""
    prompts = [text[:-NEW_TOKENS] for text in texts]
    found: dict[int, Tensor] = {}
    for members in batches_of(prompts, way, size=len(texts)):
        trial = _Trial(model, {i: texts[i] for i in members}, way)
        while trial.active:
            trial.step()
        found |= {i: torch.stack(rows) for i, rows in trial.logits.items()}
    places = {
        i: slice(len(prompt) - 1, len(prompt) - 1 + len(found[i]))
        for i, prompt in enumerate(prompts)
    }
    right = {i: _logits_alone(model, text)[places[i]] for i, text in enumerate(texts)}
    swapped = [*reversed(start), *texts[0][len(start) :]]
    effect = _logits_alone(model, swapped)[places[0]] - right[0]
    return all(enough_alike(rows, right[i], effect.abs().max()) for i, rows in found.items())


@torch.inference_mode()
def _logits_alone(model: CausalLM, text: list[int]) -> Tensor:
    """Return the logits [length, V] of one text that is read at once, without a cache."""
    ids = torch.tensor([text], device=model.device)
    return model(input_ids=ids, **taken(model, {"use_cache": False})).logits[0]
