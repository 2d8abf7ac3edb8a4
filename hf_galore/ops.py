"""The write-back of an update into a weight, W ← beta·W + alpha·A B or W ← beta·W − delta, in the weight's own dtype.

float32 and float64 weights take one GEMM with no m x n temporary. Lower precisions are computed in float32, a block of
rows at a time, and rounded once: stochastically to bfloat16 if a `RoundingKey` is given, else to nearest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_galore.rounding import RoundingKey, random_bits, round_stochastic

_BLOCK_ELEMENTS = 1 << 18  # a few float32 temporaries of this size stay in a CPU's second-level cache


def add_lowrank_(
    weight: Tensor, left: Tensor, right: Tensor, *, alpha: float, beta: float, key: RoundingKey | None
) -> None:
    """weight (..., m, n) ← beta·weight + alpha·left (..., m, k) @ right (..., k, n), in place."""
    wide = weight.dtype in (torch.float32, torch.float64)
    # A product in bfloat16 is rounded before it is added; float16 could overflow, its product is taken in float32.
    product = weight.dtype if wide or weight.dtype == torch.bfloat16 else torch.float32
    left, right = left.to(product), right.to(product)
    if wide and weight.dim() == 2:
        weight.addmm_(left, right, beta=beta, alpha=alpha)
        return
    lefts, rights = (factor.reshape(-1, *factor.shape[-2:]) for factor in (left, right))
    with _viewed(weight, -1, *weight.shape[-2:]) as batch:
        if wide:
            batch.baddbmm_(lefts, rights, beta=beta, alpha=alpha)
            return
        for index, (one, a, b) in enumerate(zip(batch, lefts, rights, strict=True)):

            def new_rows(rows: slice, one: Tensor = one, a: Tensor = a, b: Tensor = b) -> Tensor:
                return one[rows].float().mul_(beta).add_(a[rows] @ b, alpha=alpha)

            _round_rows_(one, new_rows, key, first_row=index * one.shape[0])


def add_(weight: Tensor, delta: Tensor, *, alpha: float, beta: float, key: RoundingKey | None) -> None:
    """weight ← beta·weight + alpha·delta, element by element, in place; any shape."""
    if weight.dtype in (torch.float32, torch.float64):
        if beta != 1.0:
            weight.mul_(beta)
        weight.add_(delta, alpha=alpha)
        return
    with _viewed(weight, -1, _width(weight)) as matrix:
        deltas = delta.reshape(matrix.shape)
        _round_rows_(matrix, lambda rows: matrix[rows].float().mul_(beta).add_(deltas[rows], alpha=alpha), key)


def round_into_(target: Tensor, values: Tensor, key: RoundingKey | None) -> None:
    """target ← values in the target's dtype, in place, rounded as a weight is."""
    with _viewed(target, -1, _width(target)) as matrix:
        source = values.reshape(matrix.shape)
        _round_rows_(matrix, lambda rows: source[rows].float(), key)


def _width(tensor: Tensor) -> int:
    """The length of a row: the last dimension."""
    return tensor.shape[-1] if tensor.dim() else 1


@contextmanager
def _viewed(tensor: Tensor, *shape: int) -> Iterator[Tensor]:
    """The tensor in another shape, whatever its strides; what is written there ends up in the tensor."""
    dense = tensor.contiguous()
    yield dense.view(shape)
    if dense is not tensor:
        tensor.copy_(dense)


def _round_rows_(
    target: Tensor, new_rows: Callable[[slice], Tensor], key: RoundingKey | None, first_row: int = 0
) -> None:
    """target[rows] ← new_rows(rows) (float32) rounded to the target's dtype, one block of rows after another.

    `first_row` is the number of the target's first row within its parameter.
    """
    height, width = target.shape
    step = max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        block = new_rows(rows)
        if key is not None and target.dtype == torch.bfloat16:
            numbers = range(first_row + rows.start, first_row + rows.stop)
            block = round_stochastic(block, random_bits(key, numbers, width, target.device))
        target[rows] = block
