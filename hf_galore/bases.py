"""The basis methods: from a gradient, an orthonormal basis and the singular values that its columns capture.

    svd         exact (the paper)                                     O(m·n·min(m, n)) flops
    gram        exact to rounding, from the smaller Gram matrix       2·m·n·min(m, n) flops and an eigendecomposition
    randomized  warm-started block subspace iteration                 4·m·n·r flops warm, 8·m·n·r cold
    random      does not look at the gradient
    late_random randomized at first, random from a given step on (GoLore, arXiv 2410.11289)

Legend as in `hf_galore.sides`. Every method is a function of its arguments alone: its random numbers depend on `seed`,
and matrices in a batch get the bases that they would get one by one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_galore.sides import Both, Left, Side

# A basis method (grad, rank, side, previous, seed) computes, from G (..., m, n) in float32 or float64, the basis for
# `side` at `rank` <= min(m, n) and the singular values (..., r) that its columns capture, largest first. `previous`
# is the basis in force, of the same shape, or None. It may raise torch.linalg.LinAlgError. G is finite, and neither
# zero nor so large or small that squares leave the range of numbers: `hf_galore.subspace.refresh` sees to that.
BasisMethod = Callable[[Tensor, int, Side, "Tensor | None", int], tuple[Tensor, Tensor]]

_OVERSAMPLING = 16  # columns above the rank in a subspace iteration
_SLAB = 256  # rows of a transposed matrix that are multiplied at a time


def svd(grad: Tensor, rank: int, side: Side, previous: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of the gradient, exactly (the paper): O(m·n·min(m, n)) flops.

    The basis is a copy, so no m x n or n x n storage lives on behind a view.
    """
    left, values, right = torch.linalg.svd(grad, full_matrices=False)
    return side.from_svd(left[..., :rank], right[..., :rank, :].mT), values[..., :rank]


