"""Numbers on the host that take part in a loop on another device."""

from __future__ import annotations

import torch
from torch import Tensor


def at_home(tensor: Tensor, home: torch.device) -> Tensor:
    """A number on the CPU that a gradient is wanted of, on the device where the loop runs.

    As an operand it could stay where it is: its value travels with the launch of a kernel. But its
    cotangent would be copied to the CPU in every step, and the host would wait for it.
    """
    away = tensor.requires_grad and tensor.device.type == "cpu" and home.type != "cpu"
    return tensor.to(home) if away else tensor
