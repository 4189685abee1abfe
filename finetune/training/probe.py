"""A probe of a device before the first step: one small batch, there and on the CPU.

It has not been run on a GPU of Apple ("mps"), for which it is made: kernels there are young, and
some of them have given wrong gradients without an error.
"""

import torch

from finetune.data.types import MicroBatch
from finetune.errors import UserError

TOLERANCE = 1e-3  # of the loss, and of all gradients together, relative to the CPU's


def check_device(
    module: torch.nn.Module, batch: MicroBatch, device: torch.device, *, key: str
) -> None:
    """Move `module` to `device`, and raise UserError unless it computes there as on the CPU.

    `module` maps a micro-batch to the sum of its token losses; it is on the CPU, in float32.
    `key` is what the message tells to change. Gradients are None afterwards.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()  # dropout would draw other masks there
    try:
        expected, gradients = _loss_and_gradients(module, batch, torch.device("cpu"))
        try:
            module.to(device)
            found, others = _loss_and_gradients(module, batch, device)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{device.type} cannot compute this model: {first}. Set {key}"
            ) from error
    finally:
        for part, training in modes:
            part.training = training
        module.zero_grad(set_to_none=True)
    size = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    apart = (
        sum(
            float((g - others[name]).square().sum()) if name in others else float("inf")
            for name, g in gradients.items()
        )
        ** 0.5
    )
    for what, difference in (
        ("loss", abs(found - expected) / max(abs(expected), 1e-12)),
        ("gradients", apart / max(size, 1e-12)),
    ):
        if not difference <= TOLERANCE:
            raise UserError(
                f"{device.type} computes this model wrongly: on a small batch its {what} differ "
                f"from the CPU's by {difference:.1g}, and {TOLERANCE:g} is allowed. Set {key}"
            )


def _loss_and_gradients(
    module: torch.nn.Module, batch: MicroBatch, device: torch.device
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients, on the CPU, of what trains."""
    module.zero_grad(set_to_none=True)
    tensors = {key: value.to(device) for key, value in batch.items()}  # type: ignore[attr-defined]
    loss = module(**tensors)
    loss.backward()
    found = {
        name: parameter.grad.detach().to_dense().to("cpu", torch.float32, copy=True)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), found