def gram(grad: Tensor, rank: int, side: Side, previous: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """The leading singular vectors from the eigenvectors of the smaller Gram matrix, GᵀG (n, n) or GGᵀ (m, m).

    Squaring costs half the digits: directions below √eps of the largest singular value are arbitrary, and carry no
    energy to speak of. Orthonormality does not suffer: both sides are orthonormalised after that.
    """
    if grad.shape[-2] >= grad.shape[-1]:
        left, values, right = _gram_svd(grad, rank)
        right, _ = orthonormal(right)
    else:
        right, values, left = _gram_svd(grad.mT, rank)
        left, _ = orthonormal(left)
    return side.from_svd(left, right), values


def randomized(grad: Tensor, rank: int, side: Side, previous: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """Nearly the leading singular vectors, by block subspace iteration with oversampling and a Rayleigh-Ritz step.

        U = orth(G Ω);  Z = GᵀU;  Z = Q Σ Vᵀ;  basis Q, and U V on the other side

    Ω is the previous basis and a few normal columns, which makes one iteration enough as a rule. There is a second,
    Ω = orth(Z), if there is no previous basis, or if that one is out of date: if it captures less than three quarters
    of what Z does, and Z less than 99 % of G. Nothing but products touches an m x n matrix. Where rank and
    oversampling leave nothing to save, the basis is `gram`'s.

    Paper: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1. Different here: the warm start.
    """
    width = rank + _OVERSAMPLING
    if width >= min(grad.shape[-2:]):
        return gram(grad, rank, side, previous, seed)
    matrix = grad.mT if isinstance(side, Left) else grad  # whose right singular vectors are wanted
    cols = matrix.shape[-1]
    test = normal((cols, width if previous is None else _OVERSAMPLING), grad, seeded(seed))
    if previous is not None:
        old = previous[..., -cols:, :].to(test)
        test = torch.cat((old, test - old @ (old.mT @ test)), dim=-1)  # orthogonal to it: better conditioned
    image, span, sketch = _iterate(matrix, test)
    again = image.new_ones(image.shape[:-2], dtype=torch.bool)
    if previous is not None:
        again = _out_of_date(matrix, image[..., :rank], sketch)
    if bool(again.any()):
        _, *better = _iterate(matrix, orthonormal(sketch, rough=True)[0])
        span, sketch = (torch.where(again[..., None, None], x, y) for x, y in zip(better, (span, sketch), strict=True))
    right, values, turn = _gram_svd(sketch, rank)
    if isinstance(side, Both):
        return side.from_svd(orthonormal(span @ turn)[0], right), values
    return right, values


def _iterate(matrix: Tensor, test: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y = G Ω (..., m, k), U = orth(Y), Z = GᵀU (..., n, k)."""
    image = _product(matrix, test)
    span, _ = orthonormal(image, rough=True)
    return image, span, _product(matrix.mT, span)


def _out_of_date(matrix: Tensor, tracked: Tensor, sketch: Tensor) -> Tensor:
    """Whether the previous basis, whose image G Q is `tracked`, is a bad start (...): see `randomized`."""
    before, now = (torch.linalg.vector_norm(t, dim=(-2, -1)).square() for t in (tracked, sketch))
    bad = before < 0.75 * now
    if bool(bad.any()):
        bad = bad & (now < 0.99 * torch.linalg.vector_norm(matrix, dim=(-2, -1)).square())
    return bad


def random(grad: Tensor, rank: int, side: Side, previous: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """A basis that is uniformly distributed among all (Haar): the QR of normal numbers, with R's diagonal positive.

    Matrices in a batch share it. The values are ones: the gradient, which it does not look at, has no part in it.
    """
    *batch, rows, cols = grad.shape
    generator = seeded(seed)
    blocks = [orthonormal(normal((size, rank), grad, generator))[0] for size in side.sizes(rows, cols)]
    return torch.cat(blocks).expand(*batch, -1, -1).contiguous(), grad.new_ones(*batch, rank)


SUBSPACES: dict[str, BasisMethod] = {"svd": svd, "randomized": randomized, "gram": gram, "random": random}


def subspace_names() -> tuple[str, ...]:
    """What `subspace` may be: a method that is added to SUBSPACES is one more."""
    return (*SUBSPACES, "late_random")


def method_at(subspace: str, step: int, random_from: int | None) -> BasisMethod:
    """The method that `subspace` stands for in this step; `late_random` takes random bases from step `random_from`."""
    if subspace != "late_random":
        return SUBSPACES[subspace]
    assert random_from is not None
    return random if step >= random_from else randomized


def orthonormal(matrix: Tensor, rough: bool = False) -> tuple[Tensor, Tensor]:
    """Q (..., m, k) of the QR decomposition of a matrix with m >= k, and the diagonal of R (..., k), all positive.

    CholeskyQR with the columns scaled to norm 1, one pass or two until the factor is near the identity; where the
    first Gram matrix is ill-conditioned it is shifted, which makes it up to three; where that is not enough,
    Householder's QR. What a matrix of lower rank lacks is filled with arbitrary orthonormal columns.

    Args:
        rough: leaves an error QᵀQ − I of up to a tenth, which saves a pass.

    Paper: Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa, arXiv 1809.11085. Different here: the columns are
    scaled, the shift is (k + 10)·eps instead of their bound, and only matrices that need it are shifted.
    """
    q, size = matrix, matrix.shape[-1]
    unit = torch.finfo(matrix.dtype).eps * (size + 10)  # the error of a Gram matrix of unit columns, or more
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    diagonal = torch.ones_like(matrix[..., 0, :])
    done = failed = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    for attempt in range(3):
        products = q.mT @ q
        norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
        products = products / (norms.unsqueeze(-1) * norms.unsqueeze(-2))
        factor, smallest = _cholesky(products)
        ill = ~(smallest.square() > 10 * unit)  # this pass would leave an error above a tenth; so would a NaN
        enough = ~ill if rough else smallest > 0.8
        if attempt == 0 and bool(ill.any()):
            factor, smallest = _cholesky(products + unit * ill[..., None, None] * eye)
            ill = smallest.isnan()
        failed = failed | (ill & ~done)
        factor = torch.where((done | failed)[..., None, None], eye, factor * norms.unsqueeze(-1))
        q = torch.linalg.solve_triangular(factor, q.mT, upper=False).mT
        diagonal = diagonal * factor.diagonal(dim1=-2, dim2=-1)
        done = done | (enough & ~failed)
        if bool((done | failed).all()):
            break
    if not bool(done.all()):
        q[~done], diagonal[~done] = _householder(matrix[~done])
    return q, diagonal


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L (..., k, k) with L Lᵀ = matrix, and the smallest number on its diagonal, NaN where there is no L."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    smallest = factor.diagonal(dim1=-2, dim2=-1).amin(-1)
    return factor, torch.where(info > 0, torch.nan, smallest)


def _householder(matrix: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q).unsqueeze(-2), diagonal.abs()


def _gram_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., p, r), the singular values (..., r) and V (..., q, r) of a matrix (..., p, q), p >= q, from its Gram
    matrix.

    Eigenvectors of a Gram matrix are a mixture where the singular values are below √eps of the largest. The value of a
    column is the length that it adds to the product of the matrix with V, so mixtures of what is there already count
    for nothing. LAPACK's signs turn with the last bit of the matrix; here the sum of a column of V is positive.
    """
    right = torch.linalg.eigh(_product(matrix.mT, matrix))[1][..., -rank:].flip(-1)
    right = right * torch.where(right.sum(-2, keepdim=True) < 0, -1.0, 1.0)
    left, values = orthonormal(_product(matrix, right))
    values, order = values.sort(dim=-1, descending=True, stable=True)
    left, right = (t.gather(-1, order.unsqueeze(-2).expand_as(t)) for t in (left, right))
    return left, values, right


def spectral_norm(matrix: Tensor, iterations: int = 16) -> Tensor:
    """‖G‖₂ (...) of matrices (..., m, n), from below: subspace iteration with 8 columns from a fixed start."""
    width = min(8, *matrix.shape[-2:])
    test = normal((matrix.shape[-1], width), matrix, seeded(0))
    for _ in range(iterations):
        test = _product(matrix.mT, orthonormal(_product(matrix, test), rough=True)[0])
    return torch.linalg.matrix_norm(test, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (..., m, n) @ b (..., n, k).

    A transposed matrix is read in the slabs in which it is stored: a CPU's library is up to twice as slow otherwise.
    """
    if a.dim() > 2 or a.stride(-1) == 1:
        return a @ b
    first, *rest = zip(a.split(_SLAB, dim=1), b.split(_SLAB), strict=True)
    result = first[1].mT @ first[0].mT
    for slab, factor in rest:
        result.addmm_(factor.mT, slab.mT)
    return result.mT


def seeded(seed: int) -> torch.Generator:
    """A generator of its own: torch's global one is not used."""
    return torch.Generator().manual_seed(seed)


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers with the dtype and device of `like`, drawn on the CPU: the same on every device."""
    return torch.randn(tuple(shape), generator=generator, dtype=like.dtype).to(like.device)
