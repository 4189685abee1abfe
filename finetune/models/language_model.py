"""A causal language model as the trainer sees it: token ids and targets in, the summed loss out.

`LanguageModel` is what Accelerate wraps, so every use of a parameter is inside its `forward`. The
decoder gives hidden states, and `finetune.compute.loss` turns them and the output head into the
loss. The logits of a batch are never held.

Packing. A new example begins at each position id of 0, and examples must not see each other.
transformers builds the block mask from the position ids by itself, a sliding window included. It
does so only without an attention mask and without a cache
(`transformers.masking_utils.find_packed_sequence_indices`), and not in every architecture:
`finetune.models.probes` checks it.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from finetune.compute.loss import (
    FrozenRows,
    causal_lm_loss,
    causal_lm_loss_of_logits,
    frozen_square_probabilities,
)
from finetune.compute.rotary import padded_positions, switching_length
from finetune.errors import UserError
from finetune.models.describe import CausalLM, context_length, inner_model, token_tables
from finetune.models.fuse import fuse, has_plain_head, output_head, tree_masks
from finetune.models.vocabulary.rows import ActiveHead

_logger = logging.getLogger(__name__)

STATE_SCALES = (1.0, 1e4)
"""What hidden states are multiplied by to try the head: logits of small weights reach no cap."""

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
        self.switching_length = switching_length(self.causal_lm.config.get_text_config())
        # Frozen rows drawn for a training step, and the place of every token's row then.
        self.sample: tuple[FrozenRows, Tensor] | None = None
        self.routers = _router_loss(self.causal_lm)
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
        assert targets.shape[1:] == (2,), "targets are pairs, which `targets_of` makes of labels"
        whole = self.causal_lm.base_model if self.fused else self.causal_lm
        output = self._run(whole, input_ids, position_ids, reach, targets)
        routing = None
        if self.routers is not None and self.training and reduction == "sum":
            routing = self.routers(output.router_logits, targets, input_ids.shape)
        loss = self._loss(output, targets, reduction, inactive)
        return loss if routing is None else loss + routing

    def _loss(
        self, output: Any, targets: Tensor, reduction: str, inactive: Tensor | None
    ) -> Tensor:
        """Return the loss, or scores, from the output of the decoder or of the whole model."""
        if not self.fused:
            logits = output.logits
            inactive = None if inactive is None else inactive[: logits.shape[-1]]
            return causal_lm_loss_of_logits(logits, targets, reduction=reduction, inactive=inactive)
        hidden = output.last_hidden_state
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
        elif inactive is not None:  # the input table may have more rows than the head
            inactive = inactive[: len(head.weight)]
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
        decoder = self.causal_lm.base_model
        return frozen_square_probabilities(
            self._run(decoder, input_ids, position_ids, reach, targets).last_hidden_state,
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

    def _run(
        self,
        module: nn.Module,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        reach: Tensor | None = None,
        targets: Tensor | None = None,
    ):
        packed: dict[str, Any] = {}
        length = input_ids.shape[1]
        if (
            position_ids is None
            and targets is not None
            and length > (self.switching_length or length)
        ):
            # how long a padded text is decides how it is read
            position_ids = padded_positions(_ends(targets, input_ids.shape), length)
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
        with evaluating(model):
            few = min(8, context_length(model) or 8)
            ids = torch.arange(few, device=model.device)[None] % token_tables(model)[0].shape[0]
            hidden = getattr(self._run(model.base_model, ids), "last_hidden_state", None)
            if hidden is None or hidden.shape[-1] != output_head(model).weight.shape[-1]:
                return False
            return all(self._head_is_understood(ids, hidden, scale) for scale in STATE_SCALES)

    def _head_is_understood(self, ids: Tensor, hidden: Tensor, scale: float) -> bool:
        """Return whether the logits of `scale` times the states are those that the loss computes.

        hidden: the states that `ids` have.
        """
        model = self.causal_lm
        head, rule = model.get_output_embeddings(), output_head(model)
        hook = head.register_forward_pre_hook(lambda _, given: (scale * given[0], *given[1:]))
        try:
            theirs = self._run(model, ids).logits.float()
        finally:
            hook.remove()
        is_active = isinstance(head, ActiveHead)  # else the loss takes its weight, as here
        hidden = scale * hidden
        product = head(hidden) if is_active else F.linear(hidden, rule.weight, rule.bias)
        ours = product.float() * rule.logit_scale
        if rule.softcap is not None:
            ours = rule.softcap * torch.tanh(ours / rule.softcap)
        return ours.shape == theirs.shape and bool(
            (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()
        )


class RouterLoss(NamedTuple):
    """The auxiliary loss of a mixture of experts, which spreads the tokens over its experts.

    A call returns its share of a micro-batch: as transformers adds it to the mean over target
    tokens, here it is added to their sum once for each. Tokens after the last target of a sequence
    do not count: no loss depends on them, and they may be padding.
    """

    balance: Callable[..., Tensor]  # transformers' load_balancing_loss_func
    num_experts: int
    num_chosen: int  # experts of each token
    coefficient: float

    def __call__(
        self, router_logits: tuple[Tensor, ...], targets: Tensor, shape: torch.Size
    ) -> Tensor:
        """Return the share of a micro-batch of `shape` [sequences, length]."""
        ends = _ends(targets, shape)
        counted = (torch.arange(shape[1], device=ends.device) < ends[:, None]).int()
        if not len(targets):  # of a process that has no sequence: 0 times the loss of any tokens
            counted = torch.ones_like(counted)
        loss = self.balance(router_logits, self.num_experts, self.num_chosen, counted)
        return self.coefficient * len(targets) * loss


def _ends(targets: Tensor, shape: torch.Size) -> Tensor:
    """Return the place behind the last target of each sequence, [sequences]."""
    (sequences, length), places = shape, targets[:, 0]
    ends = places.new_zeros(sequences)
    return ends.scatter_reduce_(0, places // length, places % length + 2, "amax")


def _router_loss(model: PreTrainedModel) -> RouterLoss | None:
    """Return the loss of the routers if the config asks for it, and log that.

    Raises UserError if it asks for one that this model does not have.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    coefficient = getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", None))
    experts, chosen = (
        getattr(model, name, getattr(config, name, None))
        for name in ("num_experts", "num_experts_per_tok")
    )
    if balance is None or coefficient is None or experts is None or chosen is None:
        raise UserError(
            f"output_router_logits is set for {type(model).__name__}, which has no loss of its "
            "routers. Set it to false in the model's config"
        )
    _logger.warning(
        "%g times the routers' loss is part of the training loss, and not of the held-out loss "
        "(output_router_logits, router_aux_loss_coef)",
        coefficient,
    )
    return RouterLoss(balance, experts, chosen, coefficient)


def _check_sample(targets: Tensor, row_of_id: Tensor) -> None:
    missing = targets[row_of_id[targets] == NOT_SAMPLED]
    if len(missing):
        raise UserError(
            f"the target token {int(missing[0])} does not train and was not drawn for this step. "
            "Make it active, or give the step's targets to FrozenSampler.before_step"
        )


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


@contextmanager
def keeping_casts(module: nn.Module | CausalLM) -> Iterator[None]:
    """Let autocast keep its copies of all weights, as it does of those that require gradients.

    For forwards without gradients, under `torch.no_grad`: in inference mode it keeps none. The
    copies last until autocast ends.
    """
    frozen = [weight for weight in module.parameters() if not weight.requires_grad]
    frozen = [weight for weight in frozen if weight.is_floating_point()]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
