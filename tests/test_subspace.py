"""Sides, bases and the guards of a refresh."""

import pytest
import torch
from subspace_cases import (
    ROOMY,
    SQUARE,
    TALL,
    WIDE,
    assert_not_axis_aligned,
    assert_orthonormal,
    blocks,
    low_rank_matrix,
    take,
)

from hf_galore import GaLoreAdamW, subspace
from hf_galore.subspace import SUBSPACES, Both, Left, Right, project, project_back, resolve_side


@pytest.mark.parametrize(
    ("proj_type", "tall", "wide", "square"),
    [
        ("std", Right(), Left(), Right()),
        ("reverse_std", Left(), Right(), Left()),
        ("right", Right(), Right(), Right()),
        ("left", Left(), Left(), Left()),
        ("full", Both(24, 12), Both(12, 24), Both(16, 16)),
    ],
)
def test_sides(proj_type, tall, wide, square):
    assert [resolve_side(proj_type, shape) for shape in (TALL, WIDE, SQUARE)] == [tall, wide, square]
    assert resolve_side(proj_type, (5, *TALL)) == tall


def test_unknown_proj_type_names_the_choices():
    with pytest.raises(ValueError, match=r"proj_type='both'.*std, reverse_std, right, left, full"):
        resolve_side("both", TALL)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="only matrices"):
        resolve_side("std", (12,))


