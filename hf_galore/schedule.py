"""When the basis of a matrix is refreshed: every T steps, staggered over the matrices, or lazily.

lazy: a matrix whose basis hardly turns is refreshed less often. If five refreshes in a row give a basis similar to the
one before (the mean cosine between their columns, signs aside, is at least 0.4), its gap doubles.

Paper: Q-GaLore, arXiv 2407.08296. Different here: the signs of columns, which are arbitrary, do not count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_galore.subspace import align

_SIMILAR, _IN_A_ROW = 0.4, 5


def offset(index: int, count: int, gap: int, stagger: bool) -> int:
    """How many steps early the matrix `index` of `count` refreshes."""
    return index * gap // count if stagger else 0


def due(step: int, gap: int, early: int, lazy: Tensor | None, first: int = 0) -> bool:
    """Whether the step after `step` steps is a refresh: in step `first`, then where (step + early) is a multiple of T.

    Args:
        lazy: the schedule of `postponed`, if there is one.
    """
    if lazy is not None:
        return step >= int(lazy[0])
    return step == first or (step > first and (step + early) % gap == 0)


def postponed(
    lazy: Tensor | None,
    step: int,
    gap: int,
    early: int,
    new: Tensor,
    old: Tensor | None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """The lazy schedule after a refresh in this step: (next refresh, gap, similar refreshes in a row), int64.

    `sizes` as in `similarity`.
    """
    late = (step + early) % gap if lazy is None else 0  # the first one need not be in step with those after it
    _, gap, similar = (0, gap, 0) if lazy is None else lazy.tolist()
    similar = similar + 1 if old is not None and similarity(new, old, sizes) >= _SIMILAR else 0
    if similar == _IN_A_ROW:
        gap, similar = 2 * gap, 0
    return torch.tensor([step + gap - late, gap, similar])


def with_gap(lazy: Tensor, old: int, new: int) -> Tensor:
    """The lazy schedule of a run whose gap becomes `new`: the same multiple of it, counted from the last refresh."""
    following, gap, similar = lazy.tolist()
    scaled = gap * new // old
    return torch.tensor([following - gap + scaled, scaled, similar])


def similarity(new: Tensor, old: Tensor, sizes: Sequence[int] | None = None) -> float:
    """The mean cosine between the columns of two bases (..., n, r), each turned the way that makes it positive.

    `sizes` are the heights of the blocks of a basis of both sides, whose signs have nothing to do with each other.
    """
    if new.shape != old.shape:
        return 0.0
    cosines = (align(new, old, sizes) * old).sum(dim=-2) / (new.norm(dim=-2) * old.norm(dim=-2))
    return float(cosines.mean())
