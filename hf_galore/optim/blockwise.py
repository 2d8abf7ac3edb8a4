"""Block-wise dynamic 8-bit numbers (Dettmers et al., arXiv 2110.02861) with the code book of bitsandbytes.

Each block of 256 consecutive values is divided by its largest magnitude and every value replaced by the index of the
nearest of 256 codes, which are dense near zero. Deviation: a positive value of an unsigned moment never becomes the
code of zero, so that a second moment cannot vanish under a first moment that does not.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256


@cache
def code_book(signed: bool, device: torch.device) -> Tensor:
    """The 256 codes in ascending order (float32): [-1, 1] if signed, else [0, 1].

    For each decade 10^-6 … 10^0 the interval [0.1, 1] is cut into 2^i equal parts (2^(i+1) if unsigned), i = 0 … 6;
    the codes are the middles of these parts, and zero and one.
    """
    codes = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        codes += [middles, -middles] if signed else [middles]
    return torch.cat(codes).sort().values.to(device)


@cache
def _boundaries(signed: bool, device: torch.device) -> Tensor:
    codes = code_book(signed, device)
    return (codes[:-1] + codes[1:]) / 2


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of `values`) and the largest magnitude of each block of 256 (float32, (blocks,))."""
    blocks = _blocks(values)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, _boundaries(signed, values.device), out_int32=True).to(torch.uint8)
    if not signed:
        codes = torch.maximum(codes, (blocks > 0).to(torch.uint8))
    return _unblocked(codes, values.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 values that `codes` and `absmax` stand for, in the shape of `codes`."""
    blocks = _blocks(code_book(signed, codes.device)[codes.int()]).mul_(absmax[:, None])
    return _unblocked(blocks, codes.shape)


def _blocks(values: Tensor) -> Tensor:
    """The values as rows of 256, the last one filled up with zeros."""
    return pad(values.reshape(-1), (0, -values.numel() % BLOCK)).view(-1, BLOCK)


def _unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_blocks`, in storage of its own where there was something to fill up."""
    flat = blocks.view(-1)
    return (flat if flat.numel() == shape.numel() else flat[: shape.numel()].clone()).view(shape)
