"""What travels between the memory of the host, where weights and optimizer are, and the device that computes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HOST = torch.device("cpu")


class Link:
    """Copies tensors to the device and to the host, and counts their bytes.

    Attributes:
        device: that computes.
        sent, received: bytes that have gone to the device, and to the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.sent, self.received = device, 0, 0

    def send(self, tensor: Tensor) -> Tensor:
        """A copy on the device."""
        self.sent += tensor.nbytes
        return tensor.to(self.device, copy=True)

    def receive(self, tensor: Tensor) -> Tensor:
        """A copy on the host."""
        self.received += tensor.nbytes
        return tensor.to(HOST, copy=True)


class StandIn(torch.autograd.Function):
    """Zeros on the device in the shape of a parameter on the host, which receives their gradient."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, link: Link) -> Tensor:
        ctx.link = link
        return torch.zeros((), dtype=param.dtype, device=link.device).expand(param.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.link.receive(gradient), None
