"""8-bit moments: code book and rounding against bitsandbytes, and the optimizer that keeps its moments in them."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.optim.blockwise import BLOCK, code_book, dequantize, quantize

CPU = torch.device("cpu")
UNIT = 2.0**-24  # unit roundoff of float32
SMALLEST = 2.0**-149  # its smallest subnormal
SHAPES = [(1,), (255,), (256,), (257,), (3, 100), (1024,), (33, 77), (2, 5, 61)]

signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
numerics = settings(derandomize=True, deadline=None, max_examples=60)


def reach(signed):
    """For each code, how far from it a number of its cell can lie, on a scale where a block's largest magnitude is 1.

    The cell of a code ends half-way to its neighbours. −1 has no code in the signed book (+1 has), so the lowest cell
    reaches down to it; the first positive unsigned cell reaches down to zero.
    """
    codes = code_book(signed, CPU).double()
    half = (codes[1:] - codes[:-1]) / 2
    below = torch.cat((codes[:1] + 1 if signed else codes[:1], half))
    above = torch.cat((half, torch.zeros(1, dtype=torch.float64)))
    if not signed:
        below[1] = codes[1]
    return torch.maximum(below, above)


def per_element(absmax, shape):
    return absmax.repeat_interleave(BLOCK)[: torch.Size(shape).numel()].view(shape)


def error_bound(codes, absmax, signed):
    """|dequantize(quantize(x)) − x| <= absmax·reach(code), and three roundings of float32 on top.

    Those are the division by absmax, the product with it, and the border between two cells; each moves a number by a
    unit roundoff of something no larger than absmax, or, next to zero, by the smallest subnormal.
    """
    largest = per_element(absmax, codes.shape).double()
    return largest * (reach(signed)[codes.int()] + 3 * UNIT) + SMALLEST


@st.composite
def blocks(draw, signed):
    """One to three blocks of numbers of very different sizes."""
    size = draw(st.integers(1, 3 * BLOCK))
    scale = 10.0 ** draw(st.integers(-25, 25))
    spread = draw(st.sampled_from([0.0, 1.0, 6.0]))  # standard deviation in decades
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = scale * torch.randn(size, generator=generator) * 10 ** (spread * torch.randn(size, generator=generator))
    values[torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0.0
    extra = draw(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=min(4, size)))
    values[: len(extra)] = torch.tensor(extra, dtype=torch.float32)
    values = values.clamp(-(2.0**100), 2.0**100)
    return values if signed else values.abs()


# Against bitsandbytes.


@signs
def test_code_book_is_that_of_bitsandbytes(signed):
    """All 256 codes, bit for bit, for its default of 7 exponent bits out of 8."""
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed, max_exponent_bits=7, total_bits=8)
    assert torch.equal(theirs, functional.create_dynamic_map(signed))
    ours = code_book(signed, CPU)
    assert ours.dtype == torch.float32
    assert (ours[1:] > ours[:-1]).all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@signs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_no_less_exact_than_bitsandbytes(signed, shape, spread):
    """Element by element. Bound: half-way between two codes either may be chosen, and rounding decides (3 UNIT)."""
    functional = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(shape) * 10 ** (spread * torch.randn(shape))
    values = values if signed else values.square()
    codes, state = functional.quantize_blockwise(values, code=functional.create_dynamic_map(signed), blocksize=BLOCK)
    theirs = (functional.dequantize_blockwise(codes, state).double() - values).abs()
    mine, absmax = quantize(values, signed)
    torch.testing.assert_close(absmax, state.absmax, rtol=0, atol=0)
    ours = (dequantize(mine, absmax, signed).double() - values).abs()
    largest = per_element(absmax, shape).double()
    worse = ours > theirs + 3 * UNIT * largest
    if not signed:  # where they round a positive number to zero, we do not: the deviation that the module documents
        avoided = (values > 0) & (codes == 0)
        assert (ours <= largest * code_book(signed, CPU)[1] * (1 + 3 * UNIT))[avoided].all()
        worse &= ~avoided
    assert not worse.any()


# Properties.


@signs
@given(data=st.data())
@numerics
def test_error_bound(signed, data):
    values = data.draw(blocks(signed))
    codes, absmax = quantize(values, signed)
    assert (codes.dtype, absmax.dtype, codes.shape) == (torch.uint8, torch.float32, values.shape)
    assert absmax.shape == (-(-values.numel() // BLOCK),)
    assume((absmax[absmax > 0] >= torch.finfo(torch.float32).tiny).all())  # of blocks below it only the size is kept
    errors = (dequantize(codes, absmax, signed).double() - values.double()).abs()
    assert (errors <= error_bound(codes, absmax, signed)).all()


@signs
@given(data=st.data())
@numerics
def test_signs_zeros_and_the_largest_are_kept(signed, data):
    values = data.draw(blocks(signed))
    codes, absmax = quantize(values, signed)
    out = dequantize(codes, absmax, signed)
    largest = per_element(absmax, values.shape)
    assert (out[values == 0] == 0).all()
    assert (out * values.sign() >= 0).all()
    assert (out.abs() <= largest).all()
    top = (values == largest) & (values >= torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(out[top], values[top], rtol=0, atol=0)


@signs
@given(data=st.data())
@numerics
def test_requantizing_is_idempotent(signed, data):
    """Codes survive a round trip wherever a block's largest magnitude does: always, unless it is a negative number.

    (The signed book has +1 and no −1, here as in bitsandbytes.) A code is then moved by two roundings, 2 UNIT of
    itself, and codes lie 0.7 % apart or more.
    """
    values = data.draw(blocks(signed))
    if signed:  # make a positive number the largest of every block
        values = torch.cat(
            [torch.cat((block.abs().amax(0, keepdim=True), block)) for block in values.split(BLOCK - 1)]
        )
    codes, absmax = quantize(values, signed)
    assume((absmax[absmax > 0] >= 1e-25).all())  # the smallest code, 5.5e-7, times that is a normal number
    again, largest = quantize(dequantize(codes, absmax, signed), signed)
    assert torch.equal(largest, absmax)
    assert torch.equal(again, codes)


@given(
    small=st.floats(2.0**-149, 2.0**100, width=32),
    large=st.floats(2.0**-149, 2.0**100, width=32),
)
@numerics
def test_a_positive_second_moment_never_becomes_zero(small, large):
    codes, absmax = quantize(torch.tensor([small, large, 0.0]), signed=False)
    assert (codes[:2] > 0).all()
    assert codes[2] == 0
    if max(small, large) > 1e-30:
        assert (dequantize(codes, absmax, signed=False)[:2] > 0).all()


@signs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zero_blocks_stay_zero(signed, shape):
    values = torch.zeros(shape)
    codes, absmax = quantize(values, signed)
    assert not absmax.any()
    torch.testing.assert_close(dequantize(codes, absmax, signed), values, rtol=0, atol=0)


@signs
def test_a_zero_block_does_not_touch_its_neighbours(signed):
    values = torch.rand(3, BLOCK)
    values[1] = 0
    alone = torch.cat([dequantize(*quantize(block, signed), signed) for block in values])
    torch.testing.assert_close(dequantize(*quantize(values, signed), signed).view(-1), alone, rtol=0, atol=0)


@signs
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_number_spoils_its_block_visibly_and_no_other(signed, bad):
    values = torch.rand(2, BLOCK)
    values[0, 3] = bad
    out = dequantize(*quantize(values, signed), signed)
    assert not out[0, 3].isfinite()
    torch.testing.assert_close(out[1], dequantize(*quantize(values[1], signed), signed), rtol=0, atol=0)


@signs
def test_layout_does_not_matter(signed):
    values = torch.rand(30, 50)
    codes, absmax = quantize(values.T, signed)
    expected, largest = quantize(values.T.contiguous(), signed)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, largest)
    assert codes.untyped_storage().nbytes() == codes.numel()  # no padding is kept, nor saved with the state


# The optimizer.


def run(cls, shape, gradients, group=(), **options):
    """The weights before every step and after the last, and the optimizer, over a fixed sequence of gradients."""
    param = Parameter(torch.ones(shape))
    optimizer = cls([{"params": [param], **dict(group)}], lr=0.01, **options)
    weights = [param.detach().clone()]
    for grad in gradients:
        param.grad = grad.clone()
        optimizer.step()
        weights.append(param.detach().clone())
    return weights, optimizer


@pytest.mark.parametrize(
    ("shape", "group"),
    [((63, 65), {}), ((200, 150), {"rank": 4}), ((150, 200), {"rank": 4, "proj_type": "full"}), ((5,), {})],
    ids=["4095", "low-rank 800", "low-rank 16", "vector"],
)
def test_moments_below_4096_elements_are_those_of_adamw(shape, group):
    """Bit for bit, low-rank moments counted at their own size (a matrix of 30000 elements here)."""
    gradients = torch.randn(4, *shape)
    ours, optimizer = run(GaLoreAdamW8bit, shape, gradients, group)
    expected, plain = run(GaLoreAdamW, shape, gradients, group)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    state, reference = (dict(next(iter(one.state.values()))) for one in (optimizer, plain))
    assert state.keys() == reference.keys()
    for name in state:
        torch.testing.assert_close(state[name], reference[name], rtol=0, atol=0)


@pytest.mark.parametrize(("size", "dtype"), [(4095, torch.float32), (4096, torch.uint8)])
def test_the_threshold(size, dtype):
    _, optimizer = run(GaLoreAdamW8bit, (size,), torch.randn(1, size))
    state = next(iter(optimizer.state.values()))
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
    if dtype == torch.uint8:
        kept = sum(value.untyped_storage().nbytes() for name, value in state.items() if name != "step")
        assert kept == 2 * (size + 4 * size // BLOCK)


@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_large_moments_track_float32(beta2):
    """Every weight within a bound that is summed up from the cells of the codes seen on the way.

    The moments here are M, V and those of float32 m, v. A code of a moment is off by at most e_M, e_V (`error_bound`),
    and the gradients are the same, so |M − m| <= A with A ← β1·(A + e_M), and |V − v| <= B with B ← β2·(B + e_V).
    With d = √v + eps and D = √V + eps the update then differs by at most

        |M/D − m/d| <= A/D + |m|·|√V − √v|/(d·D),   |√V − √v| <= B/(√V + √v),   V >= max(v − B, (1−β2)·G²)

    The last is what keeps D from zero. float32 itself adds at most some 20 roundings of |update| and |weight|.
    """
    steps, beta1, eps, lr = 8, 0.9, 1e-6, 0.01
    torch.manual_seed(1)
    gradients = torch.randn(steps, 64, 80) * 10 ** (0.2 * torch.randn(64, 80))  # not all of one size
    param, plain = Parameter(torch.ones(64, 80)), Parameter(torch.ones(64, 80))
    ours = GaLoreAdamW8bit([param], lr=lr, betas=(beta1, beta2), eps=eps)
    reference = GaLoreAdamW([plain], lr=lr, betas=(beta1, beta2), eps=eps)
    first, second, bound, travelled = (torch.zeros(64, 80, dtype=torch.float64) for _ in range(4))
    for number, grad in enumerate(gradients, start=1):
        param.grad, plain.grad = grad.clone(), grad.clone()
        ours.step()
        reference.step()
        m, v = (reference.state[plain][name].double() for name in ("exp_avg", "exp_avg_sq"))
        least = torch.maximum(v - second, (1 - beta2) * grad.double().square())
        lowest = least.sqrt() + eps
        root_error = second / (least.sqrt() + v.sqrt())
        update_error = first / lowest + m.abs() * root_error / ((v.sqrt() + eps) * lowest)
        step_size = lr * (1 - beta2**number) ** 0.5 / (1 - beta1**number)
        bound += step_size * update_error
        travelled += step_size * (m.abs() / (v.sqrt() + eps) + update_error) + 1
        assert ((param.double() - plain.double()).abs() <= bound + 20 * UNIT * travelled).all()
        state = ours.state[param]
        first = beta1 * (first + error_bound(state["exp_avg"], state["exp_avg_absmax"], True))
        second = beta2 * (second + error_bound(state["exp_avg_sq"], state["exp_avg_sq_absmax"], False))
    assert (param != plain).any()  # the 8 bits were there
    assert bound.median() < 0.2 * steps * lr  # and the bound is of use: a fifth of the way travelled


@pytest.mark.parametrize("group", [{}, {"rank": 32, "update_proj_gap": 10, "scale": 1.0}], ids=["full", "low rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_moments_train(group, dtype):
    """A regression of 128 x 160: its loss falls as it does with float32 moments, to within a tenth of the fall."""

    def losses(cls):
        generator = torch.Generator().manual_seed(0)
        target, inputs = torch.randn(128, 160, generator=generator), torch.randn(160, 64, generator=generator)
        param = Parameter(torch.zeros(128, 160, dtype=dtype))
        optimizer = cls([{"params": [param], **group}], lr=0.05)
        values = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = ((param.float() - target) @ inputs).square().mean()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values, optimizer.state[param]

    ours, state = losses(GaLoreAdamW8bit)
    expected, _ = losses(GaLoreAdamW)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    fall = expected[0] - expected[-1]
    assert fall > 0.3 * expected[0]
    assert abs(ours[-1] - expected[-1]) < 0.1 * fall


def test_the_incumbent_does_not_move_small_matrices():
    """Why there is a class of our own: bitsandbytes 0.50 and galore-torch 1.0 give small matrices an update of zero.

    On a CPU galore-torch's step does not even start, as it synchronizes a CUDA device for every parameter.
    """
    galore_torch = pytest.importorskip("galore_torch")
    param = Parameter(torch.ones(16, 16))
    optimizer = galore_torch.GaLoreAdamW8bit([{"params": [param]}], lr=0.01, weight_decay=0.0)
    param.grad = torch.randn(16, 16)
    try:
        optimizer.step()
    except (AssertionError, RuntimeError):
        return
    assert (param == 1).all()
