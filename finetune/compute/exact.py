"""Where numbers in float64 are kept: sums over many steps or tokens, and logarithms of products."""

import torch

WITHOUT_FLOAT64 = ("mps",)
"""The devices that have no float64: GPUs of Apple. None was here to run this on."""


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 numbers for tensors on `device` are kept: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device
