"""What the codes of a model's BitLinear layers do during training."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_galore.nn.bitlinear import BitLinear
from hf_galore.nn.packing import compact, expand


class TernaryStatistics(NamedTuple):
    """Of all weights since the statistics before, which the first ones count as no change from."""

    zeros: float  # share of codes that are 0
    flipped: float  # share of codes that are not what they were
    dead_zone: float  # share of codes that are 0 and were 0: weights that have done nothing


class CodesWatch:
    """Compares the codes of layers with what they were the last time it looked; it keeps them in two bits each.

    Args:
        gathered: brings a weight together that an engine keeps in parts, inside a with block.
    """

    def __init__(
        self, layers: list[BitLinear], gathered: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.layers, self.gathered = layers, gathered
        self._before: list[Tensor | None] = [None] * len(layers)

    def look(self) -> TernaryStatistics:
        """The statistics of now. Where ranks have parts of the weights, all of them call it."""
        counts = torch.zeros(3, dtype=torch.float64)
        size = 0
        for number, layer in enumerate(self.layers):
            with self.gathered(layer.weight):
                codes = layer.ternary().codes
            kept = self._before[number]
            before = codes if kept is None else expand(kept)
            zero = codes == 0
            found = torch.stack([zero.sum(), (codes != before).sum(), (zero & (before == 0)).sum()])
            counts += found.to("cpu", torch.float64)
            size += codes.numel()
            self._before[number] = compact(codes)
        return TernaryStatistics(*(counts / size).tolist())
