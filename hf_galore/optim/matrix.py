"""A parameter that is projected, as the optimizer path keeps it: its side, its rank, and the basis in its state."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_galore.bases import random
from hf_galore.basis_store import BasisFormat, State, basis_format
from hf_galore.sides import Side, rank_of, resolve_side
from hf_galore.subspace import refresh


def working_dtype(param: Tensor) -> torch.dtype:
    """The precision that a parameter's step is computed in."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class LowRankMatrix:
    """One parameter (..., m, n) of a group with `rank`."""

    param: Tensor
    group: Mapping[str, Any]

    @cached_property
    def side(self) -> Side:
        return resolve_side(self.group["proj_type"], self.param.shape)

    @cached_property
    def rank(self) -> int:
        return rank_of(self.group["rank"], self.param.shape, self.side, self.group["equal_state"])

    @property
    def low_rank_shape(self) -> torch.Size:
        """Of R, and of Adam's moments."""
        *batch, rows, cols = self.param.shape
        return torch.Size((*batch, *self.side.low_rank(rows, cols, self.rank)))

    @property
    def _format(self) -> BasisFormat:
        rows = sum(self.side.sizes(*self.param.shape[-2:]))
        return basis_format(self.group["basis_dtype"], self.group["state_dtype"], rows, working_dtype(self.param))

    def basis(self, state: State) -> Tensor | None:
        """The basis in force (..., k, r), made again where only its seed is kept; None before the first refresh."""
        if "basis_seed" in state:
            like = self.param.new_empty((), dtype=working_dtype(self.param)).expand(self.param.shape)
            return refresh(like, self.rank, self.side, random, None, int(state["basis_seed"]))[0]
        return self._format.decode(state) if "basis" in state else None

    def keep_basis(self, state: State, basis: Tensor, seed: int | None) -> Tensor:
        """Puts a basis into the state; given a seed, one that `random` makes of it, only that. As it will be read."""
        for name in ("basis", "basis_scale", "basis_seed"):
            state.pop(name, None)
        if seed is not None and self.group["basis_dtype"] is None:
            state["basis_seed"] = torch.tensor(seed)
            return basis
        state.update(self._format.encode(basis))
        return self._format.decode(state).to(basis)
