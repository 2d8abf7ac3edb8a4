"""The low-rank subspace of a gradient: a refresh of its basis, what moves with the basis, and how good a basis is.

Legend as in `hf_galore.sides`, which says how a basis is applied; `hf_galore.bases` says where it is from.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_galore.bases import SUBSPACES, BasisMethod, normal, orthonormal, random, seeded, spectral_norm, svd
from hf_galore.rounding import mix64
from hf_galore.sides import PROJ_TYPES, Both, Left, Right, Side, project, project_back, rank_of, resolve_side

__all__ = [
    "PROJ_TYPES",
    "SUBSPACES",
    "BasisMethod",
    "Both",
    "Left",
    "Right",
    "Side",
    "align",
    "captured_energy",
    "overlap",
    "project",
    "project_back",
    "rank_of",
    "refresh",
    "resolve_side",
    "rotate",
    "stable_rank",
    "svd",
]

_SAFE = (1e-12, 1e12)  # norms of matrices whose entries can be squared, in float32


def refresh(
    grad: Tensor, rank: int, side: Side, method: BasisMethod, previous: Tensor | None, seed: int
) -> tuple[Tensor, str | None]:
    """A new orthonormal basis from the gradient (..., m, n), and the reason if the gradient could not give all of it.

    The basis has min(rank, m, n) columns, is contiguous, and is float64 for a float64 gradient, else float32. A matrix
    whose gradient is zero or not finite, or on which the method does not converge, keeps its `previous` basis, or gets
    a seeded random one if it has none; a previous basis of another shape, such as another rank, counts as none. Where
    a gradient has fewer than r independent directions, the missing ones are seeded random directions orthogonal to
    those it has: LAPACK's own would be arbitrary, often coordinate axes. None of that goes for `random`, which gives a
    new basis whatever the gradient is, so that the seed alone gives it again.

    Args:
        seed: determines all that is random; torch's global generator is not used.
    """
    *batch, rows, cols = grad.shape
    rank, sizes = min(rank, rows, cols), side.sizes(rows, cols)
    if previous is not None and previous.shape != (*batch, sum(sizes), rank):
        previous = None
    matrix = grad if grad.dtype == torch.float64 else grad.float()
    if method is random:
        return method(matrix, rank, side, previous, mix64(seed) >> 1)[0], None  # whatever the gradient is

    norm, reason = torch.linalg.vector_norm(matrix, dim=(-2, -1)), None
    sound = (norm > _SAFE[0]) & (norm < _SAFE[1])
    if not bool(sound.all()):
        matrix, sound = _repaired(matrix, sound, seed)
        reason = None if bool(sound.all()) else "a gradient is zero or not finite"
    try:
        basis, values = method(matrix, rank, side, previous, mix64(seed) >> 1)
    except torch.linalg.LinAlgError:
        if batch:
            return _refresh_each(grad, rank, side, method, previous, seed)
        reason = "the basis method did not converge"
        sound = torch.zeros_like(sound)
        basis, values = svd(normal(matrix.shape, matrix, seeded(seed)), rank, side, None, seed)

    noise = torch.finfo(values.dtype).eps * max(10.0, math.sqrt(max(rows, cols)))  # of LAPACK and of products
    floor = values[..., :1] * noise
    found = (values > floor).sum(-1)
    if bool((found < rank).any()):
        reason = reason or "a gradient has fewer independent directions than `rank`"
        basis = _complete(basis, found, sizes, seed)
    if previous is not None and not bool(sound.all()):
        basis = torch.where(sound[..., None, None], basis, previous.to(basis))
    return basis, reason


def _repaired(matrix: Tensor, safe: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The matrices, divided by their peaks unless `safe`, random if zero or not finite; and which are neither."""
    peak = matrix.abs().amax(dim=(-2, -1))
    sound = (peak > 0) & (peak < torch.inf)
    scaled = matrix / torch.where(safe, 1.0, peak)[..., None, None]
    stand_in = normal(matrix.shape[-2:], matrix, seeded(seed))
    return torch.where(sound[..., None, None], scaled, stand_in), sound


def _refresh_each(
    grads: Tensor, rank: int, side: Side, method: BasisMethod, previous: Tensor | None, seed: int
) -> tuple[Tensor, str | None]:
    """`refresh` of a batch one by one, so that a matrix that does not converge does not cost the others theirs."""
    pairs = [
        refresh(one, rank, side, method, None if previous is None else previous[i], seed)
        for i, one in enumerate(grads)
    ]
    reasons = [reason for _, reason in pairs if reason is not None]
    return torch.stack([basis for basis, _ in pairs]), next(iter(reasons), None)


