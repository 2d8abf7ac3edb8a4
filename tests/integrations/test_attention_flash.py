"""Columns under flash attention, which does not run here: its semantics, written out, take its place in the calls."""

import pytest
import torch
from attention_cases import model_of

from hf_galore.attention.bias import STARTS, AttentionBias, Heads
from hf_galore.integrations.attention import AttentionCall
from hf_galore.integrations.attention_bias_kernels import attend

B, H, G, Q, D = 2, 4, 2, 5, 8


def flash(call):
    """softmax over what a query may see of the unpadded keys; the causal mask is aligned at the last key and query."""
    out = torch.zeros(B, call.query.shape[2], H, D, dtype=call.query.dtype)
    for b in range(B):
        kept = torch.ones(call.key.shape[2]).bool() if call.mask is None else call.mask[b].bool()
        asked = kept[-call.query.shape[2] :]
        for h in range(H):
            g = h // (H // G)
            q, k, v = call.query[b, h][asked], call.key[b, g][kept], call.value[b, g][kept]
            scores = q @ k.mT * call.options["scaling"]
            scores = scores.masked_fill(torch.ones_like(scores).triu(1 + len(k) - len(q)).bool(), -torch.inf)
            out[b, asked, h] = scores.softmax(-1) @ v
    return out, None


def call_of(mask=None, past=0, **options):
    module = model_of("llama").model.layers[0].self_attn
    query = torch.randn(B, H, Q, D, dtype=torch.float64)
    key, value = (torch.randn(B, G, past + Q, D, dtype=torch.float64) for _ in "kv")
    return AttentionCall(module, "flash_attention_2", query, key, value, mask, {"scaling": 0.3, **options})


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("pads", [0, 2])
def test_a_column_in_front_stays_visible(start, past, pads):
    mask = None
    if pads:
        mask = torch.ones(B, past + Q, dtype=torch.long)
        mask[0, :pads] = 0
    call = call_of(mask, past)
    bias = AttentionBias(Heads(H, G, D, D), start=start, n=2, std=1.0, dtype=torch.float64)
    if bias.gate is not None:
        bias.gate.data.normal_()
    columns = bias(call.query.device)
    actual, _ = attend(call, flash, columns)
    for b in range(B):
        for i in range(Q):
            first, last = pads if pads and b == 0 else 0, past + i + 1
            if last <= first:
                continue
            for h in range(H):
                g = h // (H // G)
                q, k, v = call.query[b, h, i], call.key[b, g, first:last], call.value[b, g, first:last]
                both = torch.cat([columns.key[g], k]) @ q * 0.3
                out = both.softmax(0) @ torch.cat([columns.value[g], v])
                plain = (k @ q * 0.3).softmax(0) @ v
                expected = out if columns.gate is None else plain + columns.gate[h] * (out - plain)
                torch.testing.assert_close(actual[b, i, h], expected, rtol=1e-12, atol=1e-12)


PACKED = torch.tensor([[0, 1, 2, 0, 1]])
REFUSED = {
    "window": ({"sliding_window": 4}, "key_value", "out of a sliding window"),
    "packed": ({"cu_seq_lens_q": PACKED}, "key_value", "packed into one row"),
    "logits": ({}, "sink_logits", "takes no logits of columns"),
    "paged": ({"cache": object()}, "key_value", "paged cache of continuous batching"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_flash_attention_cannot_do_is_refused(case):
    options, kind, message = REFUSED[case]
    bias = AttentionBias(Heads(H, G, D, D), kind, dtype=torch.float64)
    call = call_of(**options)
    with pytest.raises(ValueError, match=message):
        attend(call, flash, bias(call.query.device))


def test_positions_that_start_again_are_packed_sequences():
    call = call_of(position_ids=PACKED)
    one_row = call._replace(query=call.query[:1], key=call.key[:1], value=call.value[:1])
    with pytest.raises(ValueError, match="packed into one row"):
        attend(one_row, flash, AttentionBias(Heads(H, G, D, D))(call.query.device))
