"""Columns in front of an attention's keys, values and mask, for functions that take those and nothing else."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_galore.attention.bias import Columns


class Attended(NamedTuple):
    """Keys (B, G, K, d), values (B, G, K, e); a mask (B or 1, H or 1, Q, K) or (B, K), scores to add; or None."""

    key: Tensor
    value: Tensor
    mask: Tensor | None
    position_bias: Tensor | None


def with_columns(query: Tensor, attended: Attended, columns: Columns, causal: bool) -> Attended:
    """The same with n columns in front that every query sees.

    Args:
        query: (B, H, Q, d).
        causal: without a mask, query i sees keys 0 … i alone: the first Q of them, and those behind (slots of a
            static cache that are still empty) none. With a mask it says nothing.
    """
    key, value, mask, position_bias = attended
    length = query.shape[2]
    if mask is None and causal and length > 1:
        key, value = key[:, :, :length], value[:, :, :length]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
        position_bias = None if position_bias is None else position_bias[..., :length]
    n = columns.n
    if columns.logit is not None:
        mask = _additive(mask, query, key.shape[2])
        shape = (mask.shape[0], query.shape[1], length)
        logits = columns.logit.to(mask.dtype).view(1, -1, 1, n).expand(*shape, n)
        mask = torch.cat([logits, mask.expand(*shape, -1)], dim=-1)
    elif mask is not None:
        seen = 0 if mask.is_floating_point() else 1  # added to scores, or says what is seen
        mask = torch.cat([mask.new_full((*mask.shape[:-1], n), seen), mask], dim=-1)
    if position_bias is not None:
        position_bias = torch.cat([position_bias.new_zeros(*position_bias.shape[:-1], n), position_bias], dim=-1)
    return Attended(_in_front(columns.key, n, key), _in_front(columns.value, n, value), mask, position_bias)


def _additive(mask: Tensor | None, query: Tensor, length: int) -> Tensor:
    """The mask as scores to add: zeros, and the lowest number where nothing is to be seen."""
    if mask is None:
        return query.new_zeros(1, 1, query.shape[2], length)
    if mask.dtype != torch.bool:
        return mask
    return query.new_zeros(()).masked_fill(~mask, torch.finfo(query.dtype).min)


def _in_front(columns: Tensor | None, n: int, tokens: Tensor) -> Tensor:
    """(B, G, n + K, d) of columns (G, n, d), None for zeros, and tokens (B, G, K, d)."""
    batch, heads, _, dim = tokens.shape
    if columns is None:
        columns = tokens.new_zeros(heads, n, dim)
    return torch.cat([columns.to(tokens.dtype).expand(batch, heads, n, dim), tokens], dim=2)
