"""Weights that are rounded to codes and a scale that are given beforehand."""

import torch
from torch import Tensor

from hf_galore.nn.functional import Ternary, absmean_ternary

_ZERO = 0.125  # what the weights of code 0 are, as a part of the scale: below 0.5, and not 0
_TRIES = 32
_CLEAR = 1e-6  # of the thresholds at ±0.5: mean |W| depends on the order of summation


def masters_of(ternary: Ternary) -> Tensor:
    """Weights W (m, n), float32, with absmean_ternary(W) equal to the codes t and the scale s.

    t·s itself is not such a weight: where there are zeros its mean is less than s. Let p be the share of codes that
    are not 0. Then

        W = ±z s  where t = 0, signs alternating        W = t c s  elsewhere        z = 1/8,  c = (1 - (1 - p) z) / p

    has mean |W| = s, and rounds to t as z < 1/2 < 1 <= c. Summed in float32 the mean is some units in the last place
    off, so that magnitudes are moved by about as much: the scale is s, or, where no sum gives that mean, one or two
    units beside it, as it may be on other devices anyway. Codes do not depend on it. If every code is 0, so is W, and
    the scale says nothing.
    """
    codes, scale = ternary.codes, float(ternary.scale)
    signs = codes.float()
    zero = codes == 0
    share = 1 - float(zero.float().mean())
    if share == 0:
        return torch.zeros_like(signs)
    alternating = 1 - 2 * (torch.arange(codes.numel(), device=codes.device).view_as(codes) % 2).float()
    signs = torch.where(zero, alternating, signs)
    weight = signs * torch.where(zero, _ZERO, (1 - (1 - share) * _ZERO) / share) * scale
    best, smallest = weight, float("inf")
    for i in range(_TRIES):
        error = scale - float(absmean_ternary(weight).scale)
        if abs(error) < smallest:
            best, smallest = weight.clone(), abs(error)
        if error == 0:
            break
        some = max(1, codes.numel() >> i % 8)  # all of them at once round alike, and the mean jumps
        weight.view(-1)[:some] += signs.view(-1)[:some] * (error * codes.numel() / some)
    return best


def round_masters(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (m, n) rounded to a dtype in which its codes are what they were, whatever the order of summation.

    Values that rounding would carry across a threshold, or onto one, are rounded the other way. This moves the mean,
    and with it the threshold, so that it is done until nothing changes.

    Raises:
        RuntimeError: that does not come to an end.
    """
    if weight.dtype == dtype:
        return weight.detach()
    rounded = weight.detach().to(dtype)
    for _ in range(_TRIES):
        made, scale = absmean_ternary(rounded)
        magnitude = rounded.float().abs() / scale
        wrong = (made != codes) | ((magnitude - 0.5).abs() < _CLEAR)
        if not wrong.any():
            return rounded
        outwards = torch.where(rounded < 0, -torch.inf, torch.inf).to(dtype)
        neighbour = torch.nextafter(rounded, torch.where(codes == 0, torch.zeros_like(rounded), outwards))
        rounded = torch.where(wrong, neighbour, rounded)
    raise RuntimeError(f"no weights in {dtype} have these codes")