# `std` and `reverse_std` are names for two of these sides.
@pytest.mark.parametrize("shape", [TALL, SQUARE, (3, *ROOMY[::-1])])
@pytest.mark.parametrize("proj_type", ["right", "left", "full"])
@pytest.mark.parametrize("method", SUBSPACES)
class TestEveryMethod:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_orthonormal_and_contiguous(self, method, proj_type, shape, dtype):
        torch.manual_seed(0)
        grad = torch.randn(shape).to(dtype)
        basis, reason, side = take(grad, 4, proj_type, method)
        assert reason is None
        assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert basis.shape == (*shape[:-2], sum(side.sizes(*shape[-2:])), 4)
        assert_orthonormal(basis, side, shape)
        assert basis.is_contiguous()
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()

    def test_project_and_back_is_the_orthogonal_projection(self, method, proj_type, shape):
        """PPᵀ G QQᵀ by hand, in float64; idempotent; exact at full rank."""
        torch.manual_seed(0)
        grad = torch.randn(shape, dtype=torch.float64)
        for rank in (4, min(shape[-2:])):
            basis, _, side = take(grad, rank, proj_type, method)
            once = project_back(project(grad, basis, side), basis, side)
            parts = blocks(basis, side, shape)
            byhand = grad
            if not isinstance(side, Right):
                byhand = parts[0] @ parts[0].mT @ byhand
            if not isinstance(side, Left):
                byhand = byhand @ parts[-1] @ parts[-1].mT
            torch.testing.assert_close(once, byhand, rtol=0, atol=1e-12)
            torch.testing.assert_close(project_back(project(once, basis, side), basis, side), once, rtol=0, atol=1e-12)
        if (
            side == resolve_side("std", shape)
            or shape[-1] == shape[-2]
            or (proj_type == "full" and method != "random")
        ):
            torch.testing.assert_close(once, grad, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        "grad_of",
        [
            lambda shape: torch.zeros(shape),
            lambda shape: torch.full(shape, float("nan")),
            lambda shape: torch.randn(shape).index_fill(-1, torch.tensor([3]), float("inf")),
            lambda shape: low_rank_matrix(shape, 1),
            lambda shape: torch.zeros(shape).index_fill(-1, torch.tensor([2]), 1.0),
            lambda shape: torch.randn(*shape[:-2], 1, shape[-1]).expand(shape),
        ],
        ids=["zero", "nan", "inf", "rank 1", "one column", "equal rows"],
    )
    def test_a_degenerate_gradient_gives_a_sound_basis_and_a_reason(self, method, proj_type, shape, grad_of):
        torch.manual_seed(0)
        grad = grad_of(shape)
        basis, reason, side = take(grad, 4, proj_type, method)
        assert (reason is None) is (method == "random")  # which does not look at the gradient
        assert_orthonormal(basis, side, shape)
        for block in blocks(basis, side, shape):
            assert_not_axis_aligned(block[..., 1:])  # the first column may be an axis where the gradient is one

    def test_an_unusable_gradient_keeps_the_old_basis(self, method, proj_type, shape):
        torch.manual_seed(0)
        old, _, _ = take(torch.randn(shape), 4, proj_type, method)
        for bad in (torch.zeros(shape), torch.full(shape, float("nan"))):
            new, reason, _ = take(bad, 4, proj_type, method, previous=old, seed=1)
            if method == "random":
                assert torch.equal(new, take(torch.randn(shape), 4, proj_type, method, seed=1)[0])
                assert not torch.equal(new, old)
            else:
                assert reason is not None
                assert torch.equal(new, old)

    def test_rank_is_clamped(self, method, proj_type, shape):
        torch.manual_seed(0)
        basis, _, side = take(torch.randn(shape), 100, proj_type, method)
        assert basis.shape[-1] == min(shape[-2:])
        assert_orthonormal(basis, side, shape)

    def test_deterministic_and_no_global_random_numbers(self, method, proj_type, shape):
        before = torch.get_rng_state()
        bases = [take(torch.zeros(shape), 4, proj_type, method, seed=seed)[0] for seed in (7, 7, 8)]
        assert torch.equal(bases[0], bases[1])
        assert not torch.equal(bases[0], bases[2])
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_batch_equals_one_by_one(self, method, proj_type, shape):
        torch.manual_seed(0)
        batch = torch.randn(5, *shape[-2:], dtype=torch.float64)
        together, _, _ = take(batch, 4, proj_type, method)
        for one, basis in zip(batch, together, strict=True):
            torch.testing.assert_close(basis, take(one, 4, proj_type, method)[0], rtol=0, atol=1e-10)

    def test_a_previous_basis_of_another_rank_counts_as_none(self, method, proj_type, shape):
        torch.manual_seed(0)
        grad = torch.randn(shape)
        for rank in (3, 5):
            old, _, _ = take(torch.randn(shape), rank, proj_type, method)
            for matrix in (grad, torch.zeros(shape)):
                expected, _, _ = take(matrix, 4, proj_type, method)
                assert torch.equal(take(matrix, 4, proj_type, method, previous=old)[0], expected)

    @pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e30])
    def test_the_size_of_the_gradient_does_not_matter(self, method, proj_type, shape, factor):
        """Squares of these leave the range of float32; 1e-42 is a denormal number with few digits."""
        torch.manual_seed(0)
        grad = torch.randn(shape)
        basis, reason, side = take(grad * factor, 4, proj_type, method)
        assert reason is None
        assert_orthonormal(basis, side, shape)
        if factor > 1e-40:
            kept = project_back(project(grad, basis, side), basis, side)
            expected = take(grad, 4, proj_type, method)[0]
            torch.testing.assert_close(
                kept, project_back(project(grad, expected, side), expected, side), rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("method", sorted(set(SUBSPACES) - {"random"}))
@pytest.mark.parametrize("shape", [TALL, ROOMY])
def test_one_bad_expert_does_not_cost_the_others_their_bases(method, shape):
    torch.manual_seed(0)
    batch = torch.randn(4, *shape)
    batch[1], batch[2, 0, 0] = 0.0, float("nan")
    old, _, _ = take(torch.randn(4, *shape), 4, method=method)
    new, reason, _ = take(batch, 4, method=method, previous=old)
    assert reason is not None
    assert torch.equal(new[1:3], old[1:3])
    for i in (0, 3):
        torch.testing.assert_close(new[i], take(batch[i], 4, method=method, previous=old[i])[0])
        if method == "svd":
            assert torch.equal(new[i], take(batch[i], 4)[0])


def test_svd_is_the_best_basis():
    """Eckart and Young: the captured energy is that of the leading singular values."""
    torch.manual_seed(0)
    grad = torch.randn(TALL, dtype=torch.float64)
    basis, _, side = take(grad, 4)
    values = torch.linalg.svdvals(grad)
    assert project(grad, basis, side).norm() == pytest.approx(float(values[:4].norm()), rel=1e-12)


@pytest.mark.parametrize("method", sorted(set(SUBSPACES) - {"random"}))
@pytest.mark.parametrize("shape", [TALL, ROOMY, (300, 200)])
def test_a_rank_deficient_gradient_keeps_the_directions_it_has(method, shape):
    grad = low_rank_matrix(shape, 2)
    basis, reason, side = take(grad, 4, method=method)
    assert reason is not None
    torch.testing.assert_close(project_back(project(grad, basis, side), basis, side), grad, rtol=1e-4, atol=1e-5)
    assert_not_axis_aligned(basis)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_svd_that_does_not_converge(batch, monkeypatch):
    """LAPACK's failure cannot be provoked at will: torch's error is raised where the first entry is 99."""
    real = torch.linalg.svd

    def fragile(matrix, full_matrices=True):
        if (matrix[..., 0, 0] == 99).any():
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", fragile)
    torch.manual_seed(0)
    grad = torch.randn(*batch, *TALL)
    grad.view(-1, *TALL)[0, 0, 0] = 99
    basis, reason, side = take(grad, 4)
    assert reason is not None
    assert_orthonormal(basis, side, grad.shape)
    old, _, _ = take(torch.randn(*batch, *TALL), 4)
    kept, _, _ = take(grad, 4, previous=old)
    assert torch.equal(kept.view(-1, *old.shape[-2:])[0], old.view(-1, *old.shape[-2:])[0])
    if batch:
        torch.testing.assert_close(kept[1], take(grad[1], 4)[0])
        grad[2] = torch.nan
        assert torch.equal(take(grad, 4, previous=old)[0][2], old[2])


@pytest.mark.parametrize("bad", [0.0, float("nan")], ids=["zero", "nan"])
def test_an_optimizer_warns_once_and_goes_on(bad):
    """Two matrices, three refreshes with unusable gradients: one warning, no crash, sound bases."""
    params = [torch.nn.Parameter(torch.randn(12, 8)) for _ in range(2)]
    optimizer = GaLoreAdamW([{"params": params, "rank": 4, "update_proj_gap": 1}])

    def three_steps():
        for _ in range(3):
            for param in params:
                param.grad = torch.full_like(param, bad)
            optimizer.step()

    with pytest.warns(UserWarning, match="zero or not finite") as caught:
        three_steps()
    assert len(caught) == 1
    for param in params:
        assert_orthonormal(optimizer.state[param]["basis"], Right(), param.shape)


def test_an_optimizer_warns_once_about_a_rank_it_clamps():
    params = [torch.nn.Parameter(torch.randn(12, 8)) for _ in range(2)]
    optimizer = GaLoreAdamW([{"params": params, "rank": 50, "proj_type": "reverse_std"}])
    for param in params:
        param.grad = torch.randn_like(param)
    with pytest.warns(
        UserWarning, match=r"rank=50 is larger than a matrix of shape \(12, 8\) has: it is clamped"
    ) as caught:
        optimizer.step()
    assert len(caught) == 1


def test_methods_are_one_more_callable(monkeypatch):
    """A new basis method needs nothing but an entry in SUBSPACES."""

    def first_rows(grad, rank, side, previous, seed):
        u, _ = torch.linalg.qr(grad)
        v, _ = torch.linalg.qr(grad.mT)
        return side.from_svd(u[..., :rank], v[..., :rank]), torch.ones(rank)

    monkeypatch.setitem(subspace.SUBSPACES, "qr", first_rows)
    param = torch.nn.Parameter(torch.randn(TALL))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 4, "subspace": "qr"}])
    param.grad = torch.randn_like(param)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["basis"], torch.linalg.qr(param.grad.mT)[0][:, :4])
