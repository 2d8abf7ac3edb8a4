"""The write-back of an update into a weight, against the same computation in float64.

Rounding errors are bounded by the terms that are summed: a sum of k products in any order, with or without fused
multiply-add, is off by at most γ(k)·Σ|terms| with γ(k) = k·u/(1 − k·u) and u the unit roundoff (Higham, Accuracy and
Stability of Numerical Algorithms, 3.1).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_galore.ops import BLOCK_ELEMENTS, add_, add_lowrank_, matmul, product_dtype, round_into_
from hf_galore.rounding import RoundingKey

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KEY = RoundingKey(1, 2, 3)

# Shapes of weights: small ones, odd ones, and ones with more rows than a block holds.
MATRICES = [(1, 1), (7, 1), (5, 8), (BLOCK_ELEMENTS // 500 + 3, 500), (2, BLOCK_ELEMENTS + 5)]
BATCHES = [(3, 5, 8), (2, 3, 4, 6), (2, BLOCK_ELEMENTS // 500 + 3, 500)]
OTHERS = [(), (1,), (13,), (BLOCK_ELEMENTS + 5,)]

# The same weight in other memory.
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "strided": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    "a slice": lambda t: torch.cat((t, t, t), dim=-1)[..., t.shape[-1] : 2 * t.shape[-1]] if t.dim() else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
}


def cases(*shapes):
    """Every shape as it is and transposed, and of the small ones of two to four dimensions every other layout."""
    able = {"transposed": lambda shape: len(shape) > 1, "channels last": lambda shape: len(shape) == 4}
    pairs = [(shape, layout) for shape in shapes for layout in LAYOUTS if able.get(layout, lambda _: True)(shape)]
    every = {(7, 9), (3, 4, 6), (2, 3, 4, 5), (13,), (5, 8), (2, 3, 4, 6)}
    pairs = [(shape, layout) for shape, layout in pairs if shape in every or layout in ("contiguous", "transposed")]
    return pytest.mark.parametrize(("shape", "layout"), pairs, ids=[f"{shape} {layout}" for shape, layout in pairs])


dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
kinds = pytest.mark.parametrize(
    ("dtype", "key"),
    [*((dtype, None) for dtype in FLOATS), (torch.bfloat16, KEY)],
    ids=[*map(str, FLOATS), "stochastic torch.bfloat16"],
)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
factors = st.floats(-2, 2, width=32, allow_subnormal=False)
numerics = settings(derandomize=True, deadline=None, max_examples=40)


def gamma(count, dtype):
    unit = torch.finfo(dtype).eps / 2
    return count * unit / (1 - count * unit)


def store(expected, error, dtype, key):
    """The error of `expected` ± `error` once it is stored in `dtype`: half a gap to nearest, a gap stochastically.

    A gap is at most eps of a number, and the smallest subnormal next to zero; torch.float32 work is exact to `error`.
    """
    info = torch.finfo(dtype)
    gaps = 1.0 if key is not None and dtype == torch.bfloat16 else 0.5
    return error + gaps * (info.eps * (expected.abs() + error) + info.tiny * info.eps)


def lowrank_error(weight, left, right, alpha, beta, expected, key):
    """Sum of k products, times alpha, plus beta·weight: k + 3 roundings; the reference itself has as many.

    bfloat16: both factors and their product are rounded to bfloat16 first, 3 u of |A||B|. Each operation may lose the
    smallest normal number of its precision to underflow.
    """
    dtype, count = weight.dtype, left.shape[-1] + 3
    work = torch.float64 if dtype == torch.float64 else torch.float32
    products = abs(alpha) * (left.double().abs() @ right.double().abs())
    error = 2 * gamma(count, work) * (products + abs(beta) * weight.double().abs())
    if dtype == torch.bfloat16:
        error = error + gamma(3, torch.bfloat16) * (1 + gamma(count, work)) * products
    error = error + count * torch.finfo(work).tiny
    return error if dtype == work else store(expected, error, dtype, key)


def check(weight, expected, bound):
    assert weight.isfinite().all()
    excess = (weight.double() - expected).abs() - bound
    assert excess.max() <= 0, f"{excess.max():.3g} above the bound"


@cases(*MATRICES, *BATCHES)
@kinds
def test_add_lowrank(shape, layout, dtype, key):
    weight = LAYOUTS[layout](torch.randn(shape).to(dtype))
    left, right = torch.randn(*shape[:-1], 3), torch.randn(*shape[:-2], 3, shape[-1])
    if dtype == torch.float64:
        left, right = left.double(), right.double()
    before, pointer, strides = weight.clone(), weight.data_ptr(), weight.stride()
    alpha, beta = -0.25, 0.75
    expected = beta * before.double() + alpha * (left.double() @ right.double())
    add_lowrank_(weight, left, right, alpha=alpha, beta=beta, key=key)
    assert (weight.dtype, weight.data_ptr(), weight.stride()) == (dtype, pointer, strides)
    check(weight, expected, lowrank_error(before, left, right, alpha, beta, expected, key))


@dtypes
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    rank=st.integers(1, 9),
    batch=st.lists(st.integers(1, 3), max_size=2),
    alpha=factors,
    beta=factors,
    flipped=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
@numerics
def test_add_lowrank_for_any_factors(dtype, rows, cols, rank, batch, alpha, beta, flipped, seed):
    """alpha and beta of either sign, zero and one included; A and B as they are, or as the transposes a basis is."""
    torch.manual_seed(seed)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(*batch, rows, cols).to(dtype)
    left, right = torch.randn(*batch, rows, rank, dtype=work), torch.randn(*batch, rank, cols, dtype=work)
    left, right = (t.mT.contiguous().mT if flip else t for t, flip in zip((left, right), flipped, strict=True))
    before = weight.clone()
    expected = beta * before.double() + alpha * (left.double() @ right.double())
    add_lowrank_(weight, left, right, alpha=alpha, beta=beta, key=KEY)
    check(weight, expected, lowrank_error(before, left, right, alpha, beta, expected, KEY))


def add_error(weight, delta, alpha, beta, expected, key):
    """beta·weight + alpha·delta: three roundings, and as many in the reference."""
    dtype = weight.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    error = 2 * gamma(3, work) * (abs(beta) * weight.double().abs() + abs(alpha) * delta.double().abs())
    error = error + 3 * torch.finfo(work).tiny
    return error if dtype == work else store(expected, error, dtype, key)


@cases(*OTHERS, *MATRICES, *BATCHES)
@kinds
def test_add(shape, layout, dtype, key):
    weight = LAYOUTS[layout](torch.randn(shape).to(dtype))
    delta = torch.randn(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    before, pointer, strides = weight.clone(), weight.data_ptr(), weight.stride()
    expected = 0.75 * before.double() - 0.125 * delta.double()
    add_(weight, delta, alpha=-0.125, beta=0.75, key=key)
    assert (weight.dtype, weight.data_ptr(), weight.stride()) == (dtype, pointer, strides)
    check(weight, expected, add_error(before, delta, -0.125, 0.75, expected, key))


@dtypes
@given(
    shape=st.lists(st.integers(1, 5), max_size=4),
    layout=st.sampled_from(list(LAYOUTS)),
    alpha=factors,
    beta=factors,
    seed=st.integers(0, 1000),
)
@numerics
def test_add_for_any_factors(dtype, shape, layout, alpha, beta, seed):
    """The delta in any layout too."""
    torch.manual_seed(seed)
    weight = torch.randn(shape).to(dtype)
    delta = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32))
    before = weight.clone()
    expected = beta * before.double() + alpha * delta.double()
    add_(weight, delta, alpha=alpha, beta=beta, key=KEY)
    check(weight, expected, add_error(before, delta, alpha, beta, expected, KEY))


@cases(*OTHERS, *MATRICES, *BATCHES)
@pytest.mark.parametrize(
    ("dtype", "key"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, KEY)],
    ids=["torch.float32", "torch.bfloat16", "stochastic torch.bfloat16"],
)
@pytest.mark.parametrize("source", [torch.float32, torch.float64], ids=lambda dtype: f"from {dtype}")
def test_round_into(shape, layout, dtype, source, key):
    """float64 is the working precision of float64 parameters, whose states may be kept in bfloat16 all the same."""
    target = LAYOUTS[layout](torch.zeros(shape, dtype=dtype))
    values = torch.randn(shape, dtype=source)
    pointer, kept = target.data_ptr(), values.clone()
    round_into_(target, values, key)
    assert (target.dtype, target.data_ptr()) == (dtype, pointer)
    assert torch.equal(values, kept)
    if key is None or dtype == torch.float32:
        assert torch.equal(target, values.to(dtype))
    else:  # float64 may pass through float32 on the way
        error = torch.finfo(torch.float32).eps / 2 * values.double().abs()
        check(target, values.double(), store(values.double(), error, dtype, key))


@layouts
def test_the_values_to_be_rounded_may_have_any_layout(layout):
    values = torch.randn(2, 3, 4, 5)
    target, expected = torch.zeros(2, 3, 4, 5).bfloat16(), torch.zeros(2, 3, 4, 5).bfloat16()
    round_into_(target, LAYOUTS[layout](values), KEY)
    round_into_(expected, values, KEY)
    assert torch.equal(target, expected)


# What the rounding bits go with.


@cases((7, 9), (3, 4, 6), (2, 3, 4, 5))
@pytest.mark.parametrize("operation", ["add_lowrank_", "add_", "round_into_"])
def test_memory_layout_changes_no_bit(layout, shape, operation):
    """bfloat16 with a key: bits belong to an element's place in the matrix, not to its place in memory."""
    weight, delta = torch.randn(shape).bfloat16(), torch.randn(shape)
    left, right = torch.randn(*shape[:-1], 2), torch.randn(*shape[:-2], 2, shape[-1])
    results = []
    for target in (weight.clone(), LAYOUTS[layout](weight.clone())):
        if operation == "add_lowrank_":
            add_lowrank_(target, left, right, alpha=0.01, beta=0.9, key=KEY)
        elif operation == "add_":
            add_(target, delta, alpha=0.01, beta=0.9, key=KEY)
        else:
            round_into_(target, delta, KEY)
        results.append(target)
    assert torch.equal(*results)


