"""The columns of an attention bias in each of transformers' attention implementations.

| implementation | how |
|---|---|
| eager; sdpa in general | a column in front of keys, values and mask |
| sdpa on the CPU without dropout | torch's fused kernel, merged forward and backward (`hf_galore.attention.fused`) |
| flex_attention | merged through the log-sum-exp that it returns (none on the CPU) |
| flash_attention_2, 3, 4 | a column in front: their causal mask is aligned at the last key, so it stays visible |

On other devices sdpa with a column has a mask, where torch could do without one for a causal model: its fastest
kernels are out of reach there. flex_attention hands out its log-sum-exp in the dtype of the values, so that bfloat16
rounds the columns' share to about 1 %.

A gate needs the result without columns as well: a column then costs a second call, and merging costs none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, use_gqa_in_sdpa
from transformers.modeling_flash_attention_utils import _is_packed_sequence, flash_attn_supports_top_left_mask
from transformers.utils.import_utils import is_torchdynamo_compiling

from hf_galore.attention.bias import Columns
from hf_galore.attention.columns import Attended, with_columns
from hf_galore.attention.decoding import merge_step
from hf_galore.attention.fused import SHARES_KEYS, attended, fused_with_columns
from hf_galore.attention.merge import column_scores, merge
from hf_galore.integrations.attention import Attention, AttentionCall, Result
from hf_galore.integrations.compatibility import pack_gqa

Kernel = Callable[[AttentionCall, Attention, Columns], Result]


def attend(call: AttentionCall, attention: Attention, columns: Columns) -> Result:
    """The attention over the tokens and the columns.

    Raises:
        ValueError: the implementation, or an option of this call, is none that columns can be added to.
    """
    check_implementation(call.implementation)
    # Before transformers 5.24 the attention function itself gathers keys from the paged cache of continuous batching.
    # From 5.24 on they are gathered before: sdpa has what generate() gives it, and eager, under a name of its own, and
    # flash attention, on packed rows, are refused below.
    if call.options.get("cache") is not None:
        raise ValueError("an attention bias does not run with the paged cache of continuous batching: use generate()")
    return KERNELS[call.implementation](call, attention, columns)


def check_implementation(name: Any) -> None:
    """Raises ValueError for attention implementations that columns cannot be added to."""
    if name not in KERNELS:
        raise ValueError(f"attn_implementation={name!r}: an attention bias runs with {', '.join(KERNELS)}")


def _column(call: AttentionCall, attention: Attention, columns: Columns, causal: bool) -> Result:
    """The attention function on keys, values and mask with columns; its weights are those of the tokens."""
    given = Attended(call.key, call.value, call.mask, call.options.get("position_bias"))
    grown = with_columns(call.query, given, columns, causal)
    options = call.options
    if grown.position_bias is not None:
        options = options | {"position_bias": grown.position_bias}
    out, weights = attention(call._replace(key=grown.key, value=grown.value, mask=grown.mask, options=options))
    if isinstance(weights, Tensor):
        weights = weights[..., columns.n :]
    return _gated((out, weights), call, attention, columns)


def _gated(result: Result, call: AttentionCall, attention: Attention, columns: Columns) -> Result:
    """What is between the attention without columns and the result with them."""
    if columns.gate is None:
        return result
    gate, (out, weights), (plain, plain_weights) = columns.gate, result, attention(call)
    if isinstance(weights, Tensor):
        weights = (plain_weights + gate.view(-1, 1, 1) * (weights - plain_weights)).to(weights.dtype)
    return (plain + gate.view(-1, 1) * (out - plain)).to(out.dtype), weights


def _eager(call: AttentionCall, attention: Attention, columns: Columns) -> Result:
    return _column(call, attention, columns, causal=False)  # without a mask every query sees all


def _sdpa(call: AttentionCall, attention: Attention, columns: Columns) -> Result:
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    if not _fuses(call):
        return _column(call, attention, columns, causal)
    if _is_step(call, columns):
        return _step(call, columns), None
    return _fused(call, columns, causal and call.mask is None and call.query.shape[2] > 1), None


def _fuses(call: AttentionCall) -> bool:
    """Whether transformers' sdpa is one call of torch's fused kernel for the CPU."""
    query, key, value, options = call.query, call.key, call.value, call.options
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and key.shape[-1] == value.shape[-1]
        and (SHARES_KEYS or _groups(call) == 1 or not use_gqa_in_sdpa(call.mask, key, value))
        and options.get("dropout", 0.0) == 0.0
        and options.get("position_bias") is None
        and options.get("softcap") is None
        and not torch.is_autocast_enabled("cpu")
        and (
            is_torchdynamo_compiling() or torch.backends.cuda.flash_sdp_enabled()
        )  # sdpa_kernel(), for the CPU as well
    )


def _fused(call: AttentionCall, columns: Columns, causal: bool) -> Tensor:
    """(B, Q, H, d): the steps of transformers' `sdpa_attention_forward`, for the same bits, and the columns."""
    query, key, value, mask, groups = call.query, call.key, call.value, call.mask, _groups(call)
    batch, heads, length, dim = query.shape
    scale = _scale(call)
    score, column_value = column_scores(query, columns, dim, scale)
    gate = None if columns.gate is None else columns.gate.to(score.dtype).view(1, -1, 1, 1)
    if causal:
        key, value = key[:, :, :length], value[:, :, :length]
    mask = _added(mask, query)
    if groups == 1 or use_gqa_in_sdpa(mask, key, value):
        pass  # the kernel shares keys itself
    elif pack_gqa is not None and length == 1 and not is_torchdynamo_compiling():
        query, mask, column_value = (pack_gqa(tensor, groups) for tensor in (query, mask, column_value))
        score = score.view(batch, -1, groups)
        gate = None if gate is None else gate.view(1, -1, groups, 1)
    else:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out = fused_with_columns(query, key, value, mask, causal, scale, score, column_value, gate)
    return out.reshape(batch, heads, length, dim).transpose(1, 2).contiguous()


