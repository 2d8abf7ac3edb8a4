"""A parameter that is projected, as the optimizer path keeps it: its side, its rank, and the basis in its state."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_galore.bases import random
from hf_galore.basis_store import BASIS_DTYPES, BasisFormat, State, basis_format
from hf_galore.shards import is_sharded, local, spread
from hf_galore.sides import Side, rank_of, resolve_side
from hf_galore.subspace import refresh

_BASIS = ("basis", "basis_scale")  # what a `BasisFormat` keeps


def working_dtype(param: Tensor) -> torch.dtype:
    """The precision that a parameter's step is computed in."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


class KeptBasis(NamedTuple):
    """A basis of floats, or codes with their scales and `bits`; `made_again` from a seed, in memory of its own."""

    values: Tensor
    scale: Tensor | None = None
    bits: int = 0
    made_again: bool = False


class _Layout(NamedTuple):
    """What follows from a parameter's shape and its group."""

    side: Side
    rank: int
    low_rank_shape: torch.Size
    basis_rows: int


@lru_cache(maxsize=1024)
def _layout(shape: torch.Size, proj_type: str, rank: int, equal_state: bool, transposed: bool) -> _Layout:
    as_linear = (*shape[:-2], *shape[:-3:-1]) if transposed else shape
    side = resolve_side(proj_type, as_linear)
    own = rank_of(rank, as_linear, side, equal_state)
    side = side.transposed() if transposed else side
    *batch, rows, cols = shape
    low_rank = torch.Size((*batch, *side.low_rank(rows, cols, own)))
    return _Layout(side, own, low_rank, sum(side.sizes(rows, cols)))


@dataclass(frozen=True)
class LowRankMatrix:
    """One parameter (..., m, n) of a group with `rank`; (..., n, m) if the group says `transposed`.

    Everything but `proj_type` is of the matrix as it is stored.
    """

    param: Tensor
    group: Mapping[str, Any]

    @property
    def _layout(self) -> "_Layout":
        group = self.group
        transposed = group.get("transposed", False)
        return _layout(self.param.shape, group["proj_type"], group["rank"], group["equal_state"], transposed)

    @property
    def side(self) -> Side:
        return self._layout.side

    @property
    def rank(self) -> int:
        return self._layout.rank

    @property
    def spread(self) -> bool:
        """Whether this is a batch of matrices that are spread over ranks, and their bases with them."""
        return self.param.dim() > 2 and is_sharded(self.param)

    @property
    def _keeps_seeds(self) -> bool:
        """Where rows are spread over ranks the names of a state must not change when random bases begin."""
        return not is_sharded(self.param) or (self.group["subspace"] == "random" and not self.spread)

    @property
    def low_rank_shape(self) -> torch.Size:
        """Of R, and of Adam's moments."""
        return self._layout.low_rank_shape

    @property
    def basis_rows(self) -> int:
        return self._layout.basis_rows

    @property
    def _format(self) -> BasisFormat:
        work = working_dtype(self.param)
        return basis_format(self.group["basis_dtype"], self.group["state_dtype"], self.basis_rows, work)

    def basis(self, state: State) -> Tensor | None:
        """The basis in force (..., k, r), made again where only its seed is kept; None before the first refresh."""
        if "basis_seed" in state:
            like = local(self.param).new_empty((), dtype=working_dtype(self.param)).expand(self.param.shape)
            return refresh(like, self.rank, self.side, random, None, int(state["basis_seed"]))[0]
        if "basis" not in state:
            return None
        return self._format.decode({name: local(state[name]) for name in _BASIS if name in state})

    def kept_basis(self, state: State) -> "KeptBasis":
        """The basis in force, as integers where it is kept so."""
        if "basis_seed" in state:
            made = self.basis(state)
            assert made is not None
            return KeptBasis(made, made_again=True)
        bits = BASIS_DTYPES[self.group["basis_dtype"]] if "basis_scale" in state else 0
        assert isinstance(bits, int)
        return KeptBasis(local(state["basis"]), local(state.get("basis_scale")), bits)

    def keep_basis(self, state: State, basis: Tensor, seed: int | None) -> Tensor:
        """Puts a basis into the state; given a seed, one that `random` makes of it, only that. As it will be read."""
        for name in (*_BASIS, "basis_seed"):
            state.pop(name, None)
        if seed is not None and self.group["basis_dtype"] is None and self._keeps_seeds:
            state["basis_seed"] = torch.tensor(seed)
            return basis
        kept = self._format.encode(basis)
        state.update({name: spread(value, self.param) for name, value in kept.items()} if self.spread else kept)
        return self._format.decode(kept).to(basis)
