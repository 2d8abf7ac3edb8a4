"""Signs of a new basis, and the figures that say how good a basis is."""

import pytest
import torch
from subspace_cases import ROOMY, TALL, WIDE, low_rank_matrix, take

from hf_galore.subspace import PROJ_TYPES, align, captured_energy, overlap, project, project_back, stable_rank

each_proj_type = pytest.mark.parametrize("proj_type", PROJ_TYPES)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_align_undoes_any_flip_of_signs(batch):
    old = take(torch.randn(*batch, *TALL), 4)[0]
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert torch.equal(align(old * signs, old), old)


def test_align_flips_columns_and_nothing_else():
    old, new = (take(torch.randn(ROOMY), 6)[0] for _ in range(2))
    aligned = align(new, old)
    assert ((aligned.mT @ old).diagonal() >= 0).all()
    assert torch.equal(aligned.abs(), new.abs())
    flipped = aligned != new
    assert flipped.any()
    assert torch.equal(flipped.all(0), flipped.any(0))
    assert torch.equal(align(aligned, old), aligned)


def test_align_leaves_a_column_that_is_orthogonal_to_the_old_one():
    eye = torch.eye(4)
    assert torch.equal(align(eye[:, 2:], eye[:, :2]), eye[:, 2:])


@pytest.mark.parametrize("shape", [(12, 3), (11, 4), (2, 12, 4)])
def test_align_refuses_another_shape(shape):
    with pytest.raises(ValueError, match=r"new has the shape .* old \(12, 4\)"):
        align(torch.ones(shape), torch.ones(12, 4))


@each_proj_type
@pytest.mark.parametrize("shape", [TALL, WIDE, (3, *TALL)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_captured_energy_is_that_of_the_projection(proj_type, shape, dtype):
    grad = torch.randn(shape).to(dtype)
    basis, _, side = take(grad, 4, proj_type)
    wide, q = grad.double(), basis.double()
    kept = project_back(project(wide, q, side), q, side)
    expected = kept.square().sum((-2, -1)) / wide.square().sum((-2, -1))
    torch.testing.assert_close(captured_energy(grad, basis, side).double(), expected, rtol=1e-5, atol=0)


@each_proj_type
def test_captured_energy_of_all_there_is_and_of_nothing(proj_type):
    basis, _, side = take(low_rank_matrix(TALL, 3), 3, proj_type)
    assert captured_energy(low_rank_matrix(TALL, 3), basis, side) == pytest.approx(1.0, rel=1e-5)
    assert captured_energy(torch.zeros(TALL), basis, side).isnan()


def test_overlap():
    """1 for the same subspace, whatever its basis, 0 for orthogonal ones, the mean squared cosine in between."""
    q = torch.linalg.qr(torch.randn(3, 12, 8, dtype=torch.float64))[0]
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    first, second = q[..., :4], q[..., 4:]
    torch.testing.assert_close(overlap(first @ turn, first), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(overlap(second, first), torch.zeros(3, dtype=torch.float64))
    between = torch.cat((first[..., :1], second[..., :3]), dim=-1)
    torch.testing.assert_close(overlap(between, first), torch.full((3,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [TALL, WIDE, (3, *TALL), (150, 100), (1, 7), (5, 1)])
def test_stable_rank(shape, dtype):
    """Against the singular values; a normal matrix has the flattest spectrum there is in practice."""
    grad = torch.randn(shape).to(dtype)
    values = torch.linalg.svdvals(grad.double())
    expected = (values / values[..., :1]).square().sum(-1)
    found = stable_rank(grad).double()
    assert (found >= expected * (1 - 1e-5)).all()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_stable_rank_of_known_matrices():
    assert stable_rank(torch.eye(20, 12)) == pytest.approx(12.0, rel=1e-5)
    assert stable_rank(low_rank_matrix(TALL, 1)) == pytest.approx(1.0, rel=1e-5)
    batch = torch.stack(
        (torch.zeros(TALL), torch.ones(TALL), torch.full(TALL, torch.nan), torch.full(TALL, torch.inf))
    )
    torch.testing.assert_close(
        stable_rank(batch), torch.tensor([torch.nan, 1.0, torch.nan, torch.nan]), equal_nan=True
    )
