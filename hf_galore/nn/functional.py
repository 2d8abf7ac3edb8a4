"""Ternary weights and 8-bit activations of BitNet b1.58 (arXiv 2402.17764), and their straight-through linear layer.

    weights      s = max(mean |W|, 1e-5)        t = clip(round(W / s), -1, 1)         Wq = t s     one s for a matrix
    activations  a = 127 / max(max |x|, 1e-5)   i = clip(round(x a), -128, 127)       xq = i / a   one a for a token

Rounding is that of transformers' online layer (`AutoBitLinear`), which works in float32: W is multiplied by 1 / s, not
divided by s, and a is float32 also where x is bfloat16. Gradients pass both roundings as if they were the identity.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from hf_galore.ops import BLOCK_ELEMENTS, product_dtype

SMALLEST = 1e-5  # of mean |W| and of max |x|
LARGEST_CODE = 127


class Ternary(NamedTuple):
    """A ternary matrix t·s."""

    codes: Tensor  # t (m, n) in {-1, 0, 1}, int8
    scale: Tensor  # s, one number, float32


class Int8(NamedTuple):
    """Vectors i / a in 8 bits."""

    codes: Tensor  # i (..., n), int8
    scale: Tensor  # a (..., 1), float32


def absmean_ternary(weight: Tensor) -> Ternary:
    """t and s of a weight (m, n), in float32 (float64 for float64); NaN and Inf make s so."""
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    scale = weight.abs().mean().clamp(min=SMALLEST)
    return Ternary(_rounded(weight, 1.0 / scale, -1, 1), scale)


def absmax_int8(x: Tensor) -> Int8:
    """i and a of each vector of x (..., n), in float32 (float64 for float64); NaN and Inf make their token's a so."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    scale = LARGEST_CODE / x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    return Int8(_rounded(x, scale, -LARGEST_CODE - 1, LARGEST_CODE), scale)


def _rounded(values: Tensor, factor: Tensor, low: int, high: int) -> Tensor:
    """clip(round(values · factor), low, high) as int8; on a CPU a block at a time, which stays in its cache."""
    if values.device.type != "cpu" or torch.compiler.is_compiling() or not values.numel():
        return (values * factor).round_().clamp_(low, high).to(torch.int8)
    rows = values.reshape(-1, values.shape[-1])
    factors = factor.reshape(-1, 1).expand(len(rows), 1)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    step = max(1, BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        codes[block] = (rows[block] * factors[block]).round_().clamp_(low, high)
    return codes.view(values.shape)


def dequantize(ternary: Ternary, dtype: torch.dtype) -> Tensor:
    """t·s (m, n)."""
    return (ternary.codes.to(ternary.scale.dtype) * ternary.scale).to(dtype)


class StraightThrough(torch.autograd.Function):
    """y = xq Wqᵀ + bias (..., m) for what x (..., n) and W (m, n) are rounded to; the gradients are those of x and W.

    Args:
        dtype: of y, and what is computed in where that is not integers.
        tokens, a: xq = tokens / a, integers and a (..., 1); or xq itself and None.
        matrix, s: Wq = matrix · s, integers and one number; or Wq itself and None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        tokens: Tensor,
        a: Tensor | None,
        matrix: Tensor,
        s: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(tokens, a, matrix, s)
        ctx.x_dtype, ctx.weight_dtype, ctx.bias_dtype = x.dtype, weight.dtype, None if bias is None else bias.dtype
        product = _product_dtype(dtype, x.device)
        if a is not None and s is not None and multiplies_int8(tokens, matrix):
            sums = torch._int_mm(tokens.reshape(-1, tokens.shape[-1]), matrix.t())
            y = (sums.view(*tokens.shape[:-1], len(matrix)) * (s / a)).to(dtype)
        elif a is not None and s is not None and product == torch.float32:  # the same sums: integers below 2^24
            y = (linear(tokens.to(product), matrix.to(product)) * (s / a)).to(dtype)
        else:
            y = linear((tokens if a is None else tokens / a).to(product), matrix.to(product))
            y = (y if s is None else y * s).to(dtype)
        return y if bias is None else y + bias.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        tokens, a, matrix, s = ctx.saved_tensors
        product = _product_dtype(gy.dtype, gy.device)
        gx = gw = gbias = None
        if ctx.needs_input_grad[0]:
            gx = gy.to(product) @ matrix.to(product)
            gx = (gx if s is None else gx * s).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            rows = (gy if a is None else gy / a).reshape(-1, gy.shape[-1]).to(product)
            gw = (rows.mT @ tokens.reshape(-1, tokens.shape[-1]).to(product)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            gbias = gy.reshape(-1, gy.shape[-1]).sum(0).to(ctx.bias_dtype)
        return gx, gw, gbias, None, None, None, None, None


def _product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision of products in floating point: on a CPU float32 for what it cannot multiply natively."""
    return product_dtype(dtype, device) if device.type == "cpu" else dtype


class RoundedInput(torch.autograd.Function):
    """xq (..., n) in a dtype, for `tokens` and `a` as in `StraightThrough`; the gradient is that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, tokens: Tensor, a: Tensor | None) -> Tensor:
        ctx.x_dtype = x.dtype
        return (tokens.clone() if a is None else tokens / a).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gx: Tensor) -> tuple[Tensor | None, ...]:
        return gx.to(ctx.x_dtype), None, None, None


def multiplies_int8(tokens: Tensor, matrix: Tensor) -> bool:
    """Whether tokens (..., n) and a matrix (m, n) of integers are multiplied faster as such than in floating point."""
    if tokens.device.type == "cpu":
        return _CPU_MULTIPLIES_INT8
    if tokens.device.type != "cuda" or torch.cuda.get_device_properties(tokens.device).major < 8:
        return False
    m, n = matrix.shape
    return tokens.numel() // n > 16 and n % 8 == 0 and m % 8 == 0  # what cuBLAS asks for


def _cpu_multiplies_int8() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


_CPU_MULTIPLIES_INT8 = _cpu_multiplies_int8()  # asked once: torch.compile cannot trace the question
