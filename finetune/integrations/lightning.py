"""Clipping of row-sparse gradients in Lightning.

`configure_optimizers` can build any optimizer of the factory without help. Only clipping needs it:
Lightning uses torch's `clip_grad_norm_`, which refuses a sparse gradient before torch 2.14. It does
so in `LightningModule.configure_gradient_clipping`, a hook that is made to be overridden.
"""

import torch

from finetune.errors import UserError
from finetune.optim import clip_grad_norm_


class ClipsRows:
    """A base class to put before LightningModule: clips dense and row-sparse gradients together."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of `optimizer` to a norm of `gradient_clip_val`.

        Raises UserError for gradient_clip_algorithm="value".
        """
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(
                f"gradient_clip_algorithm is {gradient_clip_algorithm!r}, but row-sparse gradients "
                "can only be clipped by norm. Set it to 'norm'"
            )
        clip_grad_norm_(
            [parameter for group in optimizer.param_groups for parameter in group["params"]],
            gradient_clip_val,
        )
