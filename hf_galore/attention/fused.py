"""torch's fused attention on the CPU with columns merged in: one call of its kernel, forward and backward.

A mask with a column would keep the kernel from skipping what is behind the diagonal, and would need keys and values
copied behind the column. Here they stay as they are. With p = σ(s' − lse) and a the gate (1 without one), the result

    out + a·p·(v' − out)

has the derivative, with respect to the score of a token that the kernel calls S and its own softmax P = exp(S − lse),

    (1 − a·p) P [u·V − u·(out + c·(v' − out))]        c = a·p·(1 − p) / (1 − a·p),  u the gradient of the result

which is what the kernel's backward computes if it is told that its result was out + c·(v' − out) and its log-sum-exp
lse − log(1 − a·p). At a = 0 result and gradients are those of the kernel alone, bit for bit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _shares_keys() -> bool:
    """Whether the kernel takes fewer heads of keys than of queries; older ones read on behind the last.

    The trial has a head of zeros there.
    """
    query = torch.ones(1, 2, 1, 2, device="cpu")
    heads = torch.stack([query[0, 0], torch.zeros_like(query[0, 0])])[None]
    out, _ = _flash(query, heads[:, :1], heads[:, :1])
    return bool((out == 1).all())


SHARES_KEYS = _shares_keys()


def attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The kernel's own result (B, H, Q, e), without columns, and its log-sum-exp (B, H, Q)."""
    out, lse = _flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse


def fused_with_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    score: Tensor,
    column_value: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """The attention (B, H, Q, e) of queries (B, H, Q, d) over keys and values (B, H, K, d) and over columns.

    `mask` is None or to be added to the scores; `score` and `column_value` are what `column_scores` returns; `gate` is
    None or of a shape (1, H, Q or 1, 1).
    """
    if torch.is_grad_enabled():
        result: Tensor = FusedWithColumns.apply(query, key, value, mask, causal, scale, score, column_value, gate)
        return result
    return _forward(query, key, value, mask, causal, scale, score, column_value, gate)[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    score: Tensor,
    column_value: Tensor,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, the kernel's own and its log-sum-exp, and the columns' share."""
    out, lse = attended(query, key, value, mask, scale, causal)
    share = (score - lse).sigmoid_()[..., None]
    mass = share if gate is None else share * gate
    return (out + mass * (column_value - out)).to(out.dtype), out, lse, share


class FusedWithColumns(torch.autograd.Function):
    """`fused_with_columns` with its derivatives."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        query, key, value, mask, ctx.causal, ctx.scale, _, column_value, gate = args
        result, out, lse, share = _forward(*args)
        ctx.save_for_backward(query, key, value, mask, out, lse, share, column_value, gate)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, lse, share, column_value, gate = ctx.saved_tensors
        mass = share if gate is None else share * gate
        step = column_value - out
        tiny = torch.finfo(mass.dtype).tiny
        moved = share if gate is None else mass * (1 - share) / (1 - mass).clamp_min(tiny)
        merged = (out + moved * step).to(out.dtype)
        lowered = lse - (-mass).log1p()[..., 0]
        parts = _flash_backward(
            grad, query, key, value, merged, lowered, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )
        along = (grad * step).sum(-1, keepdim=True)  # u·(v' − out)
        by_score = (mass * (1 - share) * along)[..., 0]
        by_gate = None if gate is None else (share * along).sum_to_size(gate.shape)
        return *parts, None, None, None, by_score, mass * grad, by_gate
