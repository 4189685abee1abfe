"""Clipping of row-sparse gradients in Lightning, where `configure_optimizers` builds any optimizer of the factory as it is.

Floor 2. Lightning clips by torch's `clip_grad_norm_`, which raises NotImplementedError on a sparse gradient, in the hook
`LightningModule.configure_gradient_clipping`, which is made to be overridden.
"""

import torch

from finetune.errors import UserError
from finetune.optim import clip_grad_norm_


class ClipsRows:
    """A base class to put before LightningModule: `gradient_clip_val` over dense and row-sparse gradients together."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of `optimizer` by their norm. Raises UserError for gradient_clip_algorithm="value"."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(
                f"gradient_clip_algorithm is {gradient_clip_algorithm!r}; row-sparse gradients are clipped by 'norm'"
            )
        clip_grad_norm_(
            [parameter for group in optimizer.param_groups for parameter in group["params"]],
            gradient_clip_val,
        )
