"""The statistics of refreshes: exact ones by hand from singular values, estimates within what chance allows."""

import math

import pytest
import torch
from lowrank_cases import (
    EXACT,
    HEADS,
    RANK,
    STACK,
    adamw,
    backward,
    each_refresh,
    each_side,
    full_gradients,
    on_engine,
    relative,
    stacked,
    torch_adamw,
    train,
    weights,
)
from torch.nn import Parameter

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.lowrank_backward import enable
from hf_galore.optim.matrix import LowRankMatrix
from hf_galore.sides import PROJ_TYPES, resolve_side

PROBES = 16
SIGMAS = 4  # of a normal distribution 1 in 16000 is beyond: with fixed seeds, a mistake and not bad luck

# Unusable gradients are warned of; here they are wanted.
pytestmark = [
    pytest.mark.filterwarnings("ignore:projected backward:UserWarning"),
    pytest.mark.filterwarnings("ignore:GaLoreAdamW. a basis refresh:UserWarning"),
]


def split(basis, shape, proj_type):
    """P and Q, None where nothing is projected, in float64."""
    basis, side = basis.double(), resolve_side(proj_type, shape)
    if len(side.sizes(*shape)) == 2:
        return basis[: shape[0]], basis[shape[0] :]
    return (basis, None) if side.low_rank(*shape, basis.shape[1]) == (basis.shape[1], shape[1]) else (None, basis)


def energy(grad, p, q):
    """‖PᵀG Q‖² / ‖G‖²."""
    low = grad if p is None else p.T @ grad
    low = low if q is None else low @ q
    return float(low.square().sum() / grad.square().sum())


def turn(new, old):
    """The mean squared cosine of the principal angles, over the sides that are projected."""
    cosines = [
        torch.linalg.svdvals(one.T @ other).square().mean()
        for one, other in zip(new, old, strict=True)
        if one is not None
    ]
    return float(sum(cosines) / len(cosines))


def stable(grad):
    """Σσ² / σ₁²."""
    values = torch.linalg.svdvals(grad)
    return float((values / values[0]).square().sum())


def assert_exact(found, grads, news, olds):
    """The means over a batch; the spectral norm is from below, by less than half a hundredth here."""
    count, tolerance = len(grads), {"rel": 1e-5, "abs": 1e-6}
    energies = sum(energy(grad, *new) for grad, new in zip(grads, news, strict=True)) / count
    assert found.captured_energy == pytest.approx(energies, **tolerance)
    if olds is not None:
        turns = sum(turn(new, old) for new, old in zip(news, olds, strict=True)) / count
        assert found.overlap == pytest.approx(turns, **tolerance)
    ranks = sum(stable(grad) for grad in grads) / count
    assert ranks * (1 - 1e-5) <= found.stable_rank <= ranks * 1.01
    assert found.seconds > 0


# Exact ones.


@pytest.mark.parametrize("shape", [(24, 12), (12, 24), (3, 20, 16)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"subspace": "random"}, {"basis_dtype": "int8"}, {"moments": "align"}], ids=str
)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_the_optimizer_path(shape, proj_type, options, dtype):
    """Of the basis as it is kept; there is no overlap in the first refresh."""
    param = Parameter(torch.randn(shape).to(dtype))
    group = {"params": [param], "rank": RANK, "update_proj_gap": 2, "proj_type": proj_type, **options}
    optimizer = GaLoreAdamW([group])
    seen, bases = [], []

    def observe(one, found):
        assert one is param
        basis = LowRankMatrix(param, optimizer.param_groups[0]).basis(optimizer.state[param])
        seen.append(found)
        bases.append([split(one, shape[-2:], proj_type) for one in basis.reshape(-1, *basis.shape[-2:])])

    optimizer.observe = observe
    for step in range(5):
        param.grad = torch.randn(shape).to(dtype)
        optimizer.step()
        if step % 2 == 0:
            olds = bases[-2] if step else None
            assert_exact(seen[-1], param.grad.double().reshape(-1, *shape[-2:]), bases[-1], olds)
    assert [found.step for found in seen] == [0, 2, 4]
    assert math.isnan(seen[0].overlap)


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor])
def test_each_matrix_is_told_of_and_nothing_else(cls):
    """A group without rank has no refreshes; matrices that are refreshed in one call are told of one by one."""
    alike = [Parameter(torch.randn(48, 32)) for _ in range(3)]
    other, full = Parameter(torch.randn(12, 8)), Parameter(torch.randn(12, 8))
    group = {"params": [*alike, other], "rank": 4, "update_proj_gap": 3, "subspace": "gram"}
    optimizer = cls([group, {"params": [full]}])
    seen = []
    optimizer.observe = lambda param, found: seen.append((id(param), found.step))
    for _ in range(4):
        for param in (*alike, other, full):
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert sorted(seen) == sorted((id(param), step) for param in (*alike, other) for step in (0, 3))


