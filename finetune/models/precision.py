"""Which precision the matrix products run in.

Floor 2. The weights stay in float32. bf16 pays only where the chip multiplies it: a CPU without such instructions emulates it, 20
to 100 times slower than float32.
"""

import logging

import torch

from finetune.errors import UserError

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16")


def resolve_precision(requested: str, device: torch.device | str) -> tuple[str, str]:
    """The precision ("fp32", "bf16" or "fp16") for `requested` (one of them, or "auto"), and one sentence that says why.

    Raises UserError for fp16 off CUDA; warns in the log where bf16 is asked for and would be emulated.
    """
    kind = torch.device(device).type
    native = has_native_bf16(kind)
    what = "this GPU" if kind == "cuda" else f"this {kind.upper()}"
    if requested == "auto":
        if native:
            return "bf16", f"bf16 matrix products, since {what} has bf16 instructions"
        return "fp32", f"fp32 matrix products, since {what} has no bf16 instructions"
    assert requested in PRECISIONS, requested
    if requested == "fp16" and kind != "cuda":
        raise UserError(
            f'training.precision is "fp16", which needs a CUDA device, not {what}; use "auto", "fp32" or "bf16"'
        )
    if requested == "bf16" and not native:
        logger.warning(
            'training.precision is "bf16", but %s has no bf16 instructions: expect it to be many times slower than fp32',
            what,
        )
    return requested, f"{requested} matrix products, as asked for"


def has_native_bf16(device_type: str) -> bool:
    """Whether devices of this type multiply bf16 matrices in hardware here (AVX512-BF16, AMX or Arm's BF16 on a CPU)."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(bool(value) for name, value in found.items() if "bf16" in name)
    return False
