"""A column merged into a decoding step on the CPU, where so little is computed that the number of operators counts."""

from torch import Tensor

from hf_galore import native


def _merged_step(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, scale: float
) -> Tensor:
    """The attention (B, 1, H, e) of one token over all tokens and a column: out + a·σ(q·k'·scale − lse)·(v' − out).

    Shapes: `query` (B, H, 1, d); `key` k' (G, 1, d) and `value` v' (G, 1, e), each for H / G heads of the query; `out`
    (B, O, Q, e) and `lse` (B, O, Q) of the tokens alone, with the H = O·Q heads in any such form; `gate` a (H,), or
    None for 1. All are float32, or all float64. At a = 0 the result has the bits of `out`.
    """
    batch, heads, _, dim = query.shape
    groups = len(key)
    score = (query.reshape(batch, groups, -1, dim) * key).sum(-1).mul_(scale)
    mass = score.sub_(lse.reshape(score.shape)).sigmoid_()[..., None]
    if gate is not None:
        mass = mass * gate.view(groups, -1, 1)
    merged = out.reshape(batch, groups, -1, out.shape[-1]).lerp(value, mass)
    return merged.reshape(batch, 1, heads, -1).contiguous()


merge_step = native.define(
    "merge_step(Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value, Tensor? gate, float scale) -> Tensor",
    _merged_step,
    lambda out, lse, query, key, value, gate, scale: query.new_empty(
        (query.shape[0], 1, query.shape[1], value.shape[-1])
    ),
)