@each_side
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("options", [{}, {"basis_dtype": "bfloat16"}, {"basis_dtype": "int4"}], ids=str)
def test_of_an_exact_refresh(proj_type, micro_batches, options):
    """Once for each refresh of each layer, also where a step has several backward passes."""
    model, optimizer, engine = on_engine(
        STACK, proj_type=proj_type, refresh="exact", update_proj_gap=2, micro_batches=micro_batches, **options
    )
    seen = {}
    engine.observe = lambda param, found: seen.setdefault(param, []).append(found)
    names = {
        layer.update: name
        for name, module in model.named_children()
        for layer in engine.layers.values()
        if layer.module is module
    }
    for step in range(5):
        full = full_gradients(STACK, model, [step], micro_batches)
        olds = {update: layer.basis.matrix for update, layer in engine.layers.items()}
        train(STACK, model, optimizer, [step], micro_batches=micro_batches)
        assert {param: len(found) for param, found in seen.items()} == dict.fromkeys(engine.layers, step // 2 + 1)
        for update, layer in engine.layers.items() if step % 2 == 0 else ():
            grad = full[f"{names[update]}.weight"].double()
            new, old = (split(basis, grad.shape, proj_type) for basis in (layer.basis.matrix, olds[update]))
            assert_exact(seen[update][-1], [grad], [new], [old] if step else None)
            assert seen[update][-1].step == step


def test_gradients_that_are_thrown_away_are_no_refresh():
    """Nor is a step that GradScaler skips."""
    model, optimizer, engine = on_engine(STACK, refresh="exact", update_proj_gap=2)
    seen = []
    engine.observe = lambda param, found: seen.append(found.step)
    backward(STACK, model, 50)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(STACK.loss(model, STACK.batch(99)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert seen == []
    train(STACK, model, optimizer, range(3))
    assert seen == [0, 0, 0, 2, 2, 2]


# Estimates.


def chance(grad, basis):
    """The share that the basis captures, and the standard deviation of its estimate.

    ‖AᵀΩ‖² of s normal columns has the mean s·‖A‖² and the variance 2s·‖AAᵀ‖². To first order the share e = a/(a + b)
    changes by (1 − e)·da − e·db over a + b.
    """
    kept = grad @ basis @ basis.T
    e, total = energy(grad, None, basis), grad.square().sum()
    one, other = ((2 / PROBES) ** 0.5 * (a @ a.T).norm() / total for a in (kept, grad - kept))
    return e, float(abs(1 - e) * one + e * other)


@pytest.mark.parametrize("source", ["gradient", "moment"])
@pytest.mark.parametrize("make", [adamw, torch_adamw])
@pytest.mark.parametrize(
    ("proj_type", "options"),
    [
        ("right", {}),
        ("left", {}),
        ("right", {"share_inputs": True}),
        ("right", {"basis_dtype": "int8"}),
        ("left", {"basis_dtype": "int8"}),
    ],
    ids=str,
)
def test_of_a_streaming_refresh(proj_type, options, source, make):
    """The energy is estimated from 16 columns of normal numbers that go through the backward pass beside U.

    A hundredth of energy is for what is not of first order in `chance`. A basis of integers is no projection: its
    share may be a little above 1.
    """
    model, optimizer, engine = on_engine(
        HEADS, torch.float64, make, proj_type=proj_type, update_proj_gap=2, source=source, **options
    )
    seen = {}
    engine.observe = lambda param, found: seen.setdefault(param, []).append(found)
    for step in range(7):
        grads = stacked(engine, model, full_gradients(HEADS, model, [step], 2))
        before = {basis: basis.matrix for basis in engine.bases}
        train(HEADS, model, optimizer, [step], micro_batches=2)
        for basis in engine.bases if step % 2 == 0 else ():
            grad, old, found = grads[basis], before[basis], seen[basis.layers[0].update][-1]
            grad = grad if proj_type == "right" else grad.T
            share, of_share = chance(grad, basis.matrix)
            assert found.step == step
            assert found.seconds > 0
            assert found.captured_energy == pytest.approx(share, abs=SIGMAS * of_share + 1e-2)
            assert found.overlap == pytest.approx(turn((basis.matrix,), (old,)), rel=1e-9)
            assert math.isnan(found.stable_rank)  # a sketch says too little of ‖G‖₂
    assert {len(found) for found in seen.values()} == {4}
    assert set(seen) == {basis.layers[0].update for basis in engine.bases}


def test_streaming_estimates_are_right_on_average():
    """Over 150 bases: the mean error is within its chance, and what curvature adds, a hundredth here."""
    errors, deviations = [], []
    for seed in range(50):
        model = STACK.model(torch.float64, seed)
        engine = enable(model, "all-linear", rank=RANK, seed=seed, stagger=False)
        optimizer = adamw(engine.param_groups(model))
        engine.attach(optimizer)
        seen = {}
        engine.observe = seen.__setitem__
        grads = stacked(engine, model, full_gradients(STACK, model, [seed]))
        train(STACK, model, optimizer, [seed])
        for basis, grad in grads.items():
            found = seen[basis.layers[0].update]
            share, of_share = chance(grad, basis.matrix)
            errors.append(found.captured_energy - share)
            deviations.append(of_share)
    errors, deviations = torch.tensor(errors), torch.tensor(deviations)
    assert errors.mean().abs() <= SIGMAS * deviations.square().mean().sqrt() / len(errors) ** 0.5 + 0.01
    assert errors.std() > 0.1 * deviations.mean()  # they are estimates: each differs


# Unusable gradients, and what observing costs.


@each_refresh
@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_unusable_gradients_are_told_of(how, factor, first):
    """The share of nothing is not known; the basis stays, if there was one."""
    model, optimizer, engine = on_engine(STACK, refresh=how, update_proj_gap=2)
    if not first:
        train(STACK, model, optimizer, range(2))
    seen = []
    engine.observe = lambda param, found: seen.append(found)
    optimizer.zero_grad()
    (STACK.loss(model, STACK.batch(0)) * factor).backward()
    optimizer.step()
    assert len(seen) == 3
    for found in seen:
        assert math.isnan(found.captured_energy)
        assert math.isnan(found.stable_rank)
        assert found.overlap == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
def test_unusable_gradients_are_told_of_on_the_optimizer_path(factor):
    """Of a batch, the mean over the matrices that have a gradient."""
    params = [Parameter(torch.randn(12, 8)), Parameter(torch.randn(3, 12, 8))]
    optimizer = GaLoreAdamW([{"params": params, "rank": 4, "update_proj_gap": 1}])
    seen = {}
    optimizer.observe = seen.__setitem__
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
            param.grad[0] *= factor
        params[0].grad *= factor
        optimizer.step()
    assert math.isnan(seen[params[0]].captured_energy)
    assert math.isnan(seen[params[0]].stable_rank)
    assert seen[params[0]].overlap == pytest.approx(1.0, abs=1e-5)
    assert 0 < seen[params[1]].captured_energy <= 1
    assert 1 <= seen[params[1]].stable_rank <= 8
    assert 0 < seen[params[1]].overlap <= 1


@each_side
def test_unobserved_no_column_is_added_to_the_sketch(proj_type):
    for observed in (False, True):
        model, optimizer, engine = on_engine(STACK, proj_type=proj_type, update_proj_gap=2)
        if observed:
            engine.observe = lambda param, found: None
        for step in range(3):
            optimizer.zero_grad()
            backward(STACK, model, step)
            for basis in engine.bases:
                if step % 2:
                    assert basis.sketch is None
                else:
                    assert basis.sketch.shape == (basis.matrix.shape[0], RANK + PROBES * observed)
            optimizer.step()
            assert all(basis.sketch is None for basis in engine.bases)


@each_refresh
def test_observing_changes_nothing(how):
    """To rounding: the columns beside them may change the order of sums in a product."""
    runs = []
    for observed in (False, True):
        model, optimizer, engine = on_engine(STACK, torch.float64, refresh=how, update_proj_gap=2)
        if observed:
            engine.observe = lambda param, found: None
        train(STACK, model, optimizer, range(6))
        runs.append(weights(model))
    assert relative(runs[1], runs[0]) <= EXACT
