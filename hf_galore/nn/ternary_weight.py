"""The weight of a BitLinear as the projected backward sees it: codes to multiply with, a full weight to fold into.

R = (gyᵀ xq) Q, of the input that the layer has rounded: the straight-through gradient of W, projected.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_galore.frozen_weight import PlainWeight
from hf_galore.nn.functional import RoundedInput

if TYPE_CHECKING:
    from hf_galore.nn.bitlinear import BitLinear


class TernaryWeight(PlainWeight):
    """W (m, n) of a BitLinear."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.bitlinear: BitLinear = module  # type: ignore[assignment]

    @property
    def stored(self) -> Tensor:
        """The codes; where they are not all of it, W."""
        return self.bitlinear.ternary().codes if self.bitlinear.weight_lambda == 1.0 else self.master

    @property
    def decode(self) -> Callable[[Tensor], Tensor]:  # type: ignore[override]
        if self.bitlinear.weight_lambda == 1.0:
            return partial(torch.mul, self.bitlinear.ternary().scale)
        return lambda _: self._matrix()

    def _matrix(self) -> Tensor:
        return self.bitlinear.matrix(self.dtype)[0]

    @property
    def round_input(self) -> Callable[[Tensor, torch.dtype], Tensor]:  # type: ignore[override]
        return self._round_input

    def _round_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.bitlinear.normalized(x)
        rounded: Any = RoundedInput.apply(x, dtype, *self.bitlinear.tokens(x))
        return rounded
