"""Products with low-rank factors, and the write-back of an update into a weight in the weight's own dtype.

W ← beta·W + alpha·A B, or W ← beta·W + alpha·delta. float32 and float64 weights take one GEMM with no m x n temporary.
Lower precisions are computed in float32, a block of rows at a time, and rounded once: stochastically to bfloat16 if a
`RoundingKey` is given, else to nearest.

Matrices of float32 and bfloat16 go through the ops hf_galore::add_lowrank_, add_, round_into_ and matmul
(`hf_galore.native`), whose references are here; other dtypes and layouts take the references.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_galore import native
from hf_galore.rounding import RoundingKey, bits_of, key_numbers, key_of, key_parts, random_words, round_stochastic

BLOCK_ELEMENTS = 1 << 18  # a few float32 temporaries of this size stay in a CPU's second-level cache
NATIVE_DTYPES = (torch.float32, torch.bfloat16)  # of what the native ops take
_PRODUCT_ELEMENTS = 1 << 20  # what is widened for a product at a time: larger pieces multiply faster


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


_CPU_MULTIPLIES_BFLOAT16 = _cpu_multiplies_bfloat16()  # asked once: torch.compile cannot trace the question


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision in which a matrix of this dtype is multiplied by a low-rank factor.

    bfloat16 where the device multiplies it natively; elsewhere, and for float16 (whose range is too small), float32.
    """
    if dtype == torch.bfloat16 and (device.type != "cpu" or _CPU_MULTIPLIES_BFLOAT16):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (..., m, k) @ b (..., k, n), in the higher of the two precisions if they differ.

    The operand in the lower precision is then widened a block of rows at a time: no copy of it is ever whole.
    """
    if a.dtype == b.dtype:
        return a @ b
    if torch.compiler.is_compiling():  # the compiler fuses the conversion into what comes before
        dtype = torch.promote_types(a.dtype, b.dtype)
        return a.to(dtype) @ b.to(dtype)
    if a.dim() > 2:
        return torch.stack([matmul(x, y) for x, y in zip(a, b, strict=True)])
    covered = a.dtype in NATIVE_DTYPES and b.dtype in NATIVE_DTYPES
    product: Tensor = (_matmul if covered else _matmul_reference)(a, b)
    return product


def _matmul_reference(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.itemsize < b.dtype.itemsize:
        step = max(1, _PRODUCT_ELEMENTS // max(1, a.shape[1]))
        return torch.cat([block.to(b.dtype) @ b for block in a.split(step)])
    result = a.new_zeros(a.shape[0], b.shape[1])
    step = max(1, _PRODUCT_ELEMENTS // max(1, b.shape[1]))
    for columns, block in zip(a.split(step, dim=1), b.split(step), strict=True):
        result.addmm_(columns, block.to(a.dtype))
    return result


_matmul = native.define(
    "matmul(Tensor a, Tensor b) -> Tensor",
    _matmul_reference,
    lambda a, b: a.new_empty((a.shape[0], b.shape[1]), dtype=torch.promote_types(a.dtype, b.dtype)),
)


def add_lowrank_(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    alpha: float,
    beta: float,
    key: RoundingKey | None,
    first_row: int = 0,
) -> None:
    """weight (..., m, n) ← beta·weight + alpha·left (..., m, k) @ right (..., k, n), in place.

    `first_row` is the number of the weight's first row within its parameter.
    """
    if weight.numel() == 0:
        return
    if weight.dtype == torch.float64 or (weight.dtype == torch.float32 and weight.stride(-1) != 1):
        left, right = left.to(weight.dtype), right.to(weight.dtype)
        if weight.dim() == 2:
            weight.addmm_(left, right, beta=beta, alpha=alpha)
        else:
            with _viewed(weight, -1, *weight.shape[-2:]) as batch:
                lefts, rights = (factor.reshape(-1, *factor.shape[-2:]) for factor in (left, right))
                batch.baddbmm_(lefts, rights, beta=beta, alpha=alpha)
        return
    product = product_dtype(weight.dtype, weight.device)
    left, right = left.to(product), right.to(product)
    numbers, (common, parameters) = key_numbers(key), key_parts(key)

    def add(weight: Tensor, left: Tensor, right: Tensor, first_row: int) -> None:
        if product == torch.bfloat16:
            _add_bfloat16_lowrank_([weight], [left], [right], alpha, beta, common, parameters, [first_row])
        else:
            one = _add_lowrank_ if weight.dtype in NATIVE_DTYPES else _add_lowrank_reference
            one(weight, left, right, alpha, beta, numbers, first_row)

    if weight.dim() == 2 and weight.stride(1) == 1:
        add(weight, left, right, first_row)
        return
    lefts, rights = (factor.reshape(-1, *factor.shape[-2:]) for factor in (left, right))
    with _viewed(weight, -1, *weight.shape[-2:]) as batch:
        for index, (one, a, b) in enumerate(zip(batch, lefts, rights, strict=True)):
            add(one, a, b, first_row + index * one.shape[0])


def add_lowrank_each_(
    weights: Sequence[Tensor],
    factors: Sequence[tuple[Tensor, Tensor]],
    *,
    alpha: float,
    beta: float,
    key: Sequence[int] | None,
    parameters: Sequence[int],
    first_rows: Sequence[int],
) -> None:
    """`add_lowrank_` of each matrix (m, n), of one dtype and with contiguous rows, with its factors (left, right).

    In one call where the device multiplies bfloat16. `key` is the seed and the step, as an op takes them.
    """
    if product_dtype(weights[0].dtype, weights[0].device) == torch.bfloat16:
        lefts, rights = ([factor.bfloat16() for factor in side] for side in zip(*factors, strict=True))
        _add_bfloat16_lowrank_(weights, lefts, rights, alpha, beta, key, parameters, first_rows)
        return
    for weight, (left, right), parameter, row in zip(weights, factors, parameters, first_rows, strict=True):
        add_lowrank_(weight, left, right, alpha=alpha, beta=beta, key=key_of(key, parameter), first_row=row)


def _add_lowrank_reference(
    weight: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float, key: Sequence[int] | None, first_row: int
) -> None:
    if weight.dtype == torch.float32:
        weight.addmm_(left, right, beta=beta, alpha=alpha)
        return

    def new_rows(rows: slice) -> Tensor:
        return weight[rows].float().addmm_(left[rows], right, beta=beta, alpha=alpha)

    _round_rows_(weight, new_rows, key, first_row)


_add_lowrank_ = native.define(
    "add_lowrank_(Tensor(a!) weight, Tensor left, Tensor right, float alpha, float beta, int[]? key, int first_row)"
    " -> ()",
    _add_lowrank_reference,
    lambda *_: None,
)


def _add_bfloat16_lowrank_reference(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    alpha: float,
    beta: float,
    key: Sequence[int] | None,
    parameters: Sequence[int],
    first_rows: Sequence[int],
) -> None:
    """Of each matrix the product of some rows at a time, in bfloat16, and the write-back of these."""
    for weight, left, right, parameter, row in zip(weights, lefts, rights, parameters, first_rows, strict=True):
        step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
        numbers = key_numbers(key_of(key, parameter))
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            _add_(weight[rows], left[rows] @ right, alpha, beta, numbers, row + start)


# Where the device multiplies bfloat16.
_add_bfloat16_lowrank_ = native.define(
    "add_bfloat16_lowrank_(Tensor(a!)[] weights, Tensor[] lefts, Tensor[] rights, float alpha, float beta, int[]? key,"
    " int[] parameters, int[] first_rows) -> ()",
    _add_bfloat16_lowrank_reference,
    lambda *_: None,
)


def add_(
    weight: Tensor, delta: Tensor, *, alpha: float, beta: float, key: RoundingKey | None, first_row: int = 0
) -> None:
    """weight ← beta·weight + alpha·delta, element by element, in place; any shape.

    `first_row` is the number of the weight's first row within its parameter.
    """
    if weight.dtype in (torch.float32, torch.float64):
        scale_(weight, beta).add_(delta, alpha=alpha)
        return
    if weight.numel() == 0:
        return
    add = _add_ if weight.dtype in NATIVE_DTYPES and delta.dtype in NATIVE_DTYPES else _add_reference
    with _viewed(weight, -1, width_of(weight)) as matrix:
        deltas = delta.reshape(matrix.shape).contiguous()
        add(matrix, deltas, alpha, beta, key_numbers(key), first_row)


def _add_reference(
    weight: Tensor, delta: Tensor, alpha: float, beta: float, key: Sequence[int] | None, first_row: int
) -> None:
    def new_rows(rows: slice) -> Tensor:
        return scale_(weight[rows].float(), beta).add_(delta[rows], alpha=alpha)

    _round_rows_(weight, new_rows, key, first_row)


_add_ = native.define(
    "add_(Tensor(a!) weight, Tensor delta, float alpha, float beta, int[]? key, int first_row) -> ()",
    _add_reference,
    lambda *_: None,
)


def round_into_(target: Tensor, values: Tensor, key: RoundingKey | None, first_row: int = 0) -> None:
    """target ← values in the target's dtype, in place, rounded as a weight is; `first_row` as in `add_`."""
    if target.numel() == 0:
        return
    covered = target.dtype == torch.bfloat16 and values.dtype in NATIVE_DTYPES
    round_into = _round_into_ if covered else _round_into_reference
    with _viewed(target, -1, width_of(target)) as matrix:
        source = values.reshape(matrix.shape).contiguous()
        round_into(matrix, source, key_numbers(key), first_row)


