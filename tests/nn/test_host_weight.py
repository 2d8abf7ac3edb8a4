"""Masters of ternary layers in host memory: the run is that without, bit for bit, and what travels is counted."""

import copy

import pytest
import torch
from lowrank_cases import CASES, GAP, RANK, adamw, adamw8bit, assert_same, on_engine, train, weights

from hf_galore import replace_linear
from hf_galore.lowrank_backward import disable, enable
from hf_galore.nn.convert import bitlinears
from hf_galore.nn.packing import PER_BYTE
from hf_galore.nn.warmup import set_lambdas

TERNARY = [CASES["ternary"], CASES["ternary, normed"]]
STEPS = 2 * GAP + 2


@pytest.mark.parametrize("case", TERNARY)
@pytest.mark.parametrize("make", [adamw, adamw8bit, lambda groups: torch.optim.AdamW(groups, lr=1e-2)])
@pytest.mark.parametrize("options", [{}, {"fold_every": 5}, {"subspace": "randomized", "basis_dtype": "int8"}])
def test_a_run_is_that_without(case, make, options):
    runs = []
    for offload in (False, True):
        model, optimizer, _ = on_engine(case, make=make, offload_masters=offload, micro_batches=2, **options)
        train(case, model, optimizer, range(STEPS), micro_batches=2)
        runs.append(weights(model))
    assert_same(runs[0], runs[1])


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_travels_is_codes_and_projected_gradients(micro_batches):
    """Two bits a weight and a scale after every step, and B's gradient in every pass; bases when they move."""
    case = CASES["ternary"]
    model, optimizer, engine = on_engine(case, offload_masters=True, update_proj_gap=1000, micro_batches=micro_batches)
    shapes = [tuple(layer.weight.shape) for layer in engine.layers.values()]
    assert all(m % PER_BYTE == 0 for m, _ in shapes)
    train(case, model, optimizer, range(2), rows=6, micro_batches=micro_batches)  # a refresh, and its basis in use
    sent, received = engine.link.sent, engine.link.received
    steps = 4
    train(case, model, optimizer, range(2, 2 + steps), rows=6, micro_batches=micro_batches)
    codes = sum(m * n // 4 + 4 for m, n in shapes)
    assert engine.link.sent - sent == steps * codes
    assert engine.link.received - received == steps * micro_batches * sum(4 * m * RANK for m, _ in shapes)


def test_a_refresh_sends_a_test_matrix_and_receives_a_sketch():
    case = CASES["ternary"]
    model, optimizer, engine = on_engine(case, offload_masters=True, update_proj_gap=1000)
    shapes = [tuple(layer.weight.shape) for layer in engine.layers.values()]
    train(case, model, optimizer, range(1))
    codes = sum(m * n // 4 + 4 for m, n in shapes)
    assert engine.link.sent == codes + sum(4 * (n + m) * RANK for m, n in shapes)
    assert engine.link.received == sum(4 * (n + m) * RANK for m, n in shapes)


def test_moving_the_model_leaves_masters_and_small_parameters_on_the_host():
    model, _, engine = on_engine(CASES["ternary"], offload_masters=True)
    model.to("meta")  # stands for a device that is not here
    assert engine.link.device.type == "meta"
    layers = bitlinears(model)
    devices = {(name, p.device.type) for one in layers.values() for name, p in one.named_parameters()}
    assert devices == {("weight", "cpu"), ("lowrank_update", "cpu"), ("bias", "meta")}


def test_afterwards_the_model_is_the_users_own():
    case = CASES["ternary"]
    model, optimizer, _ = on_engine(case, offload_masters=True)
    train(case, model, optimizer, range(3))
    disable(model)
    assert all(layer.link is None for layer in bitlinears(model).values())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in twin.parameters():
            param.neg_()
    assert not torch.equal(twin(case.batch(0)), model(case.batch(0)))


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (lambda: CASES["linear"].model(), {}, "all targets must be BitLinear; see hf_galore.replace_linear"),
        (lambda: replace_linear(CASES["linear"].model()), {"refresh": "exact"}, "needs refresh='streaming'"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(build, options, match):
    model = build()
    before = weights(model)
    with pytest.raises(ValueError, match=match):
        enable(model, rank=RANK, offload_masters=True, **options)
    assert_same(weights(model), before)
    assert all(param.requires_grad or name == "square.bias" for name, param in model.named_parameters())


def test_a_warmup_of_the_weights_is_refused():
    model, _, _ = on_engine(CASES["ternary"], offload_masters=True)
    set_lambdas(model, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"λ of the weights is 0.5.*LambdaWarmup\(weights=None\)"):
        model(CASES["ternary"].batch(0))