def _is_step(call: AttentionCall, columns: Columns) -> bool:
    """Whether this is a decoding step with one column, in one precision."""
    dtype = call.query.dtype
    return (
        call.query.shape[2] == 1
        and columns.n == 1
        and columns.logit is None
        and columns.key is not None
        and columns.value is not None
        and dtype == columns.key.dtype == columns.value.dtype
        and (columns.gate is None or columns.gate.dtype == dtype)
        and dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and not is_torchdynamo_compiling()
    )


def _step(call: AttentionCall, columns: Columns) -> Tensor:
    """`_fused` where `_is_step`, with few operators."""
    query, key, value, groups, scale = call.query, call.key, call.value, _groups(call), _scale(call)
    mask, grouped = _added(call.mask, query), query
    if groups > 1 and not use_gqa_in_sdpa(mask, key, value):
        if pack_gqa is not None:
            grouped, mask = pack_gqa(query, groups), pack_gqa(mask, groups)
        else:
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out, lse = attended(grouped, key, value, mask, scale)
    merged: Tensor = merge_step(out, lse, query, columns.key, columns.value, columns.gate, scale)
    return merged


def _added(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask as what is added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return query.new_zeros(()).masked_fill(~mask, -torch.inf)


def _flex(call: AttentionCall, attention: Attention, columns: Columns) -> Result:
    out, lse = attention(call)
    if not isinstance(lse, Tensor):
        raise ValueError(
            "attn_implementation='flex_attention': transformers gives no log-sum-exp of it on the CPU, which an "
            "attention bias needs: use sdpa or eager there"
        )
    sinks = call.options.get("s_aux")
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
    parts = column_scores(call.query, columns, call.value.shape[-1], _scale(call), call.options.get("softcap"))
    return merge(out.transpose(1, 2), lse, *parts, columns.gate).transpose(1, 2).contiguous(), lse


def _flash(call: AttentionCall, attention: Attention, columns: Columns) -> Result:
    options, name = call.options, f"attn_implementation={call.implementation!r}"
    if columns.logit is not None:
        raise ValueError(f"{name} takes no logits of columns: use kind='key_value', or sdpa")
    if options.get("sliding_window") is not None or flash_attn_supports_top_left_mask():
        raise ValueError(
            f"{name}: the column would fall out of a sliding window or a mask aligned at the left: use sdpa"
        )
    packed = options.get("cu_seq_lens_q") is not None
    if packed or _is_packed_sequence(options.get("position_ids"), call.query.shape[0]):
        raise ValueError(f"{name}: sequences packed into one row would share one column: use sdpa, or pad instead")
    return _column(call, attention, columns, causal=False)


def _groups(call: AttentionCall) -> int:
    """How many query heads share a key, of those that the attention function is to repeat."""
    groups: int = getattr(call.module, "num_key_value_groups", 1)
    return groups


def _scale(call: AttentionCall) -> float:
    scale = call.options.get("scaling")
    return call.query.shape[-1] ** -0.5 if scale is None else scale


KERNELS: dict[str, Kernel] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "flex_attention": _flex,
    "flash_attention_2": _flash,
    "flash_attention_3": _flash,
    "flash_attention_4": _flash,
}
