"""Low-rank subspaces of a gradient: which side is projected, where the basis is from, and what if there is none.

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

    def project(self, grad: Tensor, basis: Tensor) -> Tensor:
        return matmul(basis.mT, grad)

    def factors(self, update: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        return basis, update


@dataclass(frozen=True)
class Both:
    """R = PᵀG Q; P (..., m, r) and Q (..., n, r) are stored as one basis (..., m + n, r), P first."""

    rows: int

    def from_svd(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.cat((left, right), dim=-2)

    def sizes(self, rows: int, cols: int) -> tuple[int, ...]:
        return (rows, cols)

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
    "full": lambda m, n: Both(m),
}
PROJ_TYPES = tuple(_SIDES)


def resolve_side(proj_type: str, shape: Sequence[int]) -> Side:
    """The side that `proj_type` means for a parameter of this shape (..., m, n).

    `std` projects the shorter dimension (the paper), `reverse_std` the longer, `right` and `left` always that one,
    `full` both. The shape is the parameter's as stored: a transposed weight (GPT-2's Conv1D) has its input dimension
    first.

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


def project(grad: Tensor, basis: Tensor, side: Side) -> Tensor:
    """R, the gradient (..., m, n) in the coordinates of `basis`: (..., m, r), (..., r, n) or (..., r, r)."""
    return side.project(grad, basis)


def project_back(update: Tensor, basis: Tensor, side: Side) -> Tensor:
    """The full (..., m, n) matrix of a low-rank update (no scale applied)."""
    left, right = side.factors(update, basis)
    return left @ right


# A basis method computes, from G (..., m, n) in float32 or float64, the basis for `side` at `rank` <= min(m, n) and
# the singular values (..., r) that its columns capture, largest first. `previous` is the basis in force, or None. It
# may raise torch.linalg.LinAlgError. G is finite and not zero: `refresh` sees to that.
BasisMethod = Callable[[Tensor, int, Side, "Tensor | None"], tuple[Tensor, Tensor]]


def svd(grad: Tensor, rank: int, side: Side, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of the gradient, exactly (the paper): O(m·n·min(m, n)) flops.

    The basis is a copy, so no m x n or n x n storage lives on behind a view.
    """
    left, values, right = torch.linalg.svd(grad, full_matrices=False)
    return side.from_svd(left[..., :rank], right[..., :rank, :].mT), values[..., :rank]


SUBSPACES: dict[str, BasisMethod] = {"svd": svd}


def refresh(
    grad: Tensor, rank: int, side: Side, method: BasisMethod, previous: Tensor | None, seed: int
) -> tuple[Tensor, str | None]:
    """A new orthonormal basis from the gradient (..., m, n), and the reason if the gradient could not give all of it.

    The basis has min(rank, m, n) columns, is contiguous, and is float64 for a float64 gradient, else float32. A matrix
    whose gradient is zero or not finite, or on which the method does not converge, keeps its `previous` basis, or gets
    a seeded random one if it has none. Where a gradient has fewer than r independent directions, the missing ones are
    seeded random directions orthogonal to those it has: LAPACK's own would be arbitrary, often coordinate axes.

    Args:
        seed: determines the random directions; torch's global generator is not used.
    """
    rows, cols = grad.shape[-2:]
    rank = min(rank, rows, cols)
    matrix = grad if grad.dtype == torch.float64 else grad.float()
    generator = torch.Generator().manual_seed(seed)

    sound = matrix.isfinite().flatten(-2).all(-1) & matrix.ne(0).flatten(-2).any(-1)
    reason = None
    if not bool(sound.all()):
        reason = "a gradient is zero or not finite"
        matrix = torch.where(sound[..., None, None], matrix, _normal(matrix.shape, matrix, generator))
    try:
        basis, values = method(matrix, rank, side, previous)
    except torch.linalg.LinAlgError:
        if matrix.dim() > 2:
            return _refresh_each(matrix, rank, side, method, previous, seed)
        reason = "the basis method did not converge"
        sound = torch.zeros_like(sound)
        basis, values = svd(_normal(matrix.shape, matrix, generator), rank, side, None)

    floor = values[..., :1] * torch.finfo(values.dtype).eps * 10  # LAPACK's rounding noise is a few eps
    found = (values > floor).sum(-1)
    if bool((found < rank).any()):
        reason = reason or "a gradient has fewer independent directions than `rank`"
        basis = _complete(basis, found, side.sizes(rows, cols), generator)
    if previous is not None and not bool(sound.all()):
        basis = torch.where(sound[..., None, None], basis, previous.to(basis))
    return basis, reason


def _refresh_each(
    matrix: Tensor, rank: int, side: Side, method: BasisMethod, previous: Tensor | None, seed: int
) -> tuple[Tensor, str | None]:
    """`refresh` of a batch one by one, so that a matrix that does not converge does not cost the others theirs."""
    pairs = [
        refresh(one, rank, side, method, None if previous is None else previous[i], seed + i)
        for i, one in enumerate(matrix)
    ]
    reasons = [reason for _, reason in pairs if reason is not None]
    return torch.stack([basis for basis, _ in pairs]), next(iter(reasons), None)


def _complete(basis: Tensor, found: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """The basis with every column from `found` (...) on replaced by a random direction orthogonal to those before."""
    flat, rank = basis.reshape(-1, *basis.shape[-2:]).clone(), basis.shape[-1]
    for one, good in zip(flat, found.reshape(-1).tolist(), strict=True):
        for block in one.split(list(sizes)):
            filler = _normal((block.shape[0], rank - good), block, generator)
            block[:, good:] = torch.linalg.qr(torch.cat((block[:, :good], filler), dim=1))[0][:, good:]
    return flat.reshape(basis.shape)


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers with the dtype and device of `like`, drawn on the CPU: the same on every device."""
    return torch.randn(tuple(shape), generator=generator, dtype=like.dtype).to(like.device)


def rotate(moments: dict[str, Tensor], overlap: Tensor, side: Side, bias1: float = 1.0, bias2: float = 1.0) -> None:
    """Moves moments from an old basis to a new one, in place: LDAdam's formulas (arXiv 2410.16103), C = Q_newᵀ Q_old.

        m ← C m;  v ← bias2·|C²(v̂ − m̂²) + (C m̂)²|  with m̂ = m/bias1, v̂ = v/bias2 and element-wise squares

    Args:
        moments: by name, in working precision: `exp_avg` and `exp_avg_sq`, or Adafactor's `exp_avg_sq_row` and `_col`,
        of
            which the one along the projected dimension is averaged with C² and the other kept.
        overlap: C (r, r).
        side: Right (moments (m, r)) or Left (moments (r, n)).
        bias1, bias2: the bias corrections 1 − βᵗ of the two moments.
    """

    def turned(values: Tensor, by: Tensor) -> Tensor:
        return values @ by.mT if isinstance(side, Right) else by @ values

    mean, square = moments.get("exp_avg"), moments.get("exp_avg_sq")
    if square is not None:
        centre = mean / bias1 if mean is not None else torch.zeros_like(square)
        spread = turned(square / bias2 - centre.square(), overlap.square())
        square.copy_((spread + turned(centre, overlap).square()).abs_().mul_(bias2))
    if mean is not None:
        mean.copy_(turned(mean, overlap))
    factored = moments.get("exp_avg_sq_col" if isinstance(side, Right) else "exp_avg_sq_row")
    if factored is not None:
        factored.copy_(overlap.square() @ factored)
