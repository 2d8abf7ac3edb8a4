"""BitLinear against the paper's formulas, and when it makes its codes."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.integrations import bitnet

import references
from hf_galore.nn import bitlinear as module
from hf_galore.nn.bitlinear import BitLinear, castable_masters
from hf_galore.nn.functional import absmax_int8, absmean_ternary, dequantize
from hf_galore.nn.shared_activations import SharedActivations


@pytest.fixture
def counted(monkeypatch):
    """How many weights have been quantized."""
    calls = []

    def counting(weight):
        calls.append(weight)
        return absmean_ternary(weight)

    monkeypatch.setattr(module, "absmean_ternary", counting)
    return calls


def layer(m=24, n=40, bias=True, **options):
    made = BitLinear(n, m, bias, **options)
    with torch.no_grad():
        made.weight.normal_()
    return made


# The formulas.


@settings(deadline=None, max_examples=60)
@given(m=st.integers(1, 70), n=st.integers(1, 70), size=st.floats(1e-7, 1e6), seed=st.integers(0, 99))
def test_codes_are_those_of_the_paper(m, n, size, seed):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    codes, scale = absmean_ternary(weight)
    wanted, wanted_scale = references.absmean_ternary(weight)
    assert scale == wanted_scale
    border = ((weight / scale).abs() - 0.5).abs() < 1e-12  # W·(1/s) and W/s may fall on either side
    assert torch.equal(codes.double()[~border], wanted[~border])
    tokens, a = absmax_int8(weight)
    wanted, wanted_a = references.absmax_int8(weight)
    assert torch.equal(tokens.double(), wanted)
    assert torch.equal(a, wanted_a)


@pytest.mark.parametrize("shape", [(1, 1), (700, 1100), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_transformers_online_layer(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    tokens, a = absmax_int8(weight)
    with torch.compiler.set_stance("force_eager"):
        theirs, their_tokens = bitnet.WeightQuant.apply(weight), bitnet.ActQuant.apply(weight)
    ternary = absmean_ternary(weight)
    assert torch.equal(ternary.codes, theirs.sign().to(torch.int8))
    eps = torch.finfo(dtype).eps  # they divide by 1/s, we multiply by s
    assert torch.allclose(dequantize(ternary, dtype), theirs, rtol=eps, atol=0)
    assert torch.equal((tokens / a).to(dtype), their_tokens)


def test_blocks_of_a_large_matrix_make_no_difference(monkeypatch):
    weight, x = torch.randn(130, 70), torch.randn(3, 41, 70)
    codes, tokens = absmean_ternary(weight).codes, absmax_int8(x).codes
    monkeypatch.setattr("hf_galore.nn.functional.BLOCK_ELEMENTS", 200)
    assert torch.equal(codes, absmean_ternary(weight).codes)
    assert torch.equal(tokens, absmax_int8(x).codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    one = layer()
    x = torch.randn(5, 40)
    x[2, 3] = value
    y = one(x)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3, 4]].isfinite().all()
    with torch.no_grad():
        one.weight[0, 0] = value
    assert not one(torch.randn(5, 40)).isfinite().any()


@pytest.mark.parametrize("parts", [(1.0, 1.0), (0.3, 1.0), (1.0, 0.6), (0.25, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 7, 40), (0, 40)])
def test_outputs_and_gradients_are_those_of_the_fake_quantized_layer(parts, bias, shape):
    """To the rounding of float32 sums: k = 8 times the error that the reference itself makes."""
    one = layer(bias=bias)
    one.weight_lambda, one.activation_lambda = parts
    x = torch.randn(shape, requires_grad=True)
    inputs = [x, one.weight, *([one.bias] if bias else [])]

    def reference(dtype):
        cast = [each.detach().to(dtype).requires_grad_() for each in inputs]
        y = references.bitlinear(cast[0], cast[1], cast[2] if bias else None, *parts)
        return [y, *torch.autograd.grad(y, cast, torch.ones_like(y) * weights.to(dtype))]

    weights = torch.randn(*shape[:-1], 24)
    y = one(x)
    ours = [y, *torch.autograd.grad(y, inputs, weights)]
    for mine, plain, exact in zip(ours, reference(torch.float32), reference(torch.float64), strict=True):
        assert mine.dtype == torch.float32
        bound = 8 * float((plain - exact).detach().abs().amax() if plain.numel() else 0) + 1e-6
        assert torch.allclose(mine.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_computes_what_float32_does(dtype, autocast):
    one = layer()
    x = torch.randn(6, 40)
    exact = one(x if autocast else x.to(dtype).float())
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = one(x if autocast else x.to(dtype))
    assert y.dtype == dtype
    assert torch.allclose(y.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    y.sum().backward()
    assert one.weight.grad.dtype == torch.float32


def test_integers_and_floating_point_multiply_alike(monkeypatch):
    one, x = layer(64, 96), torch.randn(33, 96)
    results = []
    for integers in (True, False):
        monkeypatch.setattr("hf_galore.nn.functional.multiplies_int8", lambda *_, integers=integers: integers)
        results.append(one(x))
    assert torch.allclose(*results, rtol=1e-5, atol=1e-5)


def test_activations_may_stay_as_they_are():
    one, x = layer(quantize_activations=False), torch.randn(5, 40)
    assert torch.allclose(one(x), references.bitlinear(x, one.weight, one.bias, 1.0, 0.0), atol=1e-5)


def test_the_norm_comes_before_the_rounding():
    one, x = layer(use_rms_norm=True, rms_norm_eps=1e-3), torch.randn(5, 40)
    with torch.no_grad():
        one.rms_norm.weight.uniform_()
    normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * one.rms_norm.weight
    assert torch.allclose(one(x), references.bitlinear(normed, one.weight, one.bias), atol=1e-5)


def test_off_is_nn_linear_bit_for_bit():
    plain = nn.Linear(40, 24).bfloat16()
    one = layer()
    one.load_state_dict(plain.state_dict())
    one.original_dtype, one.bias.data, one.quantized = torch.bfloat16, one.bias.data.bfloat16(), False
    x = torch.randn(5, 40).bfloat16()
    assert torch.equal(one(x), plain(x))


def test_compiled_it_computes_the_same():
    one, x = layer(), torch.randn(5, 40)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), one(x), atol=1e-5)


# Codes are made once for each value of the weight.


def test_codes_are_made_once_a_step(counted):
    one = layer()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    for step in range(3):
        for _ in range(4):
            x = torch.randn(5, 40, requires_grad=True)
            torch.utils.checkpoint.checkpoint(one, x, use_reentrant=False).sum().backward()
            with torch.inference_mode():
                one(x)
        assert len(counted) == step + 1
        optimizer.step()


def test_codes_made_in_inference_serve_training(counted):
    one, x = layer(), torch.randn(5, 40)
    with torch.inference_mode():
        one(x)
    one(x).sum().backward()
    assert len(counted) == 1


WRITES = {
    "in place": lambda one: one.weight.detach().neg_(),
    "another tensor": lambda one: setattr(one.weight, "data", -one.weight.data),
    "another parameter": lambda one: setattr(one, "weight", nn.Parameter(-one.weight.detach())),
    "load_state_dict": lambda one: one.load_state_dict({k: -v for k, v in one.state_dict().items()}),
    "load_state_dict(assign=True)": lambda one: one.load_state_dict(
        {k: -v for k, v in one.state_dict().items()}, assign=True
    ),
    "data, and requantize": lambda one: (one.weight.data.neg_(), one.requantize()),
    "an optimizer that writes to data": lambda one: _Negative(one.parameters()).step(),
    "to(float64)": lambda one: one.to(torch.float64).weight.data.neg_(),
}


class _Negative(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.data.neg_()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_makes_new_codes(write):
    one = layer(bias=False)
    codes = one.ternary().codes.clone()
    write(one)
    assert torch.equal(one.ternary().codes, -codes)
    assert (codes != 0).any()


def test_copies_make_their_own_codes():
    one, x = layer(), torch.randn(5, 40)
    y = one(x)
    stored = io.BytesIO()
    torch.save(one, stored)
    for other in (copy.deepcopy(one), torch.load(io.BytesIO(stored.getvalue()), weights_only=False)):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.weight.neg_()
        assert not torch.equal(other(x), y)
        assert torch.equal(one(x), y)


# The weight keeps its precision.


def test_the_weight_stays_in_float32():
    one = layer()
    before = one.weight.detach().clone()
    with pytest.warns(UserWarning, match="keeps its weight in float32"):
        one.bfloat16()
    assert one.weight.dtype == torch.float32
    assert torch.equal(one.weight, before)
    assert one.bias.dtype == torch.bfloat16
    with castable_masters():
        one.half()
    assert one.weight.dtype == torch.float16


# Inputs that layers share.


def test_an_input_is_quantized_once_for_its_layers(monkeypatch):
    calls = []
    monkeypatch.setattr("hf_galore.nn.shared_activations.absmax_int8", lambda x: calls.append(1) or absmax_int8(x))
    layers = [layer() for _ in range(3)]
    alone, x = copy.deepcopy(layers), torch.randn(5, 40)
    shared = SharedActivations(3)
    for one in layers:
        one.shared = shared
    for count in (1, 2):
        assert all(torch.equal(one(x), other(x)) for one, other in zip(layers, alone, strict=True))
        assert len(calls) == count  # nothing is kept after the last one
    layers[0](x)
    x.neg_()
    assert torch.equal(layers[1](x), alone[1](x))
    assert len(calls) == 4
