"""Matrices of one shape are refreshed in one call, and get the bases that they would get one by one."""

import pytest
import torch
from basis_cases import basis_of
from optimizer_cases import BASE
from torch.nn import Parameter

from hf_galore import GaLoreAdamW
from hf_galore.optim import refreshing

# Unusable gradients are warned of; here they are wanted.
pytestmark = pytest.mark.filterwarnings("ignore:GaLoreAdamW. a basis refresh:UserWarning")

SHAPES = {"tall": (48, 32), "wide": (32, 48), "experts": (3, 48, 32)}  # rank 4 and the oversampling are less than 32
COUNT, BAD = 4, {1: 0.0, 2: float("nan")}  # which matrices have which gradients where they are bad
OPTIONS = {
    "plain": {},
    "full": {"proj_type": "full"},
    "rotate, int8": {"moments": "rotate", "basis_dtype": "int8"},
    "moment, align": {"source": "moment", "moments": "align"},
    "reset, lazy": {"moments": "reset", "lazy": True},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def gradients(shape, bad):
    """One for each matrix; of the experts it is the last that is bad."""
    grads = torch.randn(COUNT, *shape, dtype=torch.float64)
    for index, value in BAD.items() if bad else ():
        grads[(index, -1) if len(shape) > 2 else index] = value
    return grads


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the gradients of each call."""
    made, real = [], refreshing.refresh
    monkeypatch.setattr(refreshing, "refresh", lambda grad, *rest: made.append(tuple(grad.shape)) or real(grad, *rest))
    return made


def run(monkeypatch, elements, shape, bad=(), steps=4, **group):
    """Weights and bases after each step, where so many elements are refreshed together at most."""
    monkeypatch.setitem(refreshing._STACKED, "cpu", elements)
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape, dtype=torch.float64)) for _ in range(COUNT)]
    groups = [{"params": params, "rank": 4, "update_proj_gap": 1, **group}]
    optimizer = GaLoreAdamW(groups, **BASE[GaLoreAdamW])
    found = []
    for step in range(steps):
        for param, grad in zip(params, gradients(shape, step in bad), strict=True):
            param.grad = grad
        optimizer.step()
        for value in (value for param in params for value in optimizer.state[param].values()):
            assert value.untyped_storage().nbytes() == value.numel() * value.itemsize  # and no view of the batch
        found.append((torch.stack(params).detach(), torch.stack([basis_of(optimizer, param) for param in params])))
    return found


@each_shape
@pytest.mark.parametrize(
    ("subspace", "together", "options"),
    [
        pytest.param(subspace, together, options, id=f"{subspace}-{name}")
        for subspace, together in {"randomized": True, "gram": True, "svd": False, "random": False}.items()
        for name, options in OPTIONS.items()
        if not (subspace == "random" and options.get("moments") == "align")
    ],
)
def test_together_as_one_by_one(monkeypatch, calls, shape, subspace, together, options):
    """In the first refresh two gradients are bad, and get their seeded directions; so they are in the third."""
    runs = {}
    for elements in (1, 10**9):
        calls.clear()
        runs[elements] = run(monkeypatch, elements, shape, bad=(0, 2), subspace=subspace, **options)
        stacked = {(COUNT, *shape)} if together and elements > 1 else {shape}
        assert set(calls) == stacked
    for one, other in zip(*runs.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10, equal_nan=True)
    assert runs[1][-1][0][0].isfinite().all()


@each_shape
@pytest.mark.parametrize("subspace", ["randomized", "gram", "svd"])
def test_a_bad_gradient_in_a_batch_keeps_its_basis(monkeypatch, shape, subspace):
    """And costs no other matrix its new one."""
    (_, before), (_, after) = run(monkeypatch, 10**9, shape, bad=(1,), steps=2, subspace=subspace)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        olds, news = (basis if len(shape) > 2 else basis[None] for basis in (old, new))
        kept = [torch.equal(one, other) for one, other in zip(olds, news, strict=True)]
        assert kept == [False] * (len(kept) - 1) + [index in BAD]


@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_no_more_is_stacked_than_the_limit(monkeypatch, calls, at_once):
    """Whatever the limit, one matrix goes."""
    shape = SHAPES["tall"]
    run(monkeypatch, at_once * 48 * 32, shape, steps=1, subspace="gram")
    sizes = [made[0] if len(made) == 3 else 1 for made in calls]
    assert sum(sizes) == COUNT
    assert max(sizes) == at_once
    assert len(sizes) == -(-COUNT // at_once)


def test_only_what_is_alike_goes_together(calls):
    """Not another shape, dtype or group, nor a matrix that has taken another number of steps."""
    one, other, flipped, rough, elsewhere, late = (
        Parameter(torch.randn(shape).to(dtype))
        for shape, dtype in [
            *[((48, 32), torch.float32)] * 2,
            ((32, 48), torch.float32),
            ((48, 32), torch.bfloat16),
            *[((48, 32), torch.float32)] * 2,
        ]
    )
    group = {"rank": 4, "update_proj_gap": 1, "subspace": "gram"}
    optimizer = GaLoreAdamW(
        [{"params": [one, other, flipped, rough, late], **group}, {"params": [elsewhere], **group}]
    )
    for step in range(2):
        for param in (one, other, flipped, rough, elsewhere, late):
            param.grad = torch.randn_like(param) if step or param is not late else None
        optimizer.step()
    assert sorted(calls[:4]) == sorted([(2, 48, 32), (32, 48), (48, 32), (48, 32)])
    assert sorted(calls[4:]) == sorted([(2, 48, 32), (32, 48), (48, 32), (48, 32), (48, 32)])
