"""Columns merged into the result of an attention that does not know of them, through its log-sum-exp.

With lse = log Σ exp(s_t) over the tokens and the columns' own s' = log Σ_j exp(s'_j) and v' = Σ_j exp(s'_j − s') v'_j,
the softmax over both is, exactly,

    out + σ(s' − lse) · (v' − out)
"""

import torch
from torch import Tensor

from hf_galore.attention.bias import Columns


def column_scores(
    query: Tensor, columns: Columns, value_dim: int, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """s' (B, H, Q) and v' (B, H, Q, value_dim) of the columns for queries (B, H, Q, d), in float32 or float64."""
    precise = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, dim = query.shape
    n = columns.n
    logit = torch.zeros((), dtype=precise, device=query.device)
    if columns.key is not None:
        grouped = query.reshape(batch, columns.key.shape[0], -1, dim)
        logit = (grouped @ columns.key.to(query.dtype).mT).view(batch, heads, length, n).to(precise) * scale
        if softcap is not None:
            logit = softcap * (logit / softcap).tanh()
    if columns.logit is not None:
        logit = logit + columns.logit.to(precise).view(1, heads, 1, n)
    logit = logit.expand(batch, heads, length, n)
    total = logit[..., 0] if n == 1 else logit.logsumexp(-1)
    if columns.value is None:
        return total, logit.new_zeros(1, 1, 1, 1).expand(batch, heads, length, value_dim)
    value = columns.value.to(precise)
    groups = value.shape[0]
    if n == 1:  # a share of 1
        one = value.view(1, groups, 1, 1, value_dim)
        return total, one.expand(batch, groups, heads // groups, length, value_dim).reshape(
            batch, heads, length, value_dim
        )
    shares = (logit - total[..., None]).exp().reshape(batch, groups, -1, n)
    return total, (shares @ value).view(batch, heads, length, value_dim)


def merge(out: Tensor, lse: Tensor, score: Tensor, value: Tensor, gate: Tensor | None) -> Tensor:
    """The attention (B, H, Q, e) over tokens and columns, of `out` and `lse` (B, H, Q) over the tokens.

    Args:
        score, value: what `column_scores` returns.
        gate: (H,), from −1 to 1: how much of the difference is added; None is all of it.
    """
    lse = lse.to(score.dtype).clamp_min(torch.finfo(score.dtype).min)  # −inf for a row that sees no token
    mass = (score - lse).sigmoid()[..., None]
    if gate is not None:
        mass = mass * gate.to(mass.dtype).view(-1, 1, 1)
    return (out + mass * (value - out)).to(out.dtype)
