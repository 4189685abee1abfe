"""Row-sparse gradients under an `accelerate.Accelerator`, in your own loop or in a trainer.

`Accelerator.clip_grad_norm_` calls torch's (torch/nn/utils/clip_grad.py). Before torch 2.14 that
refuses a sparse gradient, for any largest norm. It has no hook. So `clip_rows` replaces this one
method, on one accelerator.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from finetune.optim import clip_grad_norm_


def clip_rows(accelerator: Any) -> None:
    """Make `accelerator.clip_grad_norm_` accept row-sparse gradients.

    It clips by the norm of all gradients as one vector. If no gradient is sparse, it does what it
    did before. A second call for the same accelerator does nothing.
    """
    clip_dense = accelerator.clip_grad_norm_
    if getattr(clip_dense, "clips_rows", False):
        return

    def clip(
        parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not any(
            parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters
        ):
            return clip_dense(parameters, max_norm, norm_type)
        accelerator.unscale_gradients()
        return clip_grad_norm_(parameters, max_norm, norm_type)

    clip.clips_rows = True  # type: ignore[attr-defined]
    accelerator.clip_grad_norm_ = clip
