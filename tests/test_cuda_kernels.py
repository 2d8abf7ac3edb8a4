"""The CUDA kernels without a GPU: their sources, compiled for the CPU by an emulation of what they use of CUDA.

It shows that indices, edges, barriers and arithmetic are right; what a GPU makes of them is for tests/gpu.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_galore.optim import blockwise
from hf_galore.rounding import RoundingKey, bits_of, mix64, random_words, round_stochastic

HERE = Path(__file__).resolve().parent
KEY = RoundingKey(3, 5, 7)
FIRST_ROW = 11
# Of the threads between barriers: the results differ where one is missing.
ORDERS = pytest.mark.parametrize("downwards", [False, True], ids=["upwards", "downwards"])
ROUNDINGS = {"float32": 0, "bfloat16": 1, "stochastic": 2}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    """The emulated kernels."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the emulation with")
    library = tmp_path_factory.mktemp("emulation") / "kernels.so"
    include = ["-isystem", HERE / "cuda_emulation", "-I", HERE.parent / "hf_galore" / "csrc"]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = [compiler, *flags, *include, HERE / "cuda_emulation" / "kernels.cpp", "-o", library]
    subprocess.run(list(map(str, command)), check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def keys(key: RoundingKey) -> list[ctypes.c_uint64]:
    return [ctypes.c_uint64(mix64(*key, which)) for which in (0, 1)]


def rounded(values: Tensor, rounding: str, key: RoundingKey = KEY) -> Tensor:
    """What the reference makes of float32 values."""
    if rounding == "float32":
        return values
    if rounding == "bfloat16":
        return values.bfloat16()
    rows = range(FIRST_ROW, FIRST_ROW + len(values))
    return round_stochastic(values, bits_of(*random_words(key, rows, values.shape[1], values.device)))


def matrix(rows: int, cols: int, dtype: torch.dtype, seed: int, pad: int = 0) -> Tensor:
    """Random rows of a wider matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols + pad, generator=generator).to(dtype)[:, :cols]


@pytest.mark.parametrize("replace", [False, True], ids=["add_", "round_into_"])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("rows", "cols", "pad"), [(1, 1, 0), (37, 520, 0), (19, 13, 5)])
def test_elementwise(kernels, rows, cols, pad, rounding, delta_dtype, replace):
    weight = matrix(rows, cols, torch.float32 if rounding == "float32" else torch.bfloat16, 0, pad)
    delta = matrix(rows, cols, delta_dtype, 1, pad)
    weight[0, 0], delta[-1, -1] = torch.inf, torch.nan
    beta, alpha = torch.tensor(0.9), torch.tensor(-0.3)
    expected = rounded(delta.float() if replace else beta * weight.float() + alpha * delta.float(), rounding)
    kernels.emulate_add(
        ROUNDINGS[rounding],
        replace,
        pointer(weight),
        long(weight.stride(0)),
        pointer(delta),
        delta_dtype == torch.bfloat16,
        long(delta.stride(0)),
        long(rows),
        long(cols),
        ctypes.c_float(alpha),
        ctypes.c_float(beta),
        *keys(KEY),
        long(FIRST_ROW),
    )
    torch.testing.assert_close(weight, expected, rtol=0.0, atol=0.0, equal_nan=True)


@ORDERS
@pytest.mark.parametrize("rounding", ["bfloat16", "stochastic"])
@pytest.mark.parametrize("left_by_rows", [True, False])
@pytest.mark.parametrize("right_by_rows", [True, False])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (130, 37, 70), (96, 136, 32), (5, 300, 33)])
def test_add_lowrank(kernels, m, n, k, left_by_rows, right_by_rows, rounding, downwards):
    """Small whole numbers have exact sums, so that every bit of the result is known."""
    generator = torch.Generator().manual_seed(m + n + k)

    def integers(rows: int, cols: int) -> Tensor:
        return torch.randint(-3, 4, (rows, cols), generator=generator).bfloat16()

    left, right = integers(m, k), integers(k, n)
    weight = matrix(m, n, torch.bfloat16, 0, pad=8)
    beta, alpha = torch.tensor(0.75), torch.tensor(-0.0078125)
    expected = rounded(beta * weight.float() + alpha * (left.float() @ right.float()), rounding)
    left = left if left_by_rows else left.T.contiguous()
    right = right if right_by_rows else right.T.contiguous()
    beyond = weight.as_strided((m, 8), weight.stride(), n).clone()
    kernels.emulate_add_lowrank(
        downwards,
        ROUNDINGS[rounding],
        pointer(weight),
        long(weight.stride(0)),
        pointer(left),
        long(left.stride(0)),
        left_by_rows,
        pointer(right),
        long(right.stride(0)),
        right_by_rows,
        *map(long, (m, n, k)),
        ctypes.c_float(alpha),
        ctypes.c_float(beta),
        *keys(KEY),
        long(FIRST_ROW),
    )
    assert torch.equal(weight, expected)
    assert torch.equal(weight.as_strided((m, 8), weight.stride(), n), beyond)  # nothing is written beside it


def literal_adamw(grad: Tensor, first: Tensor, second: Tensor, rule: list[float]) -> tuple[Tensor, ...]:
    """(first, second, delta) in float64, and how far float32 may be from first and delta.

    Every operation is wrong by 2^-24 of its result; there are six on the way to delta, and none of the two terms of
    `first`, which may cancel, is larger than their sum of magnitudes.
    """
    beta1, beta2, _, _, eps, size = rule
    grad, first, second = grad.double(), first.double(), second.double()
    uncertain = 6 * 2.0**-24 * (2 * first.abs() + grad.abs())
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad**2
    step = size / (second.sqrt() + eps)
    return first, second, -step * first, uncertain, step * uncertain


RULE = [0.9, 0.999, 1 - 0.9, 1 - 0.999, 1e-6, 1e-2]
C_RULE = (ctypes.c_float * 6)(*RULE)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (20, 515), (33, 16)])
def test_adamw(kernels, rows, cols, rounding, grad_dtype):
    dtype = torch.float32 if rounding == "float32" else torch.bfloat16
    grad, first = matrix(rows, cols, grad_dtype, 0), matrix(rows, cols, dtype, 1)
    second, delta = matrix(rows, cols, dtype, 2).square(), torch.empty(rows, cols)
    *moments, change, uncertain, of_change = literal_adamw(grad, first, second, RULE)
    of_both = [KEY._replace(parameter=mix64(KEY.parameter, index)) for index in (1, 2)]
    words = (ctypes.c_uint64 * 4)(*(word.value for key in of_both for word in keys(key)))
    kernels.emulate_adamw(
        ROUNDINGS[rounding],
        pointer(grad),
        grad_dtype == torch.bfloat16,
        pointer(first),
        pointer(second),
        pointer(delta),
        long(rows),
        long(cols),
        C_RULE,
        words,
        long(FIRST_ROW),
    )
    assert ((delta - change).abs() <= of_change).all()
    bounds = (uncertain, 4 * 2.0**-24 * moments[1])
    for found, exact, bound, key in zip((first, second), moments, bounds, of_both, strict=True):
        if rounding == "float32":
            assert ((found - exact).abs() <= bound).all()
        else:  # a float32 next to an edge may go to its other side
            expected = rounded(exact.float(), rounding, key)
            assert (found != expected).float().mean() <= 0.01
            assert ((found.double() - expected).abs() <= bound + 2.0**-7 * exact.abs()).all()


@ORDERS
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lines", "length"), [(1, 1), (1, 1000), (5, 256), (7, 300)])
def test_adamw_of_8_bits(kernels, lines, length, grad_dtype, downwards):
    """Codes and scales of the reference, for moments that it has quantized; three blocks of threads take turns."""
    signs, device = (True, False), torch.device("cpu")
    values = [matrix(lines, length, torch.float32, 1), matrix(lines, length, torch.float32, 2).square()]
    kept = [[blockwise.quantize(line, signed) for line in value] for value, signed in zip(values, signs, strict=True)]
    codes = [torch.stack([code for code, _ in one]) for one in kept]
    scales = [torch.cat([scale for _, scale in one]) for one in kept]
    first, second = (
        torch.stack([blockwise.dequantize(*line, signed) for line in one])
        for one, signed in zip(kept, signs, strict=True)
    )
    grad, delta = matrix(lines, length, grad_dtype, 0), torch.empty(lines, length)
    *moments, change, _, of_change = literal_adamw(grad, first, second, RULE)
    books = [blockwise.code_book(signed, device) for signed in signs]
    tables = [(book, (book[:-1] + book[1:]) / 2) for book in books]
    arguments = [pointer(one) for parts in zip(codes, scales, tables, strict=True) for one in (*parts[:2], *parts[2])]
    kernels.emulate_adamw_blocks(
        downwards,
        pointer(grad),
        grad_dtype == torch.bfloat16,
        *arguments,
        pointer(delta),
        long(lines),
        long(length),
        C_RULE,
        ctypes.c_uint(3),
    )
    assert ((delta - change).abs() <= of_change).all()
    for found, scale, exact, signed in zip(codes, scales, moments, signs, strict=True):
        expected = [blockwise.quantize(line.float(), signed) for line in exact]
        torch.testing.assert_close(scale, torch.cat([one for _, one in expected]), rtol=1e-6, atol=0.0)
        difference = found.int() - torch.stack([one for one, _ in expected]).int()
        assert difference.abs().max() <= 1  # of a value at a boundary
        assert (difference != 0).float().mean() <= 0.01


def test_nan_and_zero_in_8_bits(kernels):
    """A NaN makes its block's scale NaN, as in the reference; zeros stay zeros."""
    lines, length = 2, 256
    books = [blockwise.code_book(signed, torch.device("cpu")) for signed in (True, False)]
    tables = [(book, (book[:-1] + book[1:]) / 2) for book in books]
    zeros = [blockwise.quantize(torch.zeros(lines, length), signed) for signed in (True, False)]
    grad, delta = torch.zeros(lines, length), torch.empty(lines, length)
    grad[0, 3] = torch.nan
    arguments = [pointer(one) for kept, table in zip(zeros, tables, strict=True) for one in (*kept, *table)]
    kernels.emulate_adamw_blocks(
        False, pointer(grad), False, *arguments, pointer(delta), long(lines), long(length), C_RULE, ctypes.c_uint(1)
    )
    for codes, scales in zeros:
        assert scales[0].isnan()
        assert scales[1] == 0.0
        assert (codes[1] == codes[1, 0]).all()
    assert delta[0].isnan().nonzero().flatten().tolist() == [3]
    assert (delta[1] == 0.0).all()
