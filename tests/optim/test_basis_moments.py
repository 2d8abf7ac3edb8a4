"""What becomes of the moments at a refresh, what a basis is made of, and the rank of `equal_state`: all by hand."""

import copy
from typing import NamedTuple

import pytest
import torch
from basis_cases import WITH_MOMENTS, basis_of
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import BASE, assert_same, each_class
from torch.nn import Parameter

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.sides import PROJ_TYPES, rank_of, resolve_side
from references import ldadam_rotate, ldadam_rotate_both

BETAS = (0.9, 0.999)
GAP, RANK = 3, 4
TOLERANCE = {"rtol": 1e-9, "atol": 1e-14}  # float64; singular vectors are as sharp as the gaps between the values
ADAM = [GaLoreAdamW, GaLoreAdamW8bit]  # which keeps float64 moments in floats


class Sided(NamedTuple):
    """A matrix, and by hand what its side means for the bases P and Q (None where nothing is projected)."""

    shape: tuple
    proj_type: str
    left: bool
    right: bool

    def split(self, basis):
        if self.left and self.right:
            return basis[: self.shape[0]], basis[self.shape[0] :]
        return (basis, None) if self.left else (None, basis)

    def project(self, grad, basis):
        p, q = self.split(basis)
        grad = grad if p is None else p.T @ grad
        return grad if q is None else grad @ q

    def back(self, update, basis):
        p, q = self.split(basis)
        update = update if p is None else p @ update
        return update if q is None else update @ q.T

    def rotated(self, m, v, new, old, t, betas=BETAS):
        if self.left and self.right:
            return ldadam_rotate_both(m, v, self.split(new), self.split(old), t, betas)
        if self.left:
            return ldadam_rotate(m, v, new, old, t, betas)
        return tuple(value.T for value in ldadam_rotate(m.T, v.T, new, old, t, betas))


SIDES = {
    "std, tall": Sided((24, 12), "std", False, True),
    "std, wide": Sided((12, 24), "std", True, False),
    "full": Sided((20, 12), "full", True, True),
}
each_side = pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)


