"""The native ops against their references in Python, which are their specification, and against float64.

What the arithmetic is exact in, both must get to the bit: small whole numbers, halves. Elsewhere an op may be K times
as far from float64 as plain torch is in float32. K is 4: one accumulator that adds up k products has an error of about
√k·u, and torch's, which may add up in parts, can have half of that or less; what is above is one more rounding of the
write-back. Where plain torch is exact by luck the smallest error that counts is two roundings of the largest term.
tests/test_ops.py bounds each element's error a priori, for every dtype and layout, with the ops as they are installed.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import in_part
from torch.library import opcheck
from torch.nn import Parameter

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit, native, ops
from hf_galore.basis_store import Integer
from hf_galore.optim import adamw_ops, blockwise
from hf_galore.rounding import RoundingKey, key_numbers, random_bits, round_stochastic
from hf_galore.sides import Left, Right

OPS = torch.ops.hf_galore
K = 4
KEY = RoundingKey(2**63 + 5, 3, 2**64 - 9)  # beyond what a signed integer holds
numerics = settings(derandomize=True, deadline=None, max_examples=25)
sizes = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 257, 300]))
ranks = st.one_of(st.integers(0, 12), st.sampled_from([31, 257, 300]))
keys = st.sampled_from([None, KEY])
needs_library = pytest.mark.skipif(
    native.cpu_kernels() is None, reason=f"no native ops: {native.reasons_for_none().get('cpu')}"
)


def whole_numbers(*shape, limit=8):
    return torch.randint(-limit, limit + 1, shape).float()


def laid_out(matrix, layout):
    """The same matrix in other memory: as it is, transposed, or a part of a wider one."""
    if layout == "transposed":
        return matrix.mT.contiguous().mT
    return torch.cat((matrix, matrix), dim=1)[:, : matrix.shape[1]] if layout == "part" else matrix


layouts = st.sampled_from(["contiguous", "transposed", "part"])


def both(function, *tensors):
    """What an op does to copies of the tensors: the native one and the reference."""
    results = []
    for references in (False, True):
        copies = [tensor.clone() for tensor in tensors]
        if references:
            with native.references_only():
                function(*copies)
        else:
            function(*copies)
        results.append(copies)
    return results


def assert_equal(results):
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def check(found, plain, exact, magnitude):
    """`found` is at most K times as far from `exact` as `plain`; `magnitude`: of the terms that are summed."""
    if exact.numel():
        unit = torch.finfo(torch.float32).eps / 2
        allowed = K * max((plain.double() - exact).abs().max(), 2 * unit * magnitude.max())
        assert (found.double() - exact).abs().max() <= allowed


# Exact arithmetic: the same bits, rounding included.


@needs_library
@given(m=sizes, n=sizes, r=ranks, key=keys, first_row=st.integers(0, 9), layout=layouts, seed=st.integers(0, 99))
@numerics
def test_add_lowrank_of_whole_numbers_is_the_reference(m, n, r, key, first_row, layout, seed):
    """|sum| < 2²⁴ in units of 2⁻¹²: float32 is exact, and bfloat16 is not."""
    torch.manual_seed(seed)
    left, right = laid_out(whole_numbers(m, r), layout), laid_out(whole_numbers(r, n) / 1024, layout)

    def add(weight):
        ops.add_lowrank_(weight, left, right, alpha=0.5, beta=0.5, key=key, first_row=first_row)

    for dtype in (torch.bfloat16, torch.float32):
        assert_equal(both(add, whole_numbers(m, n).to(dtype)))


@needs_library
@given(m=sizes, n=sizes, key=keys, first_row=st.integers(0, 9), seed=st.integers(0, 99))
@numerics
def test_round_into_is_the_reference(m, n, key, first_row, seed):
    """Any values, NaN and infinity among them."""
    torch.manual_seed(seed)
    values = torch.randn(m, n) * 10.0 ** torch.randint(-30, 30, (m, n))
    for index, special in enumerate((math.nan, math.inf, -math.inf, -0.0, 3.4e38)):
        values.view(-1)[index * 7 : index * 7 + 1] = special
    assert_equal(both(lambda target: ops.round_into_(target, values, key, first_row), torch.zeros(m, n).bfloat16()))


@needs_library
@given(m=sizes, n=sizes, key=keys, delta=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
@numerics
def test_add_of_whole_numbers_is_the_reference(m, n, key, delta, seed):
    torch.manual_seed(seed)
    change = (whole_numbers(m, n) / 1024).to(delta)
    assert_equal(
        both(lambda weight: ops.add_(weight, change, alpha=0.5, beta=0.5, key=key), whole_numbers(m, n).bfloat16())
    )


@needs_library
@given(
    batch=st.integers(1, 3),
    k=st.integers(1, 70),
    r=sizes.filter(bool),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
@numerics
def test_decode_basis_is_the_reference(batch, k, r, bits, seed):
    torch.manual_seed(seed)
    kept = Integer(bits, k, torch.float32)
    coded = kept.encode(torch.randn(batch, k, r))
    assert_equal(both(lambda found: found.copy_(kept.decode(coded)), torch.zeros(batch, k, r)))


@needs_library
def test_write_back_of_products_in_bfloat16_is_the_reference(monkeypatch):
    """Where the processor multiplies bfloat16; the library multiplies, and the op rounds what comes out."""
    monkeypatch.setattr(ops, "_CPU_MULTIPLIES_BFLOAT16", True)
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", 300)
    left, right = whole_numbers(40, 5) / 64, whole_numbers(5, 37)
    weight = whole_numbers(40, 37).bfloat16()
    assert_equal(both(lambda w: ops.add_lowrank_(w, left, right, alpha=0.5, beta=0.5, key=KEY, first_row=4), weight))


def adamw_state(shape, kept, by_rows=False):
    """Zero moments as the optimizer makes them; `kept` is a dtype, uint8 for 8-bit blocks."""
    state = {}
    for name in ("exp_avg", "exp_avg_sq"):
        if kept == torch.uint8:
            adamw_ops.Blockwise8bit(name == "exp_avg", by_rows).create(
                state, name, torch.Size(shape), torch.device("cpu")
            )
        else:
            state[name] = torch.zeros(shape, dtype=kept)
    return state


def lowrank_step(weight, grad, state, basis, side, rule, *, key=None, decay=0.98, parameter=0):
    """A call of lowrank_adamw_ for one matrix; `basis` is a tensor, or what an `Integer` has made of one, with it."""
    coded, kept = basis if isinstance(basis, tuple) else ({"basis": basis}, None)
    call = adamw_ops.LowRankStep(
        rule,
        scale=0.25,
        decay=decay,
        right=isinstance(side, Right),
        basis_bits=0 if kept is None else kept.bits,
        key=key and (key.seed, key.step),
        dtype=weight.dtype,
        kept=state["exp_avg"].dtype,
        device=weight.device,
    )
    call([adamw_ops.OneMatrix(weight, grad, state, coded["basis"], coded.get("basis_scale"), parameter, 0, 0)])


kept_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8])


@needs_library
@given(
    m=st.integers(1, 40),
    r=st.one_of(st.integers(1, 12), st.sampled_from([257, 300])),
    kept=kept_dtypes,
    by_rows=st.booleans(),
    key=keys,
    seed=st.integers(0, 99),
)
@numerics
def test_moments_of_whole_numbers_are_the_reference(m, r, kept, by_rows, key, seed):
    """With β1 = β2 = ½ the first step is exact in float32: bfloat16 bits, 8-bit codes and scales are the same."""
    torch.manual_seed(seed)
    rule = adamw_ops.Rule(lr=0.5, beta1=0.5, beta2=0.5, eps=1e-6, steps=1.0)
    grad = whole_numbers(m, r)
    before = adamw_state((m, r), kept, by_rows)

    def step(*tensors):
        state = dict(zip(before, tensors, strict=True))
        adamw_ops.adamw_(torch.zeros(m, r), grad, state, rule, decay=1.0, key=key, first_row=3)

    assert_equal(both(step, *before.values()))


@needs_library
@pytest.mark.parametrize("values", ["spread", "near boundaries", "not finite", "zero"])
def test_codes_are_those_of_the_code_book(values):
    """With β1 = β2 = 0 the moments are R and R², and are quantized as `blockwise.quantize` does, whatever they are."""
    book = blockwise.code_book(True, torch.device("cpu"))
    middles = (book[:-1] + book[1:]) / 2
    grad = {
        "spread": torch.randn(40, 256) * 10 ** torch.empty(40, 256).uniform_(-9, 0),
        "near boundaries": torch.cat(
            [middles.nextafter(torch.tensor(s * 9.0)) for s in (-1, 1)] + [middles, book[-3:]]
        ),
        "not finite": torch.tensor([[math.nan, 1.0] * 128, [math.inf, 1.0] * 128, [1e30] * 256, [1e-42] * 256]),
        "zero": torch.zeros(3, 100),
    }[values]
    grad = grad.reshape(1, -1) if grad.dim() == 1 else grad
    if values == "near boundaries":  # a scale of one in every block
        grad = torch.nn.functional.pad(grad, (0, -grad.numel() % 255)).view(-1, 255)
        grad = torch.cat((torch.ones(len(grad), 1), grad), dim=1)
    rule = adamw_ops.Rule(lr=0.0, beta1=0.0, beta2=0.0, eps=1.0, steps=1.0)
    state = adamw_state(grad.shape, torch.uint8)
    adamw_ops.adamw_(torch.zeros(grad.shape), grad, state, rule, decay=1.0, key=None, first_row=0)
    for name, moment in (("exp_avg", grad), ("exp_avg_sq", grad.square())):
        if values == "not finite":  # R − 0·(R − 0) is NaN for an infinite R, in torch too
            moment = torch.where(moment.isinf(), math.nan, moment) if name == "exp_avg" else moment
        codes, absmax = blockwise.quantize(moment, name == "exp_avg")
        assert torch.equal(state[name], codes)
        assert_equal(([state[f"{name}_absmax"]], [absmax]))


# Errors against float64.


@needs_library
@given(m=sizes, n=sizes, r=ranks, layout=layouts, seed=st.integers(0, 99))
@numerics
def test_error_of_add_lowrank(m, n, r, layout, seed):
    torch.manual_seed(seed)
    left, right, weight = laid_out(torch.randn(m, r), layout), laid_out(torch.randn(r, n), layout), torch.randn(m, n)
    exact = 0.9 * weight.double() - 0.3 * (left.double() @ right.double())
    terms = weight.abs() + left.abs() @ right.abs()
    (found,), (plain,) = both(
        lambda target: ops.add_lowrank_(target, left, right, alpha=-0.3, beta=0.9, key=None), weight
    )
    check(found, plain, exact, terms)


@needs_library
@given(m=sizes, n=sizes, r=ranks, layout=layouts, narrow=st.booleans(), seed=st.integers(0, 99))
@numerics
def test_error_of_matmul(m, n, r, layout, narrow, seed):
    """G Q and PᵀG with either operand in bfloat16, which are exact there as they are."""
    torch.manual_seed(seed)
    a, b = laid_out(torch.randn(m, n), layout), laid_out(torch.randn(n, r), layout)
    a, b = (a.bfloat16(), b) if narrow else (a, b.bfloat16())
    for left, right in ((a, b), (b.mT, a.mT)):
        exact = left.double() @ right.double()
        with native.references_only():
            plain = ops.matmul(left, right)
        found = ops.matmul(left, right)
        assert found.dtype == torch.float32
        check(found, plain, exact, left.float().abs() @ right.float().abs())


@needs_library
@given(
    m=sizes,
    n=sizes,
    right=st.booleans(),
    kept=kept_dtypes,
    r=st.sampled_from([1, 5, 16, 257]),
    seed=st.integers(0, 99),
)
@numerics
def test_error_of_lowrank_adamw(m, n, right, kept, r, seed):
    """Three steps. With 8-bit or bfloat16 moments the exact step starts from what is kept, in float64.

    G and the basis are whole numbers, of which R is exact: what is near zero in R would make N anything otherwise.
    """
    if not m * n:
        return
    torch.manual_seed(seed)
    side = Right() if right else Left()
    basis, weight = whole_numbers(n if right else m, r) / 64, torch.randn(m, n)
    state = adamw_state((m, r) if right else (r, n), kept)
    for steps in range(1, 4):
        rule = adamw_ops.Rule(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3, steps=float(steps))
        whole = whole_numbers(m, n)
        grad = side.project(whole.double(), basis.double())
        first, second = (
            blockwise.dequantize(state[name], state[f"{name}_absmax"], name == "exp_avg") if kept == torch.uint8
            else state[name]
            for name in ("exp_avg", "exp_avg_sq")
        )  # fmt: skip
        first = 0.9 * first.double() + 0.1 * grad
        second = 0.99 * second.double() + 0.01 * grad.square()
        size = 0.1 * math.sqrt(1 - 0.99**steps) / (1 - 0.9**steps)
        update = size * first / (second.sqrt() + 1e-3)
        one, other = side.factors(update, basis.double())
        exact = 0.98 * weight.double() - 0.25 * (one @ other)

        def step(target, *tensors, state=state, grad=whole, rule=rule):
            lowrank_step(target, grad, dict(zip(state, tensors, strict=True)), basis, side, rule)

        found, plain = both(step, weight, *state.values())
        check(found[0], plain[0], exact, weight.abs() + 0.25 * (one.abs() @ other.abs()))
        if kept == torch.float32:
            check(found[1], plain[1], first, first.abs())
            check(found[2], plain[2], second, second.abs())
        weight, state = found[0], dict(zip(state, found[1:], strict=True))


# Several matrices, coded bases, and products in bfloat16.


@needs_library
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    r=st.sampled_from([1, 5, 16, 40]),
    right=st.booleans(),
    kept=kept_dtypes,
    bits=st.sampled_from([None, 4, 8]),
    narrow=st.booleans(),
    key=keys,
    seed=st.integers(0, 99),
)
@numerics
def test_first_step_of_whole_numbers_is_the_reference(m, n, r, right, kept, bits, narrow, key, seed):
    """R is exact, and with β1 = β2 = ½, eps = 0 and V = R²/2 so is N = ±1 up to a constant, and back(N): to the bit.

    A basis of codes has scales that are powers of two.
    """
    torch.manual_seed(seed)
    side, dtype = Right() if right else Left(), torch.bfloat16 if narrow else torch.float32
    rows = n if right else m
    basis = whole_numbers(rows, r, limit=7) / 64
    if bits is not None:
        format = Integer(bits, rows, torch.float32)
        coded = format.encode(basis)
        coded["basis_scale"] = torch.full_like(coded["basis_scale"], 1 / 64)
        basis = (coded, format)
    grad = (whole_numbers(m, n) * 2 + 1).to(dtype)
    rule = adamw_ops.Rule(lr=0.5, beta1=0.5, beta2=0.5, eps=1e-6, steps=1.0)
    before = adamw_state((m, r) if right else (r, n), kept)

    def step(target, *tensors):
        state = dict(zip(before, tensors, strict=True))
        lowrank_step(target, grad, state, basis, side, rule, key=key, parameter=7)

    found, plain = both(step, whole_numbers(m, n).to(dtype), *before.values())
    assert_equal((found[1:], plain[1:]))
    # Of the weights the signs of N times the basis are added up, in float32; rounding may tip one gap of bfloat16.
    torch.testing.assert_close(found[0], plain[0], rtol=2**-7 if narrow else 1e-5, atol=1e-5, equal_nan=True)


@needs_library
@pytest.mark.parametrize("proj_type", ["right", "left"])
def test_a_step_in_bfloat16_is_the_reference(monkeypatch, proj_type):
    """Where the processor multiplies bfloat16: its products are torch's in the op as in the reference."""
    monkeypatch.setattr(ops, "_CPU_MULTIPLIES_BFLOAT16", True)
    results = []
    for references in (False, True):
        torch.manual_seed(0)
        weight = Parameter(torch.randn(70, 50).bfloat16())
        group = {"params": [weight], "rank": 8, "update_proj_gap": 100, "proj_type": proj_type, "basis_dtype": "int8"}
        optimizer = GaLoreAdamW([group], lr=1e-2, weight_decay=0.1, state_dtype="bfloat16")
        weight.grad = torch.randn(70, 50).bfloat16()
        if references:
            with native.references_only():
                optimizer.step()
        else:
            optimizer.step()
        results.append([weight.detach(), *(optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq"))])
    (found, *moments), (plain, *expected) = results
    assert_equal((moments, expected))
    assert (found != plain).float().mean() < 0.01  # the moments' last bits tip a rounding now and then
    torch.testing.assert_close(found, plain, rtol=2**-7, atol=1e-4)


def test_matrices_together_come_out_as_they_do_alone():
    """Bit for bit: one call for all that are alike, whatever else is in it."""
    shapes, grads = [(20, 12), (12, 20), (20, 12), (9, 9), (20, 12)], []
    torch.manual_seed(0)
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    for _ in range(3):
        grads.append([torch.randn(shape).bfloat16() for shape in shapes])

    def trained(together):
        params = [Parameter(weight.clone()) for weight in weights]
        options = {"rank": 4, "update_proj_gap": 2, "basis_dtype": "int4"}
        optimizer = GaLoreAdamW([{"params": params, **options}], lr=1e-2, weight_decay=0.1, stochastic_rounding=False)
        calls = []
        call = adamw_ops.LowRankStep.__call__

        def one_by_one(self, matrices):
            calls.append(len(matrices))
            for part in [matrices] if together else [[matrix] for matrix in matrices]:
                call(self, part)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adamw_ops.LowRankStep, "__call__", one_by_one)
            for step in grads:
                for param, grad in zip(params, step, strict=True):
                    param.grad = grad
                optimizer.step()
        assert calls == [4, 1] * 3  # matrices on the right, and on the left
        return [param.detach() for param in params]

    assert_equal((trained(True), trained(False)))


# NaN and infinity, and what the bits go with.


@needs_library
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(3), ids=["weight", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_spreads_as_in_torch(special, where, dtype):
    torch.manual_seed(0)
    tensors = [whole_numbers(13, 37).to(dtype), whole_numbers(13, 5) + 0.5, whole_numbers(5, 37) + 0.5]
    tensors[where][3, 4] = special
    _, left, right = tensors
    assert_equal(both(lambda w: ops.add_lowrank_(w, left, right, alpha=0.5, beta=0.5, key=KEY), tensors[0]))


@needs_library
@pytest.mark.parametrize("special", [math.nan, math.inf])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_gradient_that_is_not_finite_spreads_as_in_torch(special, kept):
    grad = whole_numbers(9, 40)
    grad[3, 4] = special
    rule = adamw_ops.Rule(lr=0.5, beta1=0.5, beta2=0.5, eps=1e-6, steps=1.0)
    before = adamw_state((9, 40), kept)

    def step(target, *tensors):
        state = dict(zip(before, tensors, strict=True))
        adamw_ops.adamw_(target, grad, state, rule, decay=1.0, key=KEY, first_row=0)

    found, plain = both(step, torch.zeros(9, 40), *before.values())
    assert torch.equal(found[0].isnan(), plain[0].isnan())
    assert_equal((found[1:], plain[1:]))


@needs_library
def test_rows_by_themselves_come_out_as_they_do_together():
    """Bit for bit: rows that are spread over ranks or threads are those of a single process."""
    torch.manual_seed(0)
    left, right, grad = torch.randn(70, 300), torch.randn(300, 90), torch.randn(70, 333).bfloat16()
    basis, whole = torch.randn(333, 40), torch.randn(70, 90).bfloat16()
    parts = whole.clone()
    ops.add_lowrank_(whole, left, right, alpha=0.1, beta=0.9, key=KEY)
    product = ops.matmul(grad, basis)
    for first, last in itertools.pairwise((0, 1, 8, 35, 70)):
        rows = slice(first, last)
        ops.add_lowrank_(parts[rows], left[rows], right, alpha=0.1, beta=0.9, key=KEY, first_row=first)
        assert torch.equal(ops.matmul(grad[rows], basis), product[rows])
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("kept", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_the_reference_takes_several_matrices_at_once(monkeypatch, in_bfloat16, kept):
    """As it does where a kernel steps them together: the bits are those of one after another."""

    def stepped():
        torch.manual_seed(0)
        matrices = [
            adamw_ops.OneMatrix(
                *(torch.randn(m, n).bfloat16(), torch.randn(m, n).bfloat16(), adamw_state((m, 5), kept)),
                *(torch.randn(n, 5), None, m, 3, 3),
            )
            for m, n in ((30, 20), (7, 300), (64, 64))
        ]
        step = adamw_ops.LowRankStep(
            adamw_ops.Rule(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-6, steps=1.0),
            *(0.25, 0.98, True, 0, (1, 2), torch.bfloat16, kept, torch.device("cpu")),
        )
        with native.references_only():
            step(matrices)
        return [tensor for one in matrices for tensor in (one.weight, *one.state.values())]

    monkeypatch.setattr(adamw_ops, "product_dtype", lambda *_: torch.bfloat16 if in_bfloat16 else torch.float32)
    monkeypatch.setattr(ops, "product_dtype", adamw_ops.product_dtype)
    alone = stepped()
    monkeypatch.setattr(adamw_ops, "_some_at_a_time", lambda moments: [slice(0, 2), slice(2, len(moments))])
    assert_equal((stepped(), alone))


def test_how_many_matrices_are_taken_at_once():
    def parts(device, *sizes):
        moments = [torch.empty(size, device=device) for size in sizes]
        return [(part.start, part.stop) for part in adamw_ops._some_at_a_time(moments)]

    limit = adamw_ops._VALUES_AT_A_TIME
    assert parts("cpu", 4, 5, 6) == [(0, 1), (1, 2), (2, 3)]
    assert parts("meta", 4, 5, 6) == [(0, 3)]
    assert parts("meta", limit, 1, limit, 1, 2) == [(0, 1), (1, 3), (3, 5)]


@needs_library
def test_threads_change_no_bit():
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.manual_seed(0)
            torch.set_num_threads(count)
            weight, grad = torch.randn(300, 200).bfloat16(), torch.randn(300, 200)
            state = adamw_state((300, 24), torch.uint8)
            rule = adamw_ops.Rule(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-6, steps=1.0)
            lowrank_step(weight, grad.bfloat16(), state, torch.randn(200, 24), Right(), rule, key=KEY)
            results.append([weight, *state.values()])
    finally:
        torch.set_num_threads(threads)
    assert_equal(results[:2])
    assert_equal(results[1:])


@needs_library
def test_stochastic_rounding_is_unbiased():
    """The mean of 1024 roundings of each of 390 sums, within 5 standard deviations (1 in 4400 for all of them).

    A rounding has the variance f·(1 − f)·gap², f the cut-off part of the gap; f is between ¼ and ¾ for the mean to be
    normal, and the sums are exact in float32.
    """
    torch.manual_seed(0)
    target = torch.randint(0x4000, 0xC000, (13, 30)).float() / 2**16 / 128 + 1  # the gap is 1/128 from one to two
    left, right = torch.ones(13, 1), torch.ones(1, 30)
    total = torch.zeros(13, 30, dtype=torch.float64)
    for step in range(1024):
        weight = torch.ones(13, 30).bfloat16()
        ops.add_(weight, target - 1, alpha=1.0, beta=1.0, key=RoundingKey(7, step, 3))
        if step == 0:  # the write-back of a product rounds the same sums with the same bits
            again = torch.ones(13, 30).bfloat16()
            ops.add_lowrank_(again, left * 0.5, right * 0.5, alpha=1.0, beta=1.0, key=RoundingKey(7, 0, 3))
            bits = random_bits(RoundingKey(7, 0, 3), range(13), 30, torch.device("cpu"))
            assert torch.equal(again, round_stochastic(torch.full((13, 30), 1.25), bits))
        total += weight.double()
    part = (target.double() - 1) * 128
    scores = (total / 1024 - target.double()) / (part * (1 - part) / 128**2 / 1024).sqrt()
    assert scores.abs().max() < 5
    assert scores.mean().abs() < 5 / math.sqrt(scores.numel())


# The ops as torch sees them.


def op_cases():
    """An op and arguments for it."""
    numbers = key_numbers(KEY)
    weight, rule = torch.randn(6, 10).bfloat16(), (0.1, 0.9, 0.99, 1e-6, 1.0)
    yield OPS.add_, (weight, torch.randn(6, 10), 0.5, 0.9, numbers, 0)
    yield OPS.round_into_, (weight, torch.randn(6, 10), None, 2)
    of_both = [weight, weight + 1], [torch.randn(6, 3).bfloat16()] * 2, [torch.randn(3, 10).bfloat16()] * 2
    yield OPS.add_bfloat16_lowrank_, (*of_both, 0.5, 0.9, numbers[:2], [7, 8], [0, 3])
    yield OPS.add_lowrank_, (weight, torch.randn(6, 3), torch.randn(3, 10), 0.5, 0.9, numbers, 0)
    yield OPS.matmul, (torch.randn(6, 10).bfloat16(), torch.randn(10, 3))
    codes = torch.randint(-7, 8, (2, 5, 30), dtype=torch.int8)
    yield OPS.decode_basis, (codes, torch.rand(3), 8, 5)
    yield OPS.decode_basis, (codes.view(torch.uint8), torch.rand(5), 4, 9)
    full, low = adamw_state((6, 10), torch.bfloat16), adamw_state((6, 3), torch.uint8)
    of_one = [weight], [torch.randn(6, 10)]
    yield OPS.adamw_, (*of_one, *adamw_ops._kept(full, 10), *rule, 0.9, numbers[:2], numbers[2:], [0])
    *lists, signed_codes, unsigned_codes = (*of_one, *adamw_ops._kept(low, 3))
    books = signed_codes, unsigned_codes
    rest = (*rule, 0.25, 0.9, numbers[:2], numbers[2:], [0], [0])
    yield OPS.lowrank_adamw_, (*lists, *books, [torch.randn(10, 3)], [], 0, True, False, *rest)
    lists[4:] = [], []
    lists[2:4] = [[state] for state in adamw_state((3, 10), torch.float32).values()]
    coded = (torch.randint(0, 255, (3, 3), dtype=torch.uint8), torch.rand(1))
    yield OPS.lowrank_adamw_, (*lists, None, None, *([one] for one in coded), 4, False, True, *rest)


def test_opcheck():
    for op, args in op_cases():
        opcheck(op.default, args)


@pytest.mark.slow
def test_opcheck_with_the_references():
    """The same in a process that has not loaded the library."""
    python("import test_native; test_native.test_opcheck()", HF_GALORE_CPU_KERNELS="python")


def test_compiled_as_a_whole():
    def step(weight, grad, basis):
        ops.add_lowrank_(weight, ops.matmul(grad, basis), basis.mT, alpha=-0.1, beta=0.9, key=KEY)

    weight, grad, basis = torch.randn(8, 12).bfloat16(), torch.randn(8, 12).bfloat16(), torch.randn(12, 3)
    expected = weight.clone()
    step(expected, grad, basis)
    torch.compile(step, fullgraph=True, backend="aot_eager")(weight, grad, basis)
    torch.testing.assert_close(
        weight, expected, rtol=2**-7, atol=1e-2
    )  # one gap of bfloat16: products differ in a bit


def python(code, **env):
    env = {
        **os.environ,
        "HF_GALORE_REQUIRE_NATIVE": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    } | env
    return subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True, timeout=600
    )


@needs_library
def test_the_generic_kernels():
    """What a processor without AVX2 runs: all that is above but what starts other processes."""
    selected = "whole_numbers or error or codes or finite or rows or round_into"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", selected, __file__]
    check = "from hf_galore import native; assert native.cpu_kernels() == 'generic'"
    python(f"{check}\nimport sys, pytest\nsys.exit(pytest.main({options!r}))", HF_GALORE_CPU_KERNELS="generic")


def test_a_library_that_is_required_and_missing_is_an_error():
    with pytest.raises(subprocess.CalledProcessError) as raised:
        python("import hf_galore.ops", HF_GALORE_CPU_KERNELS="python", HF_GALORE_REQUIRE_NATIVE="1")
    assert (
        "ImportError: HF_GALORE_REQUIRE_NATIVE is set and the native ops of hf_galore for cpu are missing"
        in raised.value.stderr
    )


def test_modules_that_are_imported_anew_find_the_ops():
    """As in a notebook that reloads them."""
    python(
        "import sys, torch, hf_galore.ops as before\n"
        "for name in [name for name in sys.modules if name.startswith('hf_galore')]: del sys.modules[name]\n"
        "import hf_galore.ops as after\n"
        "assert after is not before\n"
        "for ops in (before, after):\n"
        "    weight = torch.zeros(2, 3)\n"
        "    ops.add_lowrank_(weight, torch.ones(2, 1), torch.ones(1, 3), alpha=1.0, beta=1.0, key=None)\n"
        "    assert (weight == 1.0).all()"
    )


# Memory.


@needs_library
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "cls", "proj_type"),
    in_part(
        itertools.product(
            [torch.float32, torch.bfloat16], [None, "bfloat16"], [GaLoreAdamW, GaLoreAdamW8bit], ["right", "left"]
        ),
        (torch.float32, None, GaLoreAdamW, "right"),
        (torch.bfloat16, "bfloat16", GaLoreAdamW, "left"),
        (torch.bfloat16, None, GaLoreAdamW8bit, "right"),
        (torch.float32, "bfloat16", GaLoreAdamW8bit, "left"),
    ),
)
def test_a_step_allocates_no_matrix(dtype, state_dtype, cls, proj_type):
    """The largest allocation of a step between refreshes, scratch of kernels included: under a byte per element."""
    weight = Parameter(torch.randn(1500, 1200).to(dtype))
    weight.grad = torch.randn_like(weight)
    group = {"params": [weight], "rank": 32, "update_proj_gap": 100, "proj_type": proj_type}
    optimizer = cls([group], lr=1e-3, weight_decay=0.1, state_dtype=state_dtype)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    events = profile.profiler.kineto_results.events()
    allocated = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert allocated
    assert 0 < max(allocated) < weight.numel()
