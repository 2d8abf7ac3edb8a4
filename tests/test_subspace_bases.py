"""The basis methods: orthonormal whatever the gradient, nearly as good as the SVD, a function of their arguments."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from subspace_cases import ROOMY, assert_orthonormal, take
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_galore import bases
from hf_galore.bases import orthonormal, seeded, spectral_norm
from hf_galore.subspace import PROJ_TYPES, SUBSPACES, captured_energy, resolve_side

READ_THE_GRADIENT = [name for name in SUBSPACES if name != "random"]


def spectral(shape, spectrum, seed=0, dtype=torch.float64):
    """A matrix with these singular values (k) and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    size, k = shape[:-2], len(spectrum)
    left, right = (
        torch.linalg.qr(torch.randn(*size, side, k, generator=generator, dtype=torch.float64))[0]
        for side in shape[-2:]
    )
    return (left * spectrum @ right.mT).to(dtype)


def power_law(k, exponent):
    return torch.arange(1, k + 1, dtype=torch.float64) ** -exponent


# Any gradient.

DEGENERATE = {
    "zeros": lambda shape, seed: torch.zeros(shape),
    "NaN": lambda shape, seed: torch.full(shape, torch.nan),
    "one infinity": lambda shape, seed: torch.ones(shape).index_fill(-1, torch.tensor([0]), torch.inf),
    "rank 1": lambda shape, seed: spectral(shape, torch.ones(1), seed),
    "duplicated rows": lambda shape, seed: spectral((1, shape[1]), torch.ones(1), seed).expand(shape),
    "pairs of rows": lambda shape, seed: spectral(shape, torch.ones(min(shape)), seed)[torch.arange(shape[0]) // 2],
    "one element": lambda shape, seed: torch.zeros(shape).index_fill(0, torch.tensor([0]), 1.0) * torch.eye(*shape),
    "condition 1e12": lambda shape, seed: spectral(shape, torch.logspace(0, -12, min(shape)), seed),
    "orthogonal": lambda shape, seed: spectral(shape, torch.ones(min(shape)), seed),
    "normal": lambda shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)),
}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(list(SUBSPACES)),
    rows=st.integers(1, 60),
    cols=st.integers(1, 60),
    rank=st.integers(1, 70),
    kind=st.sampled_from(list(DEGENERATE)),
    before=st.sampled_from([None, *DEGENERATE]),
    proj_type=st.sampled_from(PROJ_TYPES),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 1e-6, 1e-25, 1e25]),
    seed=st.integers(0, 2**63 - 1),
)
def test_property_orthonormal_and_deterministic(method, rows, cols, rank, kind, before, proj_type, dtype, scale, seed):
    """max |QᵀQ − I| <= 1e-5, with and without a previous basis, and the same bits the second time."""
    shape, small = (rows, cols), seed % 2**31
    grad = (DEGENERATE[kind](shape, small) * scale).to(dtype)
    previous = None
    if before is not None:
        previous = take(DEGENERATE[before](shape, small + 1).to(dtype), rank, proj_type, method, seed=seed // 2)[0]
    basis, _, side = take(grad, rank, proj_type, method, previous, seed)
    assert basis.shape == (sum(side.sizes(rows, cols)), min(rank, rows, cols))
    assert basis.is_contiguous()
    assert_orthonormal(basis, side, shape)
    assert torch.equal(take(grad, rank, proj_type, method, previous, seed)[0], basis)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(READ_THE_GRADIENT),
    exponent=st.floats(0.5, 4.0),
    rank=st.integers(1, 40),
    proj_type=st.sampled_from(PROJ_TYPES),
    seed=st.integers(0, 2**31),
)
def test_property_values_decrease_and_are_captured(method, exponent, rank, proj_type, seed):
    """Never above the gradient's own singular values, and no more than a right-sided basis really captures."""
    spectrum = power_law(40, exponent)
    grad = spectral((64, 40), spectrum, seed)
    side = resolve_side(proj_type, grad.shape)
    basis, values = SUBSPACES[method](grad, rank, side, None, seed)
    assert (values.diff() <= 0).all()
    assert (values <= spectrum[:rank] * (1 + 1e-6)).all()
    if proj_type in ("std", "right"):
        assert (torch.linalg.vector_norm(grad @ basis, dim=0) >= values * (1 - 1e-3)).all()


# Nearly as good as the SVD.

