"""Columns in front of keys, and merged through the log-sum-exp: three ways to one softmax, in float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_galore.attention.bias import KINDS, STARTS, AttentionBias, Heads
from hf_galore.attention.columns import Attended, with_columns
from hf_galore.attention.fused import FusedWithColumns
from hf_galore.attention.merge import column_scores, merge

B, H, G, Q, D, E = 2, 4, 2, 9, 8, 6
SCALE = 0.4
EXACT = {"rtol": 1e-12, "atol": 1e-12}
VARIANTS = [(kind, start, n) for kind in KINDS for start in STARTS for n in (1, 3)]
MASKS = ("causal", "padded", "full")
every_variant = pytest.mark.parametrize(("kind", "start", "n"), VARIANTS)


def bias_of(kind, start, n, value_dim):
    """Parameters of the order of one."""
    bias = AttentionBias(Heads(H, G, D, value_dim), kind, start, n, std=1.0, dtype=torch.float64)
    if bias.gate is not None:
        bias.gate.data.normal_()
    return bias


def tensors(value_dim):
    """Queries, keys and values that take gradients."""
    shapes = (B, H, Q, D), (B, G, Q, D), (B, G, Q, value_dim)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def mask_of(case):
    """What transformers gives sdpa: None, or truth values of which every row has a true one."""
    if case != "padded":
        return None
    mask = torch.ones(B, 1, Q, Q, dtype=torch.bool).tril()
    mask[0, :, 3:, :2] = False
    return mask


def literal(query, key, value, mask, causal, bias):
    """Head by head, the softmax over n columns and the tokens, and what the gate leaves of it; and its log-sum-exp."""
    outs, sums = [], []
    for h in range(H):
        g = h // (H // G)
        scores = SCALE * query[:, h] @ key[:, g].mT
        if causal:
            scores = scores.masked_fill(torch.ones(Q, Q).triu(1).bool(), -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], -torch.inf)
        k1 = v1 = None
        extra = torch.zeros(B, Q, bias.n, dtype=torch.float64)
        v1 = torch.zeros(bias.n, value.shape[3], dtype=torch.float64)
        if bias.kind == "key_value":
            k1 = bias.key.view(G, bias.n, D)[g]
            extra, v1 = SCALE * query[:, h] @ k1.mT, bias.value.view(G, bias.n, -1)[g]
        elif bias.kind == "sink_logits":
            extra = extra + bias.logit.view(H, bias.n)[h]
        plain = scores.softmax(-1) @ value[:, g]
        both = torch.cat([extra, scores], -1).softmax(-1)
        out = both[..., : bias.n] @ v1 + both[..., bias.n :] @ value[:, g]
        outs.append(out if bias.gate is None else plain + bias.gate[h].tanh() * (out - plain))
        sums.append(scores.logsumexp(-1))
    return torch.stack(outs, 1), torch.stack(sums, 1)


def repeated(tensor):
    return tensor.repeat_interleave(H // G, 1)


@every_variant
@pytest.mark.parametrize("case", MASKS)
def test_a_column_in_front_is_the_formula(kind, start, n, case):
    query, key, value = tensors(E)
    bias, mask = bias_of(kind, start, n, E), mask_of(case)
    columns = bias(query.device)
    grown = with_columns(query, Attended(key, value, mask, None), columns, case == "causal")
    assert (grown.mask is None) == (case == "full" and kind != "sink_logits")
    out = scaled_dot_product_attention(
        query, repeated(grown.key), repeated(grown.value), attn_mask=grown.mask, scale=SCALE
    )
    if columns.gate is not None:
        plain = scaled_dot_product_attention(
            query, repeated(key), repeated(value), attn_mask=mask, is_causal=case == "causal", scale=SCALE
        )
        out = plain + columns.gate.view(-1, 1, 1) * (out - plain)
    torch.testing.assert_close(out, literal(query, key, value, mask, case == "causal", bias)[0], **EXACT)


@every_variant
@pytest.mark.parametrize("case", MASKS)
def test_merging_through_the_log_sum_exp_is_the_formula(kind, start, n, case):
    query, key, value = tensors(E)
    bias, mask = bias_of(kind, start, n, E), mask_of(case)
    columns = bias(query.device)
    none = AttentionBias(bias.heads, "off_by_one", "noop")  # a gate at 0: the attention over the tokens
    out, lse = literal(query, key, value, mask, case == "causal", none)
    merged = merge(out, lse, *column_scores(query, columns, E, SCALE), columns.gate)
    torch.testing.assert_close(merged, literal(query, key, value, mask, case == "causal", bias)[0], **EXACT)


def test_capped_scores_are_capped_in_the_columns_too():
    query = torch.randn(B, H, Q, D, dtype=torch.float64)
    bias = bias_of("key_value", "random", 1, E)
    score, value = column_scores(query, bias(query.device), E, SCALE, softcap=0.5)
    uncapped = SCALE * torch.einsum("bhqd,hd->bhq", query, repeated(bias.key.view(1, G, D))[0])
    torch.testing.assert_close(score, 0.5 * torch.tanh(uncapped / 0.5), **EXACT)
    torch.testing.assert_close(value, repeated(bias.value.view(1, G, E))[0][:, None].expand(B, H, Q, E), **EXACT)


def test_a_row_that_sees_no_token_sees_the_column_alone():
    """Its log-sum-exp is −∞ in some kernels: nothing becomes NaN, neither forward nor backward."""
    score = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    value = torch.ones(1, 1, 2, 3, dtype=torch.float64)
    lse = torch.tensor([[[-torch.inf, 0.0]]], dtype=torch.float64, requires_grad=True)
    out = merge(torch.zeros(1, 1, 2, 3, dtype=torch.float64), lse, score, value, None)
    assert out[0, 0].tolist() == [[1.0] * 3, [0.5] * 3]
    out.sum().backward()
    assert score.grad.isfinite().all()
    assert lse.grad.isfinite().all()


@every_variant
@pytest.mark.parametrize("case", MASKS)
def test_the_fused_kernel_has_the_derivatives_of_the_formula(kind, start, n, case):
    query, key, value = tensors(D)
    bias, mask = bias_of(kind, start, n, D), mask_of(case)
    columns = bias(query.device)
    added = None if mask is None else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    parts = column_scores(query, columns, D, SCALE)
    gate = None if columns.gate is None else columns.gate.view(1, -1, 1, 1)
    actual = FusedWithColumns.apply(
        query, repeated(key), repeated(value), added, case == "causal", SCALE, *parts, gate
    )
    expected = literal(query, key, value, mask, case == "causal", bias)[0]
    torch.testing.assert_close(actual, expected, **EXACT)
    inputs, along = [query, key, value, *bias.parameters()], torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, inputs, along), torch.autograd.grad(expected, inputs, along), strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gate_at_zero_is_the_kernel_bit_for_bit(dtype):
    query, key, value = (torch.randn(B, H, Q, D, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = AttentionBias(Heads(H, H, D, D), n=2, std=1.0)
    columns = bias(query.device)
    gate = columns.gate.to(torch.promote_types(dtype, torch.float32)).view(1, -1, 1, 1)
    actual = FusedWithColumns.apply(
        query, key, value, None, True, SCALE, *column_scores(query, columns, D, SCALE), gate
    )
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE)
    assert torch.equal(actual, expected)
    along = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, [query, key, value, bias.gate], along, retain_graph=True),
        torch.autograd.grad(expected, [query, key, value], along),
        strict=False,
    ):
        assert torch.equal(one, other)
    assert torch.autograd.grad(actual, bias.gate, along)[0].abs().min() > 0


def test_a_static_cache_that_is_still_empty_is_cut_to_the_queries():
    query, key, value = tensors(E)
    longer = [torch.cat([tensor, torch.full_like(tensor[:, :, :4], torch.nan)], 2) for tensor in (key, value)]
    columns = bias_of("key_value", "random", 2, E)(query.device)
    bias = torch.randn(1, H, Q, Q + 4, dtype=torch.float64)
    grown = with_columns(query, Attended(*longer, None, bias), columns, causal=True)
    assert grown.key.shape[2] == grown.value.shape[2] == Q + 2
    assert grown.key.isfinite().all()
    assert grown.mask.shape == (1, 1, Q, Q + 2)
    assert grown.mask[0, 0].equal(torch.ones(Q, Q + 2).tril(2).bool())
    assert not grown.position_bias[..., :2].any()
    assert grown.position_bias[..., 2:].equal(bias[..., :Q])


def test_parameters_are_vectors_of_the_right_length():
    """A matrix would be decayed, projected or orthogonalised somewhere."""
    for kind, start, n in VARIANTS:
        bias = AttentionBias(Heads(H, G, D, E), kind, start, n)
        assert all(param.dim() == 1 for param in bias.parameters())
        lengths = {name: len(param) for name, param in bias.named_parameters()}
        expected = {"key_value": {"key": G * n * D, "value": G * n * E}, "sink_logits": {"logit": H * n}}
        assert lengths == expected.get(kind, {}) | ({"gate": H} if start == "noop" else {})
