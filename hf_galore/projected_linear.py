"""A linear layer whose backward pass makes the low-rank gradient R directly: the full gradient is never formed.

    right: R = G Q  = gyᵀ (x Q)   (m, r), saves x Q (tokens, r) in place of x
    left:  R = PᵀG  = (gy P)ᵀ x   (r, n), saves x

R becomes the gradient of a small parameter `update` B that sits beside the frozen weight W (m, n). The layer computes
y = x (decay·W + scale·back(B))ᵀ + bias; with B = 0 and decay = 1 (`pending=False`) that is the plain layer.

That the projected gradient is the gradient of such a factor is known (LoQT, CompAct, GoLore derive it). The gradient
is R itself here, not scale·R, so that moments, eps and clipping mean what they mean in GaLore's optimizer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_galore.ops import matmul


class ProjectedLinear(torch.autograd.Function):
    """x (..., n) → y (..., m) for W (m, n), with R as the gradient of `update`. Pure: torch.compile takes it.

    Args:
        weight: W, or what `decode` makes W of.
        kept: what the backward pass makes R of: x Q (..., r) on the right, x on the left; not differentiated.
        basis: Q (n, r) or P (m, r), in the precision of the products that make R.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        decode: Callable[[Tensor], Tensor] | None,
        bias: Tensor | None,
        update: Tensor,
        kept: Tensor,
        basis: Tensor,
        right: bool,
        decay: float,
        scale: float,
        pending: bool,
    ) -> Tensor:
        y = linear(x, dense(weight, decode, x.dtype), None if pending else bias)
        if pending:
            factor = update.to(x.dtype)
            y = y * decay + scale * (kept @ factor.mT if right else (x @ factor.mT) @ basis.to(x.dtype).mT)
            y = y if bias is None else y + bias
        # What a plain step does not need again is not kept alive.
        ctx.save_for_backward(kept, weight, basis if pending or not right else None, update if pending else None)
        ctx.update_dtype, ctx.product = update.dtype, basis.dtype
        ctx.decode, ctx.right, ctx.decay, ctx.scale, ctx.pending = decode, right, decay, scale, pending
        # As a view, which `linear` may give, no model could change y in place (y += residual).
        fresh: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return fresh

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, basis, update = ctx.saved_tensors
        rows = gy.reshape(-1, gy.shape[-1])
        gx = gbias = low = None
        if ctx.needs_input_grad[0]:
            # Under autocast W has another dtype, and codes are decoded: W is made again, not kept from the forward.
            gx = gy @ dense(weight, ctx.decode, gy.dtype)
            if ctx.pending:
                factor, back = update.to(gy.dtype), basis.to(gy.dtype)
                gx = gx * ctx.decay + ctx.scale * ((gy @ factor) @ back.mT if ctx.right else (gy @ back) @ factor)
        if ctx.needs_input_grad[3]:
            gbias = rows.sum(0)
        if ctx.needs_input_grad[4]:
            tokens = kept.reshape(-1, kept.shape[-1])
            left, right = (rows, tokens.to(ctx.product)) if ctx.right else (matmul(rows, basis), tokens)
            low = matmul(left.mT, right).to(ctx.update_dtype)
        return gx, None, None, gbias, low, None, None, None, None, None, None


def dense(weight: Tensor, decode: Callable[[Tensor], Tensor] | None, dtype: torch.dtype) -> Tensor:
    """W (m, n) in this dtype, from what `decode` makes W of, or from W itself."""
    return (weight if decode is None else decode(weight)).to(dtype)


class TapGradient(torch.autograd.Function):
    """The identity on y that hands (x, gy) to `receive` in the backward pass: how a refresh sees its layer's data.

    It gives back y itself and no view of it, which models could not change in place (`y += residual`).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, receive: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.receive(x.reshape(-1, x.shape[-1]), gy.reshape(-1, gy.shape[-1]))
        return gy, None, None
