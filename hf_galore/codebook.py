"""Rounding of values to the levels of a code book, to the nearest or stochastically, with a scale for each block.

Stochastic rounding takes one of the two neighbouring levels, the nearer one more often, so that the expectation is the
value itself: a value x between levels a < b has the variance (x − a)(b − x), at most a quarter of the squared gap.
Small updates of a weight of few levels survive that way; rounding to nearest would throw each of them away.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

_CELLS = 512
_TINY = 1e-38  # in place of the scale of a block of zeros


def round_to_levels(values: Tensor, levels: Tensor, bits: Tensor | None) -> Tensor:
    """The index of a level for each value: of the nearest one, or of one of the two neighbours at random.

    Args:
        values: float32, any shape. Beyond the ends of the book they go to its ends; NaN goes to the last level.
        levels: (k,) float32, ascending; two may be equal.
        bits: None for the nearest (of two equally near ones the lower); else random int32 in [0, 65535], one for each
            value. The upper neighbour is taken with probability (value − lower) / gap, rounded to 1/65536: a value
            within a 2⁻¹⁷th of the gap from a level, so also one that a rounding error has moved off it, goes there.

    Returns:
        int32 of the values' shape.
    """
    if bits is None:
        return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    below = _rank(values, levels)
    steps = 65536 / (levels[1:] - levels[:-1]).clamp(min=_TINY)
    above = values.sub(_look_up(levels, below)).mul_(_look_up(steps, below)).round_() > bits
    return below.add_(above)


def _rank(values: Tensor, levels: Tensor) -> Tensor:
    """The index of the last level, but for the very last, that is not above the value; the first for values below.

    On a CPU a binary search takes ten times as long as a table of cells with at most one inner level each. There a
    value within a rounding error of a level may count as on it.
    """
    inner = levels[1:-1]
    if values.device.type == "cpu" and len(levels) <= 16 and values.numel() > _CELLS:
        edges = torch.linspace(float(levels[0]), float(levels[-1]), _CELLS + 1)
        start = torch.bucketize(edges, inner, out_int32=True, right=True)[:-1]
        if (torch.bucketize(edges, inner, out_int32=True)[1:] - start).max() <= 1:
            cells = values.sub(levels[0]).mul_(_CELLS / (levels[-1] - levels[0])).clamp_(0, _CELLS - 1)
            cells = cells.nan_to_num_(_CELLS - 1).int()
            next_level = levels[1:].clone()
            next_level[-1] = torch.inf
            return _look_up(start, cells).add_(values >= _look_up(next_level[start], cells))
    return torch.bucketize(values, inner, out_int32=True, right=True)


def _look_up(table: Tensor, indices: Tensor) -> Tensor:
    """table[indices], which takes five times as long on a CPU."""
    return table.index_select(0, indices.reshape(-1)).view(indices.shape)


def round_to_integers(values: Tensor, limit: int, bits: Tensor | None) -> Tensor:
    """The values (float32) as whole numbers in [−limit, limit], rounded as `round_to_levels` does; limit < 2⁷.

    To nearest, ties go to the even number. NaN stays NaN.
    """
    rounded = values.round() if bits is None else values.add(bits.add(0.5).div_(65536)).floor_()
    return rounded.clamp_(-limit, limit)


def quantize_blocks(values: Tensor, size: int, levels: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices of levels and a scale for each block: value ≈ scale · levels[index].

    The scale is the largest magnitude in the block, which thus is on level ±1, exactly. Given the scales, stochastic
    rounding is unbiased, except that values go no further than the ends of the book. A block of zeros has scale 0 and
    the index of 0; one with a NaN has scale NaN.

    Args:
        values: (count,) float32.
        size: of a block; the last one may be shorter.
        levels: ascending, from about −1 to 1.
        bits: as in `round_to_levels`, (count,).

    Returns:
        int32 (count,), and float32 (blocks,).
    """
    blocks = pad(values, (0, -len(values) % size)).view(-1, size)
    maxima = blocks.abs().amax(1)
    scaled = blocks * (1.0 / maxima.clamp(min=_TINY))[:, None]
    return round_to_levels(scaled.view(-1)[: len(values)], levels, bits), maxima
