"""How moments are kept between steps: in a floating-point dtype, or block-wise in 8 bits.

A format has three functions: `create(state, name, shape, device)`, `read(state, name)`, which gives the moment in the
working precision (float32, or float64 for float64 parameters), and `write(state, name, value, key)`. A rule reads,
changes the value in place and never learns which format it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_galore.ops import round_into_
from hf_galore.optim import blockwise
from hf_galore.rounding import RoundingKey

State = dict[str, Any]


def bias_corrections(group: Mapping[str, Any], steps: int) -> tuple[float, float]:
    """1 − βᵗ of both moments after t = `steps` steps; ones where the rule corrects no bias."""
    if "betas" not in group or not group.get("correct_bias", True):
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1.0 - beta1**steps, 1.0 - beta2**steps


class MomentFormat(Protocol):
    """Keeps one named moment of a parameter in its optimizer state."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that is kept."""

    def create(self, state: State, name: str, shape: torch.Size, device: torch.device) -> None:
        """Puts a zero moment into the state."""

    def read(self, state: State, name: str) -> Tensor:
        """The moment in working precision."""

    def write(self, state: State, name: str, value: Tensor, key: RoundingKey | None, first_row: int = 0) -> None:
        """Puts the changed moment back, in place; `first_row` is the number of its first row in the whole moment."""

    def rows(self, state: State, name: str, rows: slice, width: int) -> State:
        """A state that holds these rows of the moment, seen as (rows, width), as views."""


@dataclass(frozen=True)
class Float:
    """Moments in `dtype`, worked on in `work`; where the two agree `read` gives the state itself, not a copy."""

    dtype: torch.dtype
    work: torch.dtype

    def create(self, state: State, name: str, shape: torch.Size, device: torch.device) -> None:
        state[name] = torch.zeros(shape, dtype=self.dtype, device=device)

    def read(self, state: State, name: str) -> Tensor:
        moment: Tensor = state[name]
        return moment.to(self.work)

    def write(self, state: State, name: str, value: Tensor, key: RoundingKey | None, first_row: int = 0) -> None:
        if value is not state[name]:
            round_into_(state[name], value, key, first_row)

    def rows(self, state: State, name: str, rows: slice, width: int) -> State:
        return {name: state[name].view(-1, width)[rows]}


@dataclass(frozen=True)
class Blockwise8bit:
    """Moments as 8-bit codes (uint8, the moment's shape) with one float32 `<name>_absmax` for each block of 256.

    With `by_rows` no block crosses a row, and `<name>_absmax` has the moment's shape but for the last dimension: rows
    can be spread over ranks then, however many these are.
    """

    signed: bool
    by_rows: bool = False
    dtype: ClassVar[torch.dtype] = torch.uint8

    def create(self, state: State, name: str, shape: torch.Size, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float32, device=device)
        state[name] = blockwise.quantize(zero, self.signed)[0].expand(shape).contiguous()
        rows, width = (shape[:-1], shape[-1]) if self.by_rows else ((), shape.numel())
        state[f"{name}_absmax"] = zero.new_zeros((*rows, -(-width // blockwise.BLOCK)))

    def read(self, state: State, name: str) -> Tensor:
        codes, absmax = state[name], state[f"{name}_absmax"]
        if not self.by_rows:
            return blockwise.dequantize(codes, absmax, self.signed)
        width = codes.shape[-1]
        return blockwise.dequantize(_whole_blocks(codes), absmax.view(-1), self.signed)[..., :width].contiguous()

    def write(self, state: State, name: str, value: Tensor, key: RoundingKey | None, first_row: int = 0) -> None:
        codes, absmax = blockwise.quantize(_whole_blocks(value) if self.by_rows else value, self.signed)
        state[name].copy_(codes[..., : value.shape[-1]] if self.by_rows else codes)
        state[f"{name}_absmax"].copy_(absmax.view_as(state[f"{name}_absmax"]))

    def rows(self, state: State, name: str, rows: slice, width: int) -> State:
        absmax = state[f"{name}_absmax"]
        if self.by_rows:
            part = absmax.view(-1, absmax.shape[-1])[rows]
        else:
            first, last = rows.start * width, rows.stop * width
            part = absmax[first // blockwise.BLOCK : -(-last // blockwise.BLOCK)]
        return {name: state[name].view(-1, width)[rows], f"{name}_absmax": part}


def _whole_blocks(values: Tensor) -> Tensor:
    """The values with their rows (the last dimension) filled up with zeros to whole blocks."""
    return pad(values, (0, -values.shape[-1] % blockwise.BLOCK))