def one_matrix(cls, side, dtype=torch.float64, options=None, **group):
    """A parameter and its optimizer."""
    param = Parameter(torch.randn(side.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    groups = [{"params": [param], "rank": RANK, "update_proj_gap": GAP, "proj_type": side.proj_type, **group}]
    return param, cls(groups, **(options or WITH_MOMENTS[cls]))


def step(param, optimizer, number):
    """A step with a gradient that depends on its number alone; (gradient, state before, basis before)."""
    before, old = copy.deepcopy(optimizer.state[param]), None
    if before:
        old = basis_of(optimizer, param)
    generator = torch.Generator().manual_seed(100 + number)
    param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
    optimizer.step()
    return param.grad, before, old


def after_adam(m, v, r, betas=BETAS):
    return betas[0] * m + (1 - betas[0]) * r, betas[1] * v + (1 - betas[1]) * r**2


def assert_moments(state, m, v):
    torch.testing.assert_close(state["exp_avg"], m, **TOLERANCE)
    torch.testing.assert_close(state["exp_avg_sq"], v, **TOLERANCE)


# Rotate.


@each_side
@pytest.mark.parametrize("basis_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("subspace", ["svd", "random"])
@pytest.mark.parametrize("cls", ADAM)
def test_rotate_is_ldadams(cls, side, basis_dtype, subspace):
    """At the second and the third refresh, between the bases that project: those that are read from the state."""
    param, optimizer = one_matrix(cls, side, moments="rotate", basis_dtype=basis_dtype, subspace=subspace)
    for number in range(2 * GAP + 1):
        grad, before, old = step(param, optimizer, number)
        if number in (GAP, 2 * GAP):
            new, old = (basis.double() for basis in (basis_of(optimizer, param), old))
            assert not torch.equal(new, old)
            m, v = side.rotated(before["exp_avg"], before["exp_avg_sq"], new, old, number)
            assert not torch.allclose(v, before["exp_avg_sq"], rtol=0.1)
            assert_moments(optimizer.state[param], *after_adam(m, v, side.project(grad, new)))


@each_side
def test_rotate_without_bias_correction(side):
    """The moments are taken as they are: as after very many steps."""
    param, optimizer = one_matrix(GaLoreAdamW, side, options={"correct_bias": False}, moments="rotate")
    for number in range(GAP + 1):
        grad, before, old = step(param, optimizer, number)
    new = basis_of(optimizer, param)
    m, v = side.rotated(before["exp_avg"], before["exp_avg_sq"], new, old, 10**6)
    assert_moments(optimizer.state[param], *after_adam(m, v, side.project(grad, new)))


@each_side
def test_rotate_with_adafactors_moments(side):
    """The second moments along what is projected are averaged with C², and the first is turned by C."""
    param, optimizer = one_matrix(GaLoreAdafactor, side, moments="rotate")
    for number in range(GAP + 1):
        grad, before, old = step(param, optimizer, number)
    new, state, beta2 = basis_of(optimizer, param), optimizer.state[param], 1 - (GAP + 1) ** -0.8
    square = side.project(grad, new) ** 2 + 1e-30
    for name, one, other, dim in zip(
        ("exp_avg_sq_row", "exp_avg_sq_col"), side.split(new), side.split(old), (1, 0), strict=True
    ):
        moved = before[name] if one is None else (one.T @ other) ** 2 @ before[name]
        torch.testing.assert_close(state[name], beta2 * moved + (1 - beta2) * square.mean(dim), **TOLERANCE)
    row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    update = side.project(grad, new) / torch.sqrt(row[:, None] * col[None, :] / row.mean())
    update = 0.01 * update / max(1.0, float(update.square().mean().sqrt()))
    carried = side.project(side.back(before["exp_avg"], old), new)  # C m, which is linear
    torch.testing.assert_close(state["exp_avg"], 0.9 * carried + 0.1 * update, **TOLERANCE)


@pytest.mark.parametrize("moments", ["rotate", "reset", "align"])
def test_eight_bit_moments_move_as_float_ones_do(moments):
    """Codes are 1-2 % off, and so are the moments that are made of them: the runs part by a tenth at most."""
    runs = []
    for cls in ADAM:
        param, optimizer = one_matrix(cls, SIDES["std, tall"], torch.float32, moments=moments, subspace="gram")
        start = param.detach().clone()
        for number in range(3 * GAP):
            step(param, optimizer, number)
        runs.append(param.detach() - start)
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8
    assert (runs[1] - runs[0]).norm() <= 0.1 * runs[0].norm()


# Align.


@each_side
@pytest.mark.parametrize("subspace", ["svd", "gram", "randomized"])
def test_align_keeps_the_moments_and_turns_no_direction_round(side, subspace):
    """The bases of `keep` up to signs, which are those of the bases before them."""
    twins = [one_matrix(GaLoreAdamW, side, moments=moments, subspace=subspace) for moments in ("keep", "align")]
    flips = 0
    for number in range(4 * GAP + 1):
        for param, optimizer in twins:
            grad, before, old = step(param, optimizer, number)
        kept, aligned = (basis_of(optimizer, param) for param, optimizer in twins)
        torch.testing.assert_close(aligned.abs(), kept.abs(), **TOLERANCE)
        if number and number % GAP == 0:
            for one, other in zip(side.split(aligned), side.split(old), strict=True):
                assert one is None or ((one * other).sum(0) >= 0).all()
            flips += int((aligned * kept < 0).any())
            low = side.project(grad, aligned)
            m, v = after_adam(before["exp_avg"], before["exp_avg_sq"], low)
            assert_moments(twins[1][1].state[param], m, v)
    assert flips > 0


# Reset.


@each_side
@each_class
def test_reset_is_a_fresh_start(cls, side):
    """From a refresh on, weights, moments and basis are those of an optimizer that starts there, bit for bit."""
    param, optimizer = one_matrix(cls, side, torch.float32, moments="reset")
    for number in range(GAP):
        step(param, optimizer, number)
    assert int(optimizer.state[param]["reset_step"]) == 0
    for refresh in (GAP, 2 * GAP):
        other, fresh = one_matrix(cls, side, torch.float32, moments="reset")
        with torch.no_grad():
            other.copy_(param)
        for number in range(refresh, refresh + GAP):
            for one, its in ((param, optimizer), (other, fresh)):
                step(one, its, number)
            assert_same(param.detach(), other.detach())
            state = dict(optimizer.state[param])
            assert (int(state.pop("reset_step")), int(state.pop("step"))) == (refresh, number + 1)
            theirs = dict(fresh.state[other])
            assert int(theirs.pop("reset_step")) == 0
            assert int(theirs.pop("step")) == number + 1 - refresh
            assert_same(state, theirs)


# Source.


@each_side
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("betas", [BETAS, (0.5, 0.9)], ids=str)
@pytest.mark.parametrize("cls", ADAM)
def test_the_basis_of_the_first_moment(cls, side, moments, betas):
    """The singular vectors of (1 − β)·G + β·back(M), with M as it was before the refresh; of G in the first step."""
    options = {**WITH_MOMENTS[cls], "betas": betas}
    param, optimizer = one_matrix(cls, side, options=options, source="moment", moments=moments)
    for number in range(2 * GAP + 1):
        grad, before, old = step(param, optimizer, number)
        if number % GAP == 0:
            mixed = grad
            if number:
                mixed = (1 - betas[0]) * grad + betas[0] * side.back(before["exp_avg"], old)
            u, _, vh = torch.linalg.svd(mixed)
            for one, other in zip(side.split(basis_of(optimizer, param)), (u, vh.T), strict=True):
                if one is not None:
                    signs = (one * other[:, :RANK]).sum(0).sign()
                    torch.testing.assert_close(one, other[:, :RANK] * signs, rtol=0, atol=1e-10)


# The rank of equal_state.


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows=st.integers(1, 400), more=st.integers(1, 400), rank=st.integers(1, 300))
def test_property_equal_state(rows, more, rank):
    """On the right of a wide matrix, moments and basis take what they take on the left at most; not a rank less."""
    cols = rows + more
    found = rank_of(rank, (3, rows, cols), resolve_side("right", (rows, cols)), True)
    of_std = 2 * rank * cols + rank * rows
    assert 1 <= found <= rows
    assert 2 * found * rows + found * cols <= of_std
    assert found == rows or 2 * (found + 1) * rows + (found + 1) * cols > of_std
    assert found >= min(rank, rows)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    rank=st.integers(1, 250),
    proj_type=st.sampled_from(PROJ_TYPES),
    equal=st.booleans(),
)
def test_property_equal_state_changes_nothing_else(shape, rank, proj_type, equal):
    """Not without it, not on another side, and not for a matrix that is no wider than high."""
    side = resolve_side(proj_type, shape)
    wide_on_the_right = shape[0] < shape[1] and proj_type in ("right", "reverse_std")
    if not (equal and wide_on_the_right):
        assert rank_of(rank, shape, side, equal) == min(rank, *shape)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("cls", ADAM)
def test_the_state_of_equal_state(cls, batch):
    """(12, 40) at rank 4: on the left 2·4·40 + 4·12 = 368 elements; on the right 64 for each rank, so 5."""
    sizes = {}
    for proj_type, equal_state in (("std", False), ("right", True), ("right", False)):
        param = Parameter(torch.randn(*batch, 12, 40))
        group = {"params": [param], "rank": 4, "proj_type": proj_type, "equal_state": equal_state}
        optimizer = cls([group], **{**BASE[cls], "min_8bit_size": 10**9} if cls is GaLoreAdamW8bit else BASE[cls])
        param.grad = torch.randn_like(param)
        optimizer.step()
        state = optimizer.state[param]
        sizes[proj_type, equal_state] = sum(value.numel() for value in state.values() if value.dim())
        if equal_state:
            assert state["basis"].shape == (*batch, 40, 5)
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (*batch, 12, 5)
    assert [size // (3 if batch else 1) for size in sizes.values()] == [368, 320, 256]