def _complete(basis: Tensor, found: Tensor, sizes: Sequence[int], seed: int) -> Tensor:
    """The basis with every column from `found` (...) on replaced by a random direction orthogonal to those before."""
    flat, rank = basis.reshape(-1, *basis.shape[-2:]).clone(), basis.shape[-1]
    for one, good in zip(flat, found.reshape(-1).tolist(), strict=True):
        generator = seeded(seed)  # each matrix of a batch gets the directions that it would get alone
        for block in one.split(list(sizes)):
            filler = normal((block.shape[0], rank - good), block, generator)
            block[:, good:] = orthonormal(torch.cat((block[:, :good], filler), dim=1))[0][:, good:]
    return flat.reshape(basis.shape)


def rotate(
    moments: dict[str, Tensor], new: Tensor, old: Tensor, side: Side, bias1: float = 1.0, bias2: float = 1.0
) -> None:
    """Moves moments from an old basis to a new one, in place: LDAdam's formulas (arXiv 2410.16103), C = newᵀ old.

        m ← C m;  v ← bias2·|C²(v̂ − m̂²) + (C m̂)²|  with m̂ = m/bias1, v̂ = v/bias2 and element-wise squares

    That is on the left; on the right C is applied to the columns, and with both sides one C to the rows and another to
    the columns.

    Args:
        moments: by name, in working precision: `exp_avg` and `exp_avg_sq`, or Adafactor's `exp_avg_sq_row` and `_col`,
            of which those along a projected dimension are averaged with C².
        new, old: bases (..., k, r) of the same shape.
        bias1, bias2: the bias corrections 1 − βᵗ of the two moments.
    """
    rows, cols = side.overlaps(new, old)

    def turned(values: Tensor, power: int) -> Tensor:
        values = values if rows is None else rows.pow(power) @ values
        return values if cols is None else values @ cols.pow(power).mT

    mean, square = moments.get("exp_avg"), moments.get("exp_avg_sq")
    if square is not None:
        centre = mean / bias1 if mean is not None else torch.zeros_like(square)
        spread = turned(square / bias2 - centre.square(), 2)
        square.copy_((spread + turned(centre, 1).square()).abs_().mul_(bias2))
    if mean is not None:
        mean.copy_(turned(mean, 1))
    for name, by in (("exp_avg_sq_row", rows), ("exp_avg_sq_col", cols)):
        if name in moments and by is not None:
            moments[name].copy_((by.square() @ moments[name].unsqueeze(-1)).squeeze(-1))


def align(new: Tensor, old: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """The columns of a new orthonormal basis (..., k, r), each with the sign that does not turn it away from the old.

    The diagonal of newᵀ old is non-negative then: moments that are kept as they are at a refresh keep their sign.

    Args:
        sizes: the heights of the blocks of a basis of both sides, which are aligned one by one.

    Raises:
        ValueError: the shapes differ.
    """
    if new.shape != old.shape:
        raise ValueError(f"new has the shape {tuple(new.shape)}, old {tuple(old.shape)}: they must be equal")
    heights = list(sizes or (new.shape[-2],))
    blocks = []
    for one, before in zip(new.split(heights, dim=-2), old.split(heights, dim=-2), strict=True):
        cosines = (one * before).sum(dim=-2, keepdim=True)
        blocks.append(torch.where(cosines < 0, -one, one))
    return torch.cat(blocks, dim=-2)


def captured_energy(grad: Tensor, basis: Tensor, side: Side) -> Tensor:
    """‖project(G)‖² / ‖G‖² (...), the share of the gradient (..., m, n) that a basis keeps; NaN if it is zero."""
    kept, whole = (torch.linalg.vector_norm(t.to(basis), dim=(-2, -1)) for t in (side.project(grad, basis), grad))
    return (kept / whole).square()


def overlap(new: Tensor, old: Tensor) -> Tensor:
    """‖newᵀ old‖² / r (...), in [0, 1]: the mean squared cosine between the subspaces of two bases (..., n, r).

    1 where they span the same, about r/n where they have nothing to do with each other. Signs and the order of columns
    do not matter.
    """
    return (new.mT @ old).square().sum(dim=(-2, -1)) / new.shape[-1]


def stable_rank(grad: Tensor) -> Tensor:
    """‖G‖² / ‖G‖₂² (...), between 1 and the rank of the gradient (..., m, n); NaN where it is zero or not finite.

    Frobenius norm over spectral norm, the latter by subspace iteration from below, so that the stable rank may come
    out too large, by less than a hundredth as a rule.
    """
    matrix = grad if grad.dtype == torch.float64 else grad.float()
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    usable = (norm > 0) & (norm < torch.inf)
    if not bool(usable.all()):
        matrix = torch.where(usable[..., None, None], matrix, torch.ones_like(matrix))
    return torch.where(usable, (norm / spectral_norm(matrix)).square(), torch.nan)
