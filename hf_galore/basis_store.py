"""How a basis is kept between steps: in a floating-point dtype, or as 8-bit or 4-bit integers.

    bfloat16, float32   one tensor `basis`
    int8, int4          codes `basis` and one float32 `basis_scale` for each block of 128 values; two 4-bit codes to a
                        byte: 1.03 and 0.53 bytes for each value

A block is divided by its largest magnitude and rounded to the nearest of 255 or 15 evenly spaced levels (Q-GaLore,
arXiv 2407.08296, whose blocks have 256 values). What is read is what projects the gradient and the update alike.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_galore import native

State = dict[str, Any]

BASIS_DTYPES: dict[str, torch.dtype | int] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": 8,
    "int4": 4,
}  # a dtype, or the bits of a code
_BLOCK = 128


class BasisFormat(Protocol):
    """Keeps one basis in a state."""

    def encode(self, basis: Tensor) -> State:
        """What to put into the state for a basis (..., k, r)."""

    def decode(self, state: State) -> Tensor:
        """The basis, contiguous, in the dtype that it is kept in, or in working precision."""


@dataclass(frozen=True)
class Float:
    """The basis in `dtype`."""

    dtype: torch.dtype

    def encode(self, basis: Tensor) -> State:
        return {"basis": basis.to(self.dtype)}

    def decode(self, state: State) -> Tensor:
        basis: Tensor = state["basis"]
        return basis


@dataclass(frozen=True)
class Integer:
    """The basis as integers of 8 or 4 bits; 4-bit codes of the rows i and i + ⌈k/2⌉ share the byte (..., ⌈k/2⌉, r).

    `rows` is k.
    """

    bits: int
    rows: int
    work: torch.dtype

    def encode(self, basis: Tensor) -> State:
        levels = 2 ** (self.bits - 1) - 1
        flat = basis.to(self.work).reshape(-1)
        blocks = pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
        scale = blocks.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        codes = (blocks / scale * levels).round_().to(torch.int8).view(-1)[: len(flat)].view(basis.shape)
        scale = scale.float().squeeze(1) / levels
        if self.bits == 8:
            return {"basis": codes.clone(), "basis_scale": scale}  # without the padding behind it
        low, high = pad(codes, (0, 0, 0, self.rows % 2)).view(torch.uint8).chunk(2, dim=-2)
        return {"basis": (low & 15) | (high << 4), "basis_scale": scale}

    def decode(self, state: State) -> Tensor:
        codes, scale = state["basis"], state["basis_scale"]
        *batch, _, rank = codes.shape
        decode = _decode_basis if self.work == torch.float32 else partial(_decoded, work=self.work)
        values: Tensor = decode(codes.reshape(-1, *codes.shape[-2:]), scale, self.bits, self.rows)
        return values.view(*batch, self.rows, rank)


def _decoded(codes: Tensor, scale: Tensor, bits: int, rows: int, work: torch.dtype = torch.float32) -> Tensor:
    """The bases (E, rows, r) of codes (E, rows, r), or of two 4-bit codes to a byte (E, ⌈rows/2⌉, r)."""
    if bits == 4:
        both = torch.cat((codes << 4, codes & 240), dim=-2)[:, :rows]
        codes = both.view(torch.int8) >> 4  # the sign bit goes along
    values = codes.to(work).reshape(-1)
    return (values * scale.to(work).repeat_interleave(_BLOCK)[: len(values)]).view(codes.shape)


_decode_basis = native.define(
    "decode_basis(Tensor codes, Tensor scale, int bits, int rows) -> Tensor",
    _decoded,
    lambda codes, scale, bits, rows: scale.new_empty((codes.shape[0], rows, codes.shape[2])),
)


def basis_format(
    basis_dtype: str | None, state_dtype: torch.dtype | None, rows: int, work: torch.dtype
) -> BasisFormat:
    """The format of a basis with this many rows; without `basis_dtype` that of the other states."""
    kept = BASIS_DTYPES[basis_dtype] if basis_dtype is not None else state_dtype or work
    return Integer(kept, rows, work) if isinstance(kept, int) else Float(kept)
