"""Row-sparse gradients under an `accelerate.Accelerator`, in a loop of your own or within Hugging Face's trainers.

Floor 2. `Accelerator.clip_grad_norm_` ends in torch's (torch/nn/utils/clip_grad.py), which raises NotImplementedError on a sparse
gradient, whatever the largest norm; it has no hook, so the one method of the one accelerator is replaced.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from finetune.optim import clip_grad_norm_


def clip_rows(accelerator: Any) -> None:
    """From now on `accelerator.clip_grad_norm_` takes row-sparse gradients, by the norm of all gradients as one vector.

    Where no gradient is sparse it does what it did before.
    """
    clip_dense = accelerator.clip_grad_norm_

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

    accelerator.clip_grad_norm_ = clip
