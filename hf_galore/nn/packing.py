"""Ternary codes in two bits each, in the layout of transformers' BitNet checkpoints.

    t (m, n) in {-1, 0, 1}     P (m/4, n) bytes     P[r, k] = Σ_i (t[r + i·m/4, k] + 1) << 2i,   i = 0 … 3

A byte holds one code of each quarter of the rows.
"""

import torch
from torch import Tensor

PER_BYTE = 4


def pack_ternary(codes: Tensor) -> Tensor:
    """The bytes (m/4, n), uint8, that hold the codes (m, n), int8.

    Raises:
        ValueError: 4 does not divide m.
    """
    rows = codes.shape[0]
    if rows % PER_BYTE:
        raise ValueError(f"codes of {rows} rows cannot be packed: a byte holds one code of each quarter of the rows")
    packed = torch.zeros(rows // PER_BYTE, *codes.shape[1:], dtype=torch.uint8, device=codes.device)
    for i, quarter in enumerate(codes.chunk(PER_BYTE)):
        packed |= (quarter + 1).to(torch.uint8) << 2 * i
    return packed


def compact(codes: Tensor) -> Tensor:
    """The codes in two bits each where 4 divides m, else as they are."""
    return codes if codes.shape[0] % PER_BYTE else pack_ternary(codes)


def expand(kept: Tensor) -> Tensor:
    """The codes (m, n), int8, of what `compact` made."""
    return kept if kept.dtype == torch.int8 else unpack_ternary(kept)


def unpack_ternary(packed: Tensor) -> Tensor:
    """The codes (m, n), int8, that the bytes (m/4, n) hold."""
    return torch.cat([(packed >> 2 * i & 3).to(torch.int8) - 1 for i in range(PER_BYTE)])
