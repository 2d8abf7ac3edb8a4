"""When an activation is massive."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_galore.checks import check_number


@dataclass(frozen=True)
class Criterion:
    """|a| > magnitude and |a| > ratio × the median |h| of the sequence's hidden states after the block.

    The values are those of "Massive Activations in Large Language Models" (arXiv 2402.17762).

    Raises:
        TypeError: a threshold is no number.
        ValueError: it is negative.
    """

    magnitude: float = 100.0
    ratio: float = 1000.0

    def __post_init__(self) -> None:
        check_number("magnitude", self.magnitude, low=0.0)
        check_number("ratio", self.ratio, low=0.0)

    def __call__(self, magnitudes: Tensor, median: Tensor) -> Tensor:
        """Which magnitudes are massive."""
        return (magnitudes > self.magnitude) & (magnitudes > self.ratio * median)


def magnitudes(h: Tensor) -> Tensor:
    """|h| in float32, or in float64 if h is: 1,000 medians may be beyond float16."""
    return (h if h.dtype == torch.float64 else h.float()).abs()
