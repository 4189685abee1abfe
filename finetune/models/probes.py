"""Probes of a model before its first step: what it must do, and what it can do.

Later tokens must not change earlier predictions, and neither may the padding or the other sequences
of a batch. Packed examples may see each other in some architectures: those are not packed. Examples
cannot share their beginnings (`finetune.data.batches.trees`) in all. Each probe is a few forwards
over a few tokens.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.compute.rotary import switching_length
from finetune.data.types import IGNORE_INDEX, targets_of
from finetune.errors import UserError
from finetune.models.describe import CausalLM, context_length, inner_model, token_tables
from finetune.models.language_model import LanguageModel, evaluating

Probed = TypeVar("Probed", bound=nn.Module)

LENGTH = 16  # tokens of a probe
PACKED_LENGTHS = (5, 1, 7, 4)  # of the packed examples of a probe; less if a model reads less
ODD_LENGTH = 72  # tokens: a multiple of 8, as batches are, and of no larger power of two
PROBE_WINDOW = 6  # tokens: some in a tree of the probe are further apart
EXACT_UP_TO = 20_000_000  # parameters of a model that is probed in float64

LAYER_KINDS = ("full_attention", "sliding_attention")
"""The kinds of layers, as configs name them, for which there are masks of trees."""

COUNTS_PLACES = {
    "bloom": "its ALiBi counts places instead of positions",
    "mpt": "its ALiBi counts places instead of positions",
    "gpt_neo": "its local layers count places instead of positions",
}
STATEFUL = "its layers carry a state along the sequence"


def some_ids(model: CausalLM, count: int) -> list[int]:
    """Return ordinary tokens: padding and marks may have meanings of their own in a forward."""
    config: Any = model.config.get_text_config()
    special: set[int] = set()
    for name in ("pad", "bos", "eos"):
        ids = getattr(config, f"{name}_token_id", None)
        special.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    rows = min(len(table) for table in token_tables(model) if table is not None)
    ordinary = [i for i in range(rows) if i not in special] or [0]
    return random.Random(0).choices(ordinary, k=count)


def exact(module: Probed) -> Probed:
    """Return a float64 copy of a small model, and a large one itself.

    A small one may have random weights, whose effects can be smaller than float32's rounding.
    """
    if sum(parameter.numel() for parameter in module.parameters()) > EXACT_UP_TO:
        return module
    try:
        found: Any = copy.deepcopy(module).double()
        model = found.causal_lm if isinstance(found, LanguageModel) else inner_model(found)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # grouped products are not for float64
        with torch.no_grad(), evaluating(model):
            ids = torch.tensor([some_ids(model, 4)], device=model.device)
            model(input_ids=ids, use_cache=False)
    except Exception:  # its code has float32 in it, or an engine shards it
        return module
    return found


def enough_alike(found: Tensor, right: Tensor, effect: Tensor) -> bool:
    """Return whether `found` is `right`, up to rounding. `effect`: how much other tokens change.

    A model of small random weights hardly cares for its context, so a share of the largest value
    alone would not show what is mixed up. NaN is not alike.
    """
    if found.shape != right.shape:
        return False
    # Some models compute parts in float32 whatever the dtype of their weights.
    of_effect, of_largest = (1e-5, 1e-8) if found.dtype == torch.float64 else (0.02, 1e-5)
    bound = of_effect * effect + of_largest * right.abs().max()
    return bool((found - right).abs().max() <= bound)


def check_causal(language_model: LanguageModel) -> None:
    """Raise UserError if a prediction depends on a later token, another sequence, or padding."""
    language_model = exact(language_model)
    model, name = language_model.causal_lm, type(language_model.causal_lm).__name__
    length = min(LENGTH, context_length(model) or LENGTH)
    half, ids = length // 2, some_ids(model, 2 * length)
    first, second = ids[:length], ids[length:]
    changed, early = first[:half] + second[half:], slice(0, half - 1)
    alone = _losses(language_model, first)
    together, other, short = _losses(language_model, changed, second, second[:half]).split(
        [length - 1, length - 1, half - 1]
    )
    effect = (together[half:] - other[half:]).abs().max()  # of the first half on the second
    # The predictions of tokens that were not changed, from such tokens.
    if enough_alike(together[early], alone[early], effect) and enough_alike(
        short, other[early], effect
    ):
        _read_in_training(language_model)
        return
    if enough_alike(_losses(language_model, changed)[early], alone[early], effect):
        raise UserError(
            f"{name} mixes the sequences of a batch: the loss of one depends on the others, or on "
            "its padding. Take another model"
        )
    raise UserError(
        f"{name} sees the tokens that it is to predict: later tokens change its earlier "
        "predictions. Take a decoder, or set is_decoder to true in the model's config"
    )


@torch.no_grad()
def _read_in_training(language_model: LanguageModel) -> None:
    """Raise what the model raises if it reads a text in evaluation mode alone.

    Reformer's training takes multiples of 64 tokens, which its evaluation pads to.
    """
    model = language_model.causal_lm
    length = min(ODD_LENGTH, context_length(model) or ODD_LENGTH)
    ids = torch.tensor([some_ids(model, length)], device=model.device)
    with evaluating(language_model), torch.random.fork_rng(devices=[]):  # dropout draws numbers
        language_model.train()
        language_model(ids, targets_of(ids))


def check_packing(language_model: LanguageModel) -> None:
    """Raise UserError unless examples packed into one sequence have the losses they have alone."""
    if (reason := why_not_packed(language_model)) is not None:
        raise UserError(f"{reason}. Set data.packing: false")


def why_not_packed(language_model: LanguageModel) -> str | None:
    """Return why examples cannot be packed into one sequence; None if they can.

    Some architectures (Bloom, whose alibi knows no positions) or attention implementations let them
    see each other.
    """
    language_model = exact(language_model)
    model = language_model.causal_lm
    device, name = model.device, type(model).__name__
    together = sum(PACKED_LENGTHS)
    part = min(together, context_length(model) or together) / together
    lengths = [max(1, int(part * length)) for length in PACKED_LENGTHS]
    ids = torch.tensor([some_ids(model, sum(lengths))], device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    labels = torch.where(positions == 0, IGNORE_INDEX, ids)
    with evaluating(language_model):
        pieces = zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True)
        alone = torch.cat(
            [language_model.token_losses(piece, targets_of(own)) for piece, own in pieces]
        )
        mixed = language_model.token_losses(ids, targets_of(labels))
        try:
            packed = language_model.token_losses(ids, targets_of(labels), positions)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return f"{name} takes no positions that begin anew"
    if enough_alike(packed, alone, (mixed - alone).abs().max()):
        return None
    return (
        f"{name} with {model.config._attn_implementation} attention lets packed examples see each "
        f"other (losses differ by up to {(packed - alone).abs().max():.2g} nats from those of the "
        "examples alone)"
    )


def tree_obstacle(model: CausalLM, *, max_length: int) -> str | None:
    """Return why examples up to `max_length` tokens cannot share beginnings; None if they can."""
    wrapped = cast(Any, model)
    inner = inner_model(wrapped)
    reason = next(_obstacles(wrapped, inner, max_length), None)
    return None if reason is None else f"{type(inner).__name__}: {reason}"


def _obstacles(model: nn.Module, inner: PreTrainedModel, max_length: int) -> Iterator[str]:
    """Yield what keeps a model from trees, each the end of a sentence about it."""
    config: Any = inner.config.get_text_config()
    if inner.config._attn_implementation == "flash_attention_2":
        yield "flash_attention_2 takes no mask. Set model.attn_implementation: sdpa"
    if config.model_type in COUNTS_PLACES:
        yield COUNTS_PLACES[config.model_type]
    if getattr(config, "alibi", False):
        yield COUNTS_PLACES["bloom"]
    kinds = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in kinds or getattr(config, "attention_chunk_size", None):
        yield "its chunked attention counts places instead of positions"
    if getattr(inner, "_is_stateful", False) or kinds - set(LAYER_KINDS):
        yield STATEFUL
    if (limit := switching_length(config)) is not None and max_length > limit:
        yield f"its rotary scaling is another one for examples beyond {limit} tokens"
    if _drops(model):
        yield "its dropout would be drawn once for all examples that share a beginning"
    if getattr(config, "output_router_logits", False):
        yield "its routers' loss would count once what examples share"
    if any(value for key, value in config.to_dict().items() if key.endswith("jitter_noise")):
        yield "its noise would be drawn once for all examples that share a beginning"


def _drops(model: nn.Module) -> bool:
    """Return whether a part of `model` has dropout: torch's module, or a share under some name.

    The names differ: attention_dropout, residual_dropout, hidden_dropout, resid_pdrop, layerdrop.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return True
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float) and value > 0:
                return True
    return False