def test_blocks_leave_no_seam():
    """Several blocks of rows give what one whole computation gives: to nearest, one rounding of float32 per element.

    And with a key, no block repeats the bits of another: of 524 equal rows of equal values no two come out equal.
    """
    rows = 2 * (BLOCK_ELEMENTS // 500)
    weight, delta = torch.randn(rows, 500).bfloat16(), torch.randn(rows, 500)
    expected = (weight.float() * 0.9).add(delta, alpha=-0.1).bfloat16()
    add_(weight, delta, alpha=-0.1, beta=0.9, key=None)
    assert torch.equal(weight, expected)
    same = torch.ones(rows, 500).bfloat16()
    add_(same, torch.full((rows, 500), 2**-9 / 3), alpha=1.0, beta=1.0, key=KEY)
    assert len(torch.unique(same.float(), dim=0)) == rows


def test_matrices_of_a_batch_have_bits_of_their_own():
    """Row i of matrix e is row e·m + i of the parameter; the batch is rounded as that tall matrix is."""
    weight = torch.ones(4, 6, 50).bfloat16()
    left, right = torch.full((4, 6, 1), 0.001), torch.ones(4, 1, 50)
    tall = weight.view(24, 50).clone()
    add_lowrank_(weight, left, right, alpha=1.0, beta=1.0, key=KEY)
    add_lowrank_(tall, left.view(24, 1), right[0], alpha=1.0, beta=1.0, key=KEY)
    assert torch.equal(weight.view(24, 50), tall)
    assert len(torch.unique(weight.view(24, 50).float(), dim=0)) == 24


def test_a_key_is_for_bfloat16_alone():
    """Other dtypes are rounded to nearest, whatever the key."""
    for dtype in (torch.float64, torch.float32, torch.float16):
        weight = torch.randn(6, 5).to(dtype)
        delta = torch.randn(6, 5, dtype=torch.promote_types(dtype, torch.float32))
        results = []
        for key in (None, KEY):
            target = weight.clone()
            add_(target, delta, alpha=-0.1, beta=0.9, key=key)
            add_lowrank_(target, delta[:, :2], delta[:2], alpha=-0.1, beta=0.9, key=key)
            results.append(target)
        assert torch.equal(*results)


def test_a_float16_product_does_not_overflow():
    """300·300 is beyond float16, and 0.001·300·300 is not."""
    weight = torch.zeros(2, 2, dtype=torch.float16)
    add_lowrank_(weight, torch.full((2, 1), 300.0), torch.full((1, 2), 300.0), alpha=0.001, beta=1.0, key=None)
    assert torch.equal(weight, torch.full((2, 2), 90.0, dtype=torch.float16))


def test_beta_zero_is_not_special():
    """A weight that is not finite stays so: an update does not hide it."""
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.tensor([[float("inf"), float("nan"), 1.0]], dtype=dtype)
        add_(weight, torch.ones(1, 3), alpha=1.0, beta=0.5, key=KEY)
        assert weight.isfinite().tolist() == [[False, False, True]]
        add_lowrank_(weight, torch.ones(1, 1), torch.ones(1, 3), alpha=1.0, beta=0.5, key=KEY)
        assert weight.isfinite().tolist() == [[False, False, True]]


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("high", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 8, 3), (BLOCK_ELEMENTS // 500 + 3, 500, 2), (2, 5, 8, 3)], ids=str)
@pytest.mark.parametrize("order", ["low first", "high first"])
def test_matmul_of_two_precisions(shape, order, low, high):
    """The product of the numbers as they are, in the higher precision: no rounding of either operand."""
    *batch, m, k, n = shape
    torch.manual_seed(0)
    narrow, wide = torch.randn(*batch, m, k).to(low), torch.randn(*batch, k, n).to(high)
    operands = (narrow, wide) if order == "low first" else (wide.mT, narrow.mT)
    product = matmul(*operands)
    exact = operands[0].double() @ operands[1].double()
    bound = gamma(k, high) * (operands[0].double().abs() @ operands[1].double().abs())
    assert product.dtype == high
    assert ((product.double() - exact).abs() <= bound).all()


def test_products_are_in_bfloat16_only_where_the_device_has_it():
    """No half-precision emulation on a CPU, and never a product in float16."""
    cpu = torch.device("cpu")
    assert product_dtype(torch.float16, cpu) == torch.float32
    assert [product_dtype(dtype, cpu) for dtype in (torch.float32, torch.float64)] == [torch.float32, torch.float64]
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    assert product_dtype(torch.bfloat16, cpu) == (torch.bfloat16 if native else torch.float32)
    assert product_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
