"""A causal language model as the trainer sees it: token ids and targets in, the summed loss out.

`LanguageModel` is what Accelerate wraps, so every use of a parameter is inside its `forward`. The
decoder gives hidden states, and `finetune.compute.loss` turns them and the output head into the
loss. The logits of a batch are never held.

Packing. A new example begins at each position id of 0, and examples must not see each other.
transformers builds the block mask from the position ids by itself, a sliding window included. It
does so only without an attention mask and without a cache
(`transformers.masking_utils.find_packed_sequence_indices`), and not in every architecture:
`check_packing` checks it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.compute.loss import (
    FrozenRows,
    causal_lm_loss,
    causal_lm_loss_of_logits,
    frozen_square_probabilities,
)
from finetune.data.types import IGNORE_INDEX, targets_of
from finetune.errors import UserError
from finetune.models.describe import CausalLM, inner_model, token_tables
from finetune.models.fuse import fuse, has_plain_head, output_head
from finetune.models.trees import tree_masks
from finetune.models.vocabulary.rows import ActiveHead

_logger = logging.getLogger(__name__)

NOT_SAMPLED = -1
"""In the place of a row's number: that row is frozen and was not drawn."""


class LanguageModel(nn.Module):
    """A causal language model of transformers, with or without LoRA, as a map to its loss.

    The model itself is `.model`. Some models do more to their logits than one matrix product. A
    soft cap (Gemma), a scale (Granite, Cohere) and a bias (Phi) are known. Whether anything else
    happens is checked once, at the start, on a few tokens. If so, `fused` is False: the model's own
    forward then makes all logits at once, which costs memory.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model
        fuse(self.causal_lm)
        # Frozen rows drawn for a training step, and the place of every token's row then.
        self.sample: tuple[FrozenRows, Tensor] | None = None
        self.fused = self._logits_are_understood()
        if not self.fused:
            _logger.warning(
                "%s computes its logits in a way of its own: the loss takes them all at once, "
                "which costs memory",
                type(self.causal_lm).__name__,
            )

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
        reach: Tensor | None = None,
        reduction: str = "sum",
        inactive: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a micro-batch in nats: summed over target tokens, or of each of them.

        input_ids, position_ids and reach [sequences, length] and targets [N, 2] are as in
        `finetune.data.types.MicroBatch`; `targets_of` there makes targets of labels. "sum" gives
        the sum, a float32 scalar. "none" gives scores without gradients, [N, 2] float32 in the
        order of the targets: the loss of each, and the probability of the tokens `inactive` ([V]
        bool; 0 without them). Raises UserError for a target that is neither active nor among the
        frozen rows drawn for the step.
        """
        if not self.fused:
            logits = self._run(self.causal_lm, input_ids, position_ids, reach).logits
            return causal_lm_loss_of_logits(logits, targets, reduction=reduction, inactive=inactive)
        hidden = self._hidden(input_ids, position_ids, reach)
        head = output_head(self.causal_lm)
        module = self.causal_lm.get_output_embeddings()
        if isinstance(module, ActiveHead):
            vocabulary = module.vocabulary
            row_of_id = vocabulary.row_of_id
            if self.sample is not None and self.training and reduction == "sum":
                frozen, row_of_id = self.sample
                head = head._replace(frozen=frozen)
                _check_sample(targets[:, 1], row_of_id)
            targets = torch.stack([targets[:, 0], row_of_id[targets[:, 1]]], 1)
            if inactive is not None:
                ids = torch.cat([vocabulary.active_ids.clamp(min=0), vocabulary.frozen_ids])
                inactive = inactive[ids]
        return causal_lm_loss(
            hidden, targets, **head._asdict(), reduction=reduction, inactive=inactive
        )

    @torch.no_grad()
    def token_losses(
        self,
        input_ids: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each target token in nats, [N] float32, in the targets' order.

        Sets no mode: call `eval()` before.
        """
        return self(input_ids, targets, position_ids, reach, reduction="none")[:, 0]

    @torch.no_grad()
    def frozen_square_probabilities(
        self,
        input_ids: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Return each frozen row's squared probability, summed over the N targets, and N.

        The first is [F] float32.
        """
        head = output_head(self.causal_lm)
        assert head.frozen is not None
        hidden = self._hidden(input_ids, position_ids, reach)
        return frozen_square_probabilities(
            hidden,
            targets,
            head.weight,
            head.frozen,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The model of transformers, inside peft's wrapper if there is one."""
        return inner_model(self.model)

    def _hidden(
        self, input_ids: Tensor, position_ids: Tensor | None, reach: Tensor | None
    ) -> Tensor:
        decoder = self.causal_lm.base_model
        return self._run(decoder, input_ids, position_ids, reach).last_hidden_state

    def _run(
        self,
        module: nn.Module,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        reach: Tensor | None = None,
    ):
        packed: dict[str, Any] = {}
        if position_ids is not None:
            packed["position_ids"] = position_ids
        if position_ids is not None and reach is not None:
            packed["attention_mask"] = tree_masks(self.causal_lm, position_ids, reach)
        return module(input_ids=input_ids, use_cache=False, **packed)

    @torch.no_grad()
    def _logits_are_understood(self) -> bool:
        model = self.causal_lm
        if not has_plain_head(model):
            return False
        head, rule = model.get_output_embeddings(), output_head(model)
        with evaluating(model):
            ids = torch.arange(8, device=model.device)[None] % token_tables(model)[0].shape[0]
            theirs = self._run(model, ids).logits.float()
            hidden = getattr(self._run(model.base_model, ids), "last_hidden_state", None)
            if hidden is None or hidden.shape[-1] != rule.weight.shape[-1]:
                return False
            ours = head(hidden).float() * rule.logit_scale
            if rule.softcap is not None:
                ours = rule.softcap * torch.tanh(ours / rule.softcap)
        return ours.shape == theirs.shape and bool(
            (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()
        )


def _check_sample(targets: Tensor, row_of_id: Tensor) -> None:
    missing = targets[row_of_id[targets] == NOT_SAMPLED]
    if len(missing):
        raise UserError(
            f"the target token {int(missing[0])} does not train and was not drawn for this step. "
            "Make it active, or give the step's targets to FrozenSampler.before_step"
        )


def check_packing(language_model: LanguageModel) -> None:
    """Raise UserError unless examples packed into one sequence have the losses they have alone.

    Some architectures (Bloom, whose alibi knows no positions) or attention implementations let them
    see each other.
    """
    model = language_model.causal_lm
    vocabulary, device = token_tables(model)[0].shape[0], model.device
    lengths = (5, 1, 7, 4)
    ids = torch.arange(sum(lengths), device=device)[None] * 7 % vocabulary
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    labels = torch.where(positions == 0, IGNORE_INDEX, ids)
    with evaluating(language_model):
        packed = language_model.token_losses(ids, targets_of(labels), positions)
        pieces = zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True)
        alone = torch.cat(
            [language_model.token_losses(piece, targets_of(own)) for piece, own in pieces]
        )
        mixed = language_model.token_losses(ids, targets_of(labels))
    error, leak = (packed - alone).abs().max(), (mixed - alone).abs().max()
    if not error <= 0.1 * leak + 1e-5:  # NaN is refused too
        raise UserError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets "
            f"packed examples see each other (losses differ by up to {error:.2g} nats from those "
            "of the examples alone). Set data.packing: false"
        )


def check_trees(language_model: LanguageModel) -> str | None:
    """Return what is wrong if examples that share beginnings lose other than they do alone.

    It is the end of a sentence about the model; None if nothing is wrong.
    """
    try:
        error, leak = _tree_error(language_model)
    except Exception as raised:  # a mask that its code does not expect may raise anything
        return f"it does not take the mask of a tree ({type(raised).__name__})"
    if not error <= 0.1 * leak + 1e-5:  # NaN is wrong too
        return f"its losses differ by up to {error:.2g} nats from those of the examples alone"
    return None


def _tree_error(language_model: LanguageModel) -> tuple[Tensor, Tensor]:
    """Return by how much losses in a small tree differ from those alone, and without its mask."""
    model = language_model.causal_lm
    vocabulary, device = token_tables(model)[0].shape[0], model.device
    # a root of 9 tokens with branches of 8 (with two of their own), 3 and 1, and another root of 5
    nodes = ((9, 0, 23), (8, 9, 22), (2, 17, 19), (3, 17, 22), (1, 9, 23), (5, 0, 28))
    ids = torch.arange(28, device=device)[None] * 7 % vocabulary
    positions = torch.cat([torch.arange(start, start + n) for n, start, _ in nodes])[None]
    reach = torch.cat([torch.full((n,), end) for n, _, end in nodes])[None].to(device)
    positions, places = positions.to(device), torch.arange(28, device=device)
    paths = [(places <= end - 1) & (reach[0] >= end) for end in (19, 22, 23, 28)]
    with evaluating(language_model):
        inside, alone, mixed = [], [], []
        for path in (places[seen] for seen in paths):
            own = ids[:, path]
            targets = targets_of(torch.cat([own[:, :1] * 0 + IGNORE_INDEX, own[:, 1:]], 1))
            alone.append(language_model.token_losses(own, targets))
            moved = torch.stack([path[targets[:, 0]], targets[:, 1]], 1)
            inside.append(language_model.token_losses(ids, moved, positions, reach))
            mixed.append(language_model.token_losses(ids, moved))
    right = torch.cat(alone)
    return (torch.cat(inside) - right).abs().max(), (torch.cat(mixed) - right).abs().max()


@contextmanager
def evaluating(module: nn.Module | CausalLM) -> Iterator[None]:
    """Put `module` in evaluation mode for a while, then each submodule back in its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