def why_no_trees(language_model: LanguageModel) -> str | None:
    """Return why examples cannot share their beginnings; None if their losses stay the same."""
    name = type(language_model.causal_lm).__name__
    try:
        probed = exact(language_model)
        with _short_window(probed.causal_lm.config.get_text_config()):
            inside, alone, mixed = _tree_losses(probed)
    except Exception as raised:  # a mask that its code does not expect may raise anything
        return f"{name}: it does not take the mask of a tree ({type(raised).__name__})"
    if enough_alike(inside, alone, (mixed - alone).abs().max()):
        return None
    error = (inside - alone).abs().max()
    return f"{name}: its losses differ by up to {error:.2g} nats from those of the examples alone"


@contextmanager
def _short_window(config: Any) -> Iterator[None]:
    """Let a sliding window be shorter than a probe for a while.

    Not every model uses the window in its config (Moshi's masks have none).
    """
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int) and window > PROBE_WINDOW:
        config.sliding_window = PROBE_WINDOW
    try:
        yield
    finally:
        if isinstance(window, int):
            config.sliding_window = window


def _tree_losses(language_model: LanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of examples in a small tree, alone, and in the tree without its mask."""
    model = language_model.causal_lm
    device = model.device
    # Length, first position and reach of nodes: a root with three branches, one of which has two
    # of its own, and another root.
    nodes = ((9, 0, 23), (8, 9, 22), (2, 17, 19), (3, 17, 22), (1, 9, 23), (5, 0, 28))
    ids = torch.tensor([some_ids(model, 28)], device=device)
    positions = torch.cat([torch.arange(start, start + n) for n, start, _ in nodes])[None]
    reach = torch.cat([torch.full((n,), end) for n, _, end in nodes])[None].to(device)
    positions, places = positions.to(device), torch.arange(28, device=device)
    paths = [(places <= end - 1) & (reach[0] >= end) for end in (19, 22, 23, 28)]
    inside, alone, mixed = [], [], []
    with evaluating(language_model):
        for path in (places[seen] for seen in paths):
            own = ids[:, path]
            targets = targets_of(own)
            alone.append(language_model.token_losses(own, targets))
            moved = torch.stack([path[targets[:, 0]], targets[:, 1]], 1)
            inside.append(language_model.token_losses(ids, moved, positions, reach))
            mixed.append(language_model.token_losses(ids, moved))
    return torch.cat(inside), torch.cat(alone), torch.cat(mixed)


def _losses(language_model: LanguageModel, *texts: list[int]) -> Tensor:
    """Return the loss of each token but the first of each text, padded to one batch."""
    model = language_model.causal_lm
    length, device = max(map(len, texts)), model.device
    pad = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    ids = [text + [pad] * (length - len(text)) for text in texts]
    labels = [text + [IGNORE_INDEX] * (length - len(text)) for text in texts]
    with evaluating(language_model):
        return language_model.token_losses(
            torch.tensor(ids, device=device), targets_of(torch.tensor(labels)).to(device)
        )
