"""Which side of a gradient is projected, and how a basis is applied to it.

Legend: G (..., m, n) is the gradient of W = nn.Linear.weight (out_features, in_features); leading dimensions are a
batch of independent matrices (the experts of a mixture), each with its own basis; r = rank.

    right: Q (..., n, r)   R = G Q    (..., m, r)   back(N) = N Qᵀ
    left:  P (..., m, r)   R = PᵀG    (..., r, n)   back(N) = P N
    both:  P and Q         R = PᵀG Q  (..., r, r)   back(N) = P N Qᵀ

Paper: GaLore, arXiv 2403.03507.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_galore.ops import matmul


class Side(Protocol):
    """How a basis is applied to a gradient and to an update; `basis` is always one contiguous tensor."""

    def from_svd(self, left: Tensor, right: Tensor) -> Tensor:
        """The basis, given the leading left (..., m, r) and right (..., n, r) singular vectors."""

    def sizes(self, rows: int, cols: int) -> tuple[int, ...]:
        """The heights of the orthonormal blocks that are stacked in the basis of an (m, n) matrix."""

    def low_rank(self, rows: int, cols: int, rank: int) -> tuple[int, int]:
        """The shape of R for an (m, n) gradient."""

    def overlaps(self, new: Tensor, old: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """newᵀ old (..., r, r), of the bases of the rows and of the columns; None where nothing is projected."""

    def transposed(self) -> "Side":
        """The side that is the same for the transposed matrix."""

    def project(self, grad: Tensor, basis: Tensor) -> Tensor:
        """R, the gradient in the coordinates of the basis."""

    def factors(self, update: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """A (..., m, k) and B (..., k, n) with back(update) = A B."""


@dataclass(frozen=True)
class Right:
    """R = G Q with Q (..., n, r): the input dimension is compressed."""

    def from_svd(self, left: Tensor, right: Tensor) -> Tensor:
        return right.contiguous()

    def sizes(self, rows: int, cols: int) -> tuple[int, ...]:
        return (cols,)

    def low_rank(self, rows: int, cols: int, rank: int) -> tuple[int, int]:
        return rows, rank

    def overlaps(self, new: Tensor, old: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return None, new.mT @ old

    def transposed(self) -> Side:
        return Left()

    def project(self, grad: Tensor, basis: Tensor) -> Tensor:
        return matmul(grad, basis)

    def factors(self, update: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        return update, basis.mT


@dataclass(frozen=True)
class Left:
    """R = PᵀG with P (..., m, r): the output dimension is compressed."""

    def from_svd(self, left: Tensor, right: Tensor) -> Tensor:
        return left.contiguous()

    def sizes(self, rows: int, cols: int) -> tuple[int, ...]:
        return (rows,)

    def low_rank(self, rows: int, cols: int, rank: int) -> tuple[int, int]:
        return rank, cols

    def overlaps(self, new: Tensor, old: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return new.mT @ old, None

    def transposed(self) -> Side:
        return Right()

    def project(self, grad: Tensor, basis: Tensor) -> Tensor:
        return matmul(basis.mT, grad)

    def factors(self, update: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        return basis, update


@dataclass(frozen=True)
class Both:
    """R = PᵀG Q; P (..., m, r) and Q (..., n, r) are stored as one basis (..., m + n, r), P first."""

    rows: int
    cols: int

    def from_svd(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.cat((left, right), dim=-2)

    def sizes(self, rows: int, cols: int) -> tuple[int, ...]:
        return (rows, cols)

    def low_rank(self, rows: int, cols: int, rank: int) -> tuple[int, int]:
        return rank, rank

    def overlaps(self, new: Tensor, old: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = (slice(None, self.rows), slice(self.rows, None))
        return new[..., left, :].mT @ old[..., left, :], new[..., right, :].mT @ old[..., right, :]

    def transposed(self) -> Side:
        return Both(self.cols, self.rows)

    def project(self, grad: Tensor, basis: Tensor) -> Tensor:
        left, right = basis[..., : self.rows, :], basis[..., self.rows :, :]
        return matmul(left.mT, grad) @ right

    def factors(self, update: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        left, right = basis[..., : self.rows, :], basis[..., self.rows :, :]
        return left, update @ right.mT


_SIDES: dict[str, Callable[[int, int], Side]] = {
    "std": lambda m, n: Right() if m >= n else Left(),
    "reverse_std": lambda m, n: Left() if m >= n else Right(),
    "right": lambda m, n: Right(),
    "left": lambda m, n: Left(),
    "full": Both,
}
PROJ_TYPES = tuple(_SIDES)


def resolve_side(proj_type: str, shape: Sequence[int]) -> Side:
    """The side that `proj_type` means for a parameter of this shape (..., m, n).

    `std` projects the shorter dimension (the paper), `reverse_std` the longer, `right` and `left` always that one,
    `full` both. The shape is that of nn.Linear, (out_features, in_features), also for a weight that is stored
    transposed (GPT-2's Conv1D).

    Raises:
        ValueError: `proj_type` is none of these, or the parameter is not a matrix or a batch of matrices.
    """
    if proj_type not in _SIDES:
        raise ValueError(f"proj_type={proj_type!r} is not one of {', '.join(PROJ_TYPES)}")
    if len(shape) < 2:
        raise ValueError(
            f"a parameter of shape {tuple(shape)} in a group with `rank`: only matrices (m, n) and batches of them "
            "(E, m, n) can be projected. Flat shards (DeepSpeed ZeRO, FSDP1) hold no matrices"
        )
    return _SIDES[proj_type](shape[-2], shape[-1])


def rank_of(rank: int, shape: Sequence[int], side: Side, equal_state: bool = False) -> int:
    """The rank that a parameter of this shape (..., m, n) gets where `rank` is asked for: at most min(m, n).

    Args:
        equal_state: a wide matrix (m < n) that is projected on the right gets the rank at which Adam's moments and the
            basis take the memory that `std` would give them on the left: 2·r'·m + r'·n = 2·r·n + r·m elements.
    """
    rows, cols = shape[-2:]
    if equal_state and isinstance(side, Right) and rows < cols:
        rank = rank * (2 * cols + rows) // (2 * rows + cols)
    return min(rank, rows, cols)


def project(grad: Tensor, basis: Tensor, side: Side) -> Tensor:
    """R, the gradient (..., m, n) in the coordinates of `basis`: (..., m, r), (..., r, n) or (..., r, r)."""
    return side.project(grad, basis)


def project_back(update: Tensor, basis: Tensor, side: Side) -> Tensor:
    """The full (..., m, n) matrix of a low-rank update (no scale applied)."""
    left, right = side.factors(update, basis)
    return left @ right
