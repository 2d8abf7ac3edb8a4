"""The CUDA kernels without a GPU: their sources, compiled for the CPU by an emulation of what they use of CUDA.

It shows that indices, edges, barriers and arithmetic are right; what a GPU makes of them is for tests/gpu.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

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


def structure(name: str, pointers: str, longs: str, keys: int) -> type[ctypes.Structure]:
    """A structure of cuda_emulation/kernels.cpp."""
    fields = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in longs.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [*fields, ("keys", ctypes.c_uint64 * keys)]})


OfProduct = structure(
    "ProductArguments", "weight left right", "rows cols inner stride left_stride right_stride first_row", 2
)
OfAdamW = structure("AdamWArguments", "weight grad first second", "rows cols first_row", 6)
OfBlocks = structure(
    "BlocksArguments",
    "weight grad first first_scales signed_book second second_scales unsigned_book",
    "lines length cols first_row",
    2,
)


def array(items: list[ctypes.Structure]) -> tuple[ctypes.Array, int]:
    return (type(items[0]) * len(items))(*items), len(items)


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


def c_float(value: float | Tensor) -> ctypes.c_float:
    return ctypes.c_float(float(value))


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
        c_float(alpha),
        c_float(beta),
        *keys(KEY),
        long(FIRST_ROW),
    )
    torch.testing.assert_close(weight, expected, rtol=0.0, atol=0.0, equal_nan=True)


class LowRank(NamedTuple):
    """W, as rows of a wider matrix, and its factors: small whole numbers have exact sums."""

    weight: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, m: int, n: int, k: int) -> "LowRank":
        generator = torch.Generator().manual_seed(m + n + k)
        left, right = (torch.randint(-3, 4, shape, generator=generator).bfloat16() for shape in ((m, k), (k, n)))
        return cls(matrix(m, n, torch.bfloat16, 0, pad=8), left, right)

    def expected(self, rounding: str) -> Tensor:
        return rounded(BETA * self.weight.float() + ALPHA * (self.left.float() @ self.right.float()), rounding)

    def arguments(self, left: Tensor, right: Tensor) -> ctypes.Structure:
        """With the factors as they lie in memory, in rows or in columns."""
        strides = self.weight.stride(0), left.stride(0), right.stride(0)
        m, n, k = *self.weight.shape, self.left.shape[1]
        pointers = map(Tensor.data_ptr, (self.weight, left, right))
        return OfProduct(*pointers, m, n, k, *strides, FIRST_ROW, WORDS_OF_KEY)


ALPHA, BETA = torch.tensor(-0.0078125), torch.tensor(0.75)
WORDS_OF_KEY = (ctypes.c_uint64 * 2)(*(word.value for word in keys(KEY)))


def add_lowrank(kernels: ctypes.CDLL, given: list[LowRank], rounding: str, by_rows: tuple[bool, bool], down: bool):
    factors = [
        [factor if rows else factor.T.contiguous() for factor, rows in zip(one[1:], by_rows, strict=True)]
        for one in given
    ]
    items = array([one.arguments(*pair) for one, pair in zip(given, factors, strict=True)])
    kernels.emulate_add_lowrank(down, ROUNDINGS[rounding], *by_rows, *items, c_float(ALPHA), c_float(BETA))


@ORDERS
@pytest.mark.parametrize("rounding", ["bfloat16", "stochastic"])
@pytest.mark.parametrize("left_by_rows", [True, False])
@pytest.mark.parametrize("right_by_rows", [True, False])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (130, 37, 70), (96, 136, 32), (5, 300, 33)])
def test_add_lowrank(kernels, m, n, k, left_by_rows, right_by_rows, rounding, downwards):
    given = LowRank.of(m, n, k)
    expected = given.expected(rounding)
    beyond = given.weight.as_strided((m, 8), given.weight.stride(), n).clone()
    add_lowrank(kernels, [given], rounding, (left_by_rows, right_by_rows), downwards)
    assert torch.equal(given.weight, expected)
    found = given.weight.as_strided((m, 8), given.weight.stride(), n)
    assert torch.equal(found, beyond)  # nothing is written beside it


def test_add_lowrank_to_several(kernels):
    given = [LowRank.of(5, 300, 33), LowRank.of(130, 37, 70), LowRank.of(1, 1, 1)]
    expected = [one.expected("stochastic") for one in given]
    add_lowrank(kernels, given, "stochastic", (True, False), False)
    assert all(torch.equal(one.weight, theirs) for one, theirs in zip(given, expected, strict=True))


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
DECAY = 0.875
OF_MOMENTS = [KEY._replace(parameter=mix64(KEY.parameter, index)) for index in (1, 2)]
WORDS = (ctypes.c_uint64 * 6)(*(word.value for key in (KEY, *OF_MOMENTS) for word in keys(key)))


def assert_rounded(found: Tensor, exact: Tensor, bound: Tensor, rounding: str, key: RoundingKey = KEY) -> None:
    """`found` is what `exact` (float64) rounds to, if that is known up to `bound`."""
    if rounding == "float32":
        assert ((found - exact).abs() <= bound).all()
        return
    expected = rounded(exact.float(), rounding, key)  # one next to an edge may go to its other side
    assert (found != expected).double().mean() <= 0.01
    assert ((found.double() - expected).abs() <= bound + 2.0**-7 * exact.abs()).all()


def assert_stepped(found: Tensor, weight: Tensor, change: Tensor, bound: Tensor, rounding: str) -> None:
    """`found` is decay·weight + change, which is known up to `bound`."""
    exact = DECAY * weight.double() + change
    assert_rounded(found, exact, bound + 2.0**-23 * (weight.double().abs() + change.abs()), rounding)


def dtype_of(rounding: str) -> torch.dtype:
    return torch.float32 if rounding == "float32" else torch.bfloat16


def adamw(kernels: ctypes.CDLL, matrices: list[list[Tensor]], of_moments: str, of_weight: str) -> None:
    """A step of matrices, each (weight, grad, first, second), in place."""
    items = [OfAdamW(*map(Tensor.data_ptr, one), *one[0].shape, FIRST_ROW, WORDS) for one in matrices]
    is_bfloat16 = matrices[0][1].dtype == torch.bfloat16
    roundings = ROUNDINGS[of_moments], ROUNDINGS[of_weight]
    kernels.emulate_adamw(*roundings, is_bfloat16, *array(items), c_float(DECAY), C_RULE)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("of_weight", "of_moments"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("stochastic", "stochastic"), ("stochastic", "float32")],
)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (20, 515), (33, 16)])
def test_adamw(kernels, rows, cols, of_weight, of_moments, grad_dtype):
    grad, first = matrix(rows, cols, grad_dtype, 0), matrix(rows, cols, dtype_of(of_moments), 1)
    second, weight = matrix(rows, cols, dtype_of(of_moments), 2).square(), matrix(rows, cols, dtype_of(of_weight), 3)
    *moments, change, uncertain, of_change = literal_adamw(grad, first, second, RULE)
    before = weight.clone()
    adamw(kernels, [[weight, grad, first, second]], of_moments, of_weight)
    assert_stepped(weight, before, change, of_change, of_weight)
    bounds = (uncertain, 4 * 2.0**-24 * moments[1])
    for found, exact, bound, key in zip((first, second), moments, bounds, OF_MOMENTS, strict=True):
        assert_rounded(found, exact, bound, of_moments, key)


def test_adamw_of_several(kernels):
    """Each comes out as it does alone."""
    shapes = [(33, 16), (1, 1), (20, 515)]
    together = [[matrix(*shape, torch.bfloat16, seed).abs() for seed in range(4)] for shape in shapes]
    alone = [[tensor.clone() for tensor in one] for one in together]
    adamw(kernels, together, "stochastic", "stochastic")
    for one in alone:
        adamw(kernels, [one], "stochastic", "stochastic")
    for found, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Codes(NamedTuple):
    """Both moments in 8 bits, lines in blocks of their own."""

    codes: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, *moments: Tensor) -> "Codes":
        kept = [
            [blockwise.quantize(line, signed) for line in moment]
            for moment, signed in zip(moments, (True, False), strict=True)
        ]
        codes = tuple(torch.stack([one for one, _ in lines]) for lines in kept)
        return cls(codes, tuple(torch.cat([one for _, one in lines]) for lines in kept))

    def values(self) -> list[Tensor]:
        """The moments."""
        lines, books = len(self.codes[0]), (True, False)
        return [
            torch.stack([blockwise.dequantize(*line, signed) for line in zip(codes, scales.chunk(lines), strict=True)])
            for codes, scales, signed in zip(self.codes, self.scales, books, strict=True)
        ]


class InBlocks(NamedTuple):
    """A weight and its gradient in lines, whose rows have `cols` values, and its moments."""

    weight: Tensor
    grad: Tensor
    kept: Codes
    cols: int

    def arguments(self) -> ctypes.Structure:
        books = [blockwise.code_book(signed, torch.device("cpu")) for signed in (True, False)]
        moments = [one.data_ptr() for parts in zip(*self.kept, books, strict=True) for one in parts]
        pointers = self.weight.data_ptr(), self.grad.data_ptr(), *moments
        return OfBlocks(*pointers, *self.grad.shape, self.cols, FIRST_ROW, WORDS_OF_KEY)


def step_of_8_bits(kernels: ctypes.CDLL, given: list[InBlocks], rounding: str, downwards: bool) -> None:
    """In place; three blocks of threads take turns."""
    items = array([one.arguments() for one in given])
    is_bfloat16 = given[0].grad.dtype == torch.bfloat16
    kernels.emulate_adamw_blocks(
        downwards, ROUNDINGS[rounding], is_bfloat16, *items, c_float(DECAY), C_RULE, ctypes.c_uint(3)
    )


@ORDERS
@pytest.mark.parametrize(("rounding", "grad_dtype"), [("float32", torch.float32), ("stochastic", torch.bfloat16)])
@pytest.mark.parametrize(("lines", "length", "cols"), [(1, 1, 1), (1, 1000, 25), (5, 256, 256), (7, 300, 300)])
def test_adamw_of_8_bits(kernels, lines, length, cols, rounding, grad_dtype, downwards):
    """Codes and scales of the reference, for moments that it has quantized."""
    kept = Codes.of(matrix(lines, length, torch.float32, 1), matrix(lines, length, torch.float32, 2).square())
    grad, weight = matrix(lines, length, grad_dtype, 0), matrix(lines, length, dtype_of(rounding), 3)
    before = weight.clone()
    *moments, change, _, of_change = literal_adamw(grad, *kept.values(), RULE)
    step_of_8_bits(kernels, [InBlocks(weight, grad, kept, cols)], rounding, downwards)
    rows = [one.reshape(-1, cols) for one in (weight, before, change, of_change)]
    assert_stepped(*rows, rounding)
    expected = Codes.of(*(one.float() for one in moments))
    for scales, theirs in zip(kept.scales, expected.scales, strict=True):
        torch.testing.assert_close(scales, theirs, rtol=1e-6, atol=0.0)
    for codes, theirs in zip(kept.codes, expected.codes, strict=True):
        difference = (codes.int() - theirs.int()).abs()
        assert difference.max() <= 1  # of a value at a boundary
        assert (difference > 0).double().mean() <= 0.01


def test_adamw_of_8_bits_of_several(kernels):
    """Each comes out as it does alone."""

    def made() -> list[InBlocks]:
        moments = [[matrix(*shape, torch.float32, seed).abs() for seed in (1, 2)] for shape in ((7, 300), (1, 9))]
        return [
            InBlocks(torch.ones_like(one[0]), matrix(*one[0].shape, torch.float32, 0), Codes.of(*one), one[0].shape[1])
            for one in moments
        ]

    together, alone = made(), made()
    step_of_8_bits(kernels, together, "float32", downwards=False)
    for one in alone:
        step_of_8_bits(kernels, [one], "float32", downwards=False)
    for found, expected in zip(together, alone, strict=True):
        assert torch.equal(found.weight, expected.weight)
        for ours, theirs in zip(found.kept, expected.kept, strict=True):  # codes, scales
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_nan_and_zero_in_8_bits(kernels):
    """A NaN makes its block's scale NaN, as in the reference; zeros stay zeros."""
    kept = Codes.of(torch.zeros(2, 256), torch.zeros(2, 256))
    grad, weight = torch.zeros(2, 256), torch.ones(2, 256)
    grad[0, 3] = torch.nan
    step_of_8_bits(kernels, [InBlocks(weight, grad, kept, 256)], "float32", downwards=False)
    for codes, scales in zip(*kept, strict=True):
        assert scales[0].isnan()
        assert scales[1] == 0.0
        assert (codes[1] == codes[1, 0]).all()
    assert weight[0].isnan().nonzero().flatten().tolist() == [3]
    assert (weight[1] == DECAY).all()