def _round_into_reference(target: Tensor, values: Tensor, key: Sequence[int] | None, first_row: int) -> None:
    _round_rows_(target, lambda rows: values[rows].float(), key, first_row)


_round_into_ = native.define(
    "round_into_(Tensor(a!) target, Tensor values, int[]? key, int first_row) -> ()",
    _round_into_reference,
    lambda *_: None,
)


def scale_(tensor: Tensor, factor: float) -> Tensor:
    """tensor ← factor·tensor, in place; a factor of 1 costs nothing."""
    return tensor if factor == 1.0 else tensor.mul_(factor)


def width_of(tensor: Tensor) -> int:
    """The length of a row: the last dimension; a vector is a column, so that its parts have rows of their own."""
    return tensor.shape[-1] if tensor.dim() > 1 else 1


@contextmanager
def _viewed(tensor: Tensor, *shape: int) -> Iterator[Tensor]:
    """The tensor in another shape, whatever its strides; what is written there ends up in the tensor."""
    dense = tensor.contiguous()
    yield dense.view(shape)
    if dense is not tensor:
        tensor.copy_(dense)


def _round_rows_(
    target: Tensor, new_rows: Callable[[slice], Tensor], key: Sequence[int] | None, first_row: int
) -> None:
    """target[rows] ← new_rows(rows) (float32) rounded to the target's dtype, one block of rows after another.

    `first_row` is the number of the target's first row within its parameter.
    """
    height, width = target.shape
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    words = None
    if key is not None and target.dtype == torch.bfloat16:
        words = random_words(RoundingKey(*key), range(first_row, first_row + height), width, target.device)
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        block = new_rows(rows)
        target[rows] = block if words is None else round_stochastic(block, bits_of(words[0][rows], words[1]))
