"""The weight of a BitLinear in host memory: the device has its codes, in two bits each, and its scale.

Codes travel once for each value of the weight: m·n/4 bytes and a scale after every optimizer step, where float32
weights would be 4·m·n. Where 4 does not divide m a code takes a byte.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_galore.frozen_weight import FrozenWeight
from hf_galore.link import HOST, Link
from hf_galore.nn.functional import Ternary, absmean_ternary
from hf_galore.nn.packing import compact, expand
from hf_galore.nn.ternary_weight import TernaryWeight


class HostWeight(TernaryWeight):
    """W (m, n) of a BitLinear whose `link` says where it computes.

    Raises:
        ValueError: in a forward pass, λ of the weights is below 1: then what multiplies is not codes.
    """

    def __init__(self, module: nn.Module, link: Link) -> None:
        super().__init__(module)
        self.link = link
        self._made_of: Any = None
        self._sent: Ternary | None = None

    def _on_device(self) -> Ternary:
        if self.bitlinear.weight_lambda != 1.0:
            raise ValueError(
                f"offload_masters sends codes to the device, and λ of the weights is {self.bitlinear.weight_lambda}: "
                "begin with weight_lambda=1 (LambdaWarmup(weights=None)), or train without offload_masters"
            )
        made_of = (self.bitlinear.value_key(), self.link.device)
        if self._sent is None or self._made_of != made_of:
            with torch.no_grad(), torch.inference_mode(False):
                codes, scale = absmean_ternary(self.bitlinear.whole_weight())
                self._sent = Ternary(self.link.send(compact(codes)), self.link.send(scale))
            self._made_of = made_of
        return self._sent

    @property
    def stored(self) -> Tensor:
        return self._on_device().codes

    @property
    def decode(self) -> Callable[[Tensor], Tensor]:  # type: ignore[override]
        return partial(_decoded, scale=self._on_device().scale)


def _decoded(stored: Tensor, scale: Tensor) -> Tensor:
    return expand(stored) * scale


def check_ternary(weights: Iterable[FrozenWeight]) -> None:
    """Raises ValueError unless all of the weights are those of BitLinear, which `to_host` can move."""
    if not all(isinstance(weight, TernaryWeight) for weight in weights):
        raise ValueError("offload_masters: all targets must be BitLinear; see hf_galore.replace_linear")


def to_host(weight: FrozenWeight, link: Link) -> HostWeight:
    """Moves the weight of a BitLinear to the host, with its codes on the link's device."""
    assert isinstance(weight, TernaryWeight)
    module = weight.bitlinear
    module.link = link
    module.weight.data = module.weight.data.to(HOST)
    return HostWeight(module, link)


def to_device(weight: HostWeight) -> TernaryWeight:
    """Undoes `to_host`."""
    module = weight.bitlinear
    module.link = None
    module.weight.data = module.weight.data.to(weight.link.device)
    return TernaryWeight(module)