STARTS = {
    "cold": lambda grad, rank, proj_type: None,
    "the basis of a similar gradient": lambda grad, rank, proj_type: take(
        grad + 0.3 * grad.norm() * spectral(grad.shape, power_law(40, 1.0), 5) / 1.3, rank, proj_type
    )[0],
    "the basis of another gradient": lambda grad, rank, proj_type: take(
        spectral(grad.shape, power_law(40, 1.0), 5), rank, proj_type
    )[0],
    "a random basis": lambda grad, rank, proj_type: take(grad, rank, proj_type, "random", seed=5)[0],
    "the basis itself": lambda grad, rank, proj_type: take(grad, rank, proj_type)[0],
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    start=st.sampled_from(list(STARTS)),
    shape=st.sampled_from([(120, 80), (80, 120), (90, 90)]),
    rank=st.integers(1, 60),
    exponent=st.floats(0.5, 3.0),
    noise=st.sampled_from([0.0, 0.01, 0.1]),
    proj_type=st.sampled_from(PROJ_TYPES),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_property_randomized_captures_what_the_svd_does(start, shape, rank, exponent, noise, proj_type, dtype, seed):
    """At least 0.99 of it, from any start, on a power law with noise."""
    spectrum = power_law(min(shape), exponent)
    noisy = noise * spectrum.norm() * spectral(shape, torch.ones(min(shape)), seed + 1) / min(shape) ** 0.5
    grad = (spectral(shape, spectrum, seed) + noisy).to(dtype)
    best, _, side = take(grad, rank, proj_type)
    basis, _, _ = take(grad, rank, proj_type, "randomized", STARTS[start](grad.double(), rank, proj_type), seed)
    assert captured_energy(grad, basis, side) >= 0.99 * captured_energy(grad, best, side)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("method", READ_THE_GRADIENT)
def test_a_gap_in_the_spectrum_is_found(method, proj_type):
    """Singular values 1 and 1e-3: the basis is that of the singular vectors, in their order."""
    grad = spectral((96, 64), torch.cat((torch.linspace(2, 1, 8), torch.full((56,), 1e-3))))
    best, _, _ = take(grad, 8, proj_type)
    for previous in (None, take(torch.randn(96, 64), 8, proj_type)[0]):
        basis, _, _ = take(grad, 8, proj_type, method, previous)
        blocks = zip(basis.split([96, 64] if proj_type == "full" else len(basis)), strict=False)
        for (mine,), theirs in zip(blocks, best.split([96, 64] if proj_type == "full" else len(best)), strict=True):
            assert (mine.mT @ theirs).diagonal().abs().min() > 1 - 1e-4


@pytest.mark.parametrize("again", [False, True], ids=["up to date", "out of date"])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_a_warm_batch_equals_one_by_one(proj_type, again):
    """Also where one of them needs a second iteration and the others do not."""
    grads = spectral((3, 96, 64), power_law(64, 0.5))
    previous = torch.stack([take(grad, 4, proj_type)[0] for grad in grads])
    if again:
        previous[1] = take(grads[0], 4, proj_type, "random")[0]
    together, _, _ = take(grads, 4, proj_type, "randomized", previous)
    for grad, old, basis in zip(grads, previous, together, strict=True):
        alone, _, _ = take(grad, 4, proj_type, "randomized", old)
        torch.testing.assert_close(basis, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("method", ["gram", "randomized"])
def test_signs_do_not_depend_on_those_of_lapack(method, proj_type, monkeypatch):
    """Which turn with the last bit, so that a matrix in a batch would get others than alone."""
    grad = spectral((96, 64), power_law(64, 1.0))
    expected, _, _ = take(grad, 8, proj_type, method)
    real = torch.linalg.eigh

    def flipped(matrix):
        values, vectors = real(matrix)
        return values, vectors * torch.tensor([1.0, -1.0]).repeat(len(matrix))[: len(matrix)]

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    torch.testing.assert_close(take(grad, 8, proj_type, method)[0], expected, rtol=0, atol=1e-12)


class Outputs(TorchDispatchMode):
    """Records the elements of what each operation newly makes."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not func.is_view:
                self.made[str(func)] = max(self.made.get(str(func), 0), leaf.numel())
        return out


@pytest.mark.parametrize("shape", [(512, 256), (256, 512)])
@pytest.mark.parametrize("start", ["cold", "a random basis"])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_a_randomized_refresh_makes_nothing_of_the_size_of_the_gradient(proj_type, start, shape):
    grad = spectral(shape, power_law(256, 0.5), dtype=torch.float32)
    previous = STARTS[start](grad, 8, proj_type)
    with Outputs() as outputs:
        take(grad, 8, proj_type, "randomized", previous)
    assert max(outputs.made.values()) <= 512 * (8 + bases._OVERSAMPLING)


# Random bases.


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_random_bases_are_uniformly_distributed(proj_type):
    """Every entry of a uniform basis has mean 0 and mean square 1/n, and two entries of a column are uncorrelated.

    Over 4000 seeds the means of q, n·q² and n·q·q' are within 5 standard deviations (1/√n, √2 and 1 at most).
    """
    many, n = 4000, 6
    q = torch.stack([take(torch.ones(n, n), 3, proj_type, "random", seed=seed)[0] for seed in range(many)]).double()
    for block in q.split(n, dim=1):
        assert block.mean(0).abs().max() <= 5 * n**-0.5 / many**0.5
        assert (n * block.square().mean(0) - 1).abs().max() <= 5 * 2**0.5 / many**0.5
        assert (n * (block[:, :-1] * block[:, 1:]).mean(0)).abs().max() <= 5 / many**0.5


def test_random_bases_do_not_depend_on_the_gradient():
    grads = torch.randn(2, *ROOMY)
    assert torch.equal(take(grads[0], 4, method="random")[0], take(grads[1], 4, method="random")[0])
    left, right = take(torch.randn(9, 9), 4, "full", "random")[0].split(9)
    assert not torch.equal(left, right)


# Orthonormalisation.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decades", [0, 1, 3, 5, 6.5, 12, 20])
@pytest.mark.parametrize("size", [1, 2, 16, 60])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_orthonormal_is_the_qr_decomposition(dtype, decades, size, batch):
    """QᵀQ = I to rounding at any condition, QQᵀA = A, and QᵀA is upper triangular with the diagonal returned."""
    matrix = spectral((*batch, 200, size), torch.logspace(0, -decades, size), dtype=dtype)
    q, diagonal = orthonormal(matrix)
    eps = torch.finfo(dtype).eps
    assert (q.mT @ q - torch.eye(size, dtype=dtype)).abs().max() <= 20 * eps
    assert (q @ (q.mT @ matrix) - matrix).abs().max() <= 20 * eps
    r = q.mT @ matrix
    assert r.tril(-1).abs().max() <= 20 * eps
    assert (r.diagonal(dim1=-2, dim2=-1) - diagonal).abs().max() <= 20 * eps
    assert (diagonal >= 0).all()
    rough, _ = orthonormal(matrix, rough=True)
    assert (rough.mT @ rough - torch.eye(size, dtype=dtype)).abs().max() <= 0.1


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_orthonormal_of_normal_numbers(share):
    """Whose columns crowd together the more of them there are, though no single one is near the others' span."""
    for height in (60, 170, 400):
        q, _ = orthonormal(torch.randn(height, int(height * share)))
        assert (q.mT @ q - torch.eye(q.shape[1])).abs().max() <= 2e-6


@pytest.mark.parametrize("rough", [False, True])
def test_orthonormal_treats_each_matrix_of_a_batch_by_itself(rough):
    """Well-conditioned, one pass more, shifted, of lower rank, zero: as if it were alone."""
    spectra = [torch.logspace(0, -decades, 16) for decades in (0, 2.5, 6, 7.5)]
    spectra += [torch.ones(16).index_fill(0, torch.arange(8, 16), 0.0), torch.zeros(16)]
    batch = torch.stack([spectral((100, 16), spectrum) for spectrum in spectra])
    for one, q in zip(batch, orthonormal(batch, rough)[0], strict=True):
        torch.testing.assert_close(q, orthonormal(one, rough)[0], rtol=0, atol=1e-8)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(exponent=st.floats(0.0, 3.0), rows=st.integers(1, 100), cols=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_property_spectral_norm(exponent, rows, cols, seed):
    """From below, and whatever the gaps are within ln(n) / 2q for q iterations (Musco and Musco, arXiv 1504.05477)."""
    assume(min(rows, cols) > 1)
    grad = spectral((rows, cols), power_law(min(rows, cols), exponent), seed)
    assert 1 - math.log(cols) / 32 <= spectral_norm(grad) <= 1 + 1e-12


def test_seeded_generators_leave_the_global_one_alone():
    before = torch.get_rng_state()
    assert torch.equal(bases.normal((3,), before.double(), seeded(1)), bases.normal((3,), before.double(), seeded(1)))
    assert torch.equal(torch.get_rng_state(), before)
