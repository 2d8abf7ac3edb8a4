"""`merge_step`, the native op and its reference, against the literal softmax over tokens and a column."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_galore import native
from hf_galore.attention.decoding import merge_step

numerics = settings(derandomize=True, deadline=None, max_examples=50)
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


def both(*args):
    """The result of the op as it is installed, which must be that of the reference."""
    found = merge_step(*args)
    with native.references_only():
        torch.testing.assert_close(found, merge_step(*args), **TOLERANCE[found.dtype])
    return found


def laid_out(tensor, groups, packed, turned):
    """Heads (B, H, ...) as (B, groups, H / groups, ...) or (B, H, 1, ...), in another order in memory if `turned`."""
    shape = tensor.shape
    tensor = tensor.view(shape[0], *((groups, shape[1] // groups) if packed else (shape[1], 1)), *shape[2:])
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if turned else tensor


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    each=st.integers(1, 4),
    key_dim=st.integers(1, 20),
    value_dim=st.integers(1, 20),
    gated=st.booleans(),
    packed=st.booleans(),
    turned=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
@numerics
def test_is_the_softmax_over_tokens_and_column(
    batch, groups, each, key_dim, value_dim, gated, packed, turned, dtype, seed
):
    torch.manual_seed(seed)
    heads, scale = groups * each, 0.3
    query = torch.randn(batch, key_dim, 1, heads, dtype=torch.float64).to(dtype).transpose(1, 3)
    key, value = (torch.randn(groups, 1, dim, dtype=torch.float64).to(dtype) for dim in (key_dim, value_dim))
    gate = torch.rand(heads, dtype=torch.float64).to(dtype) * 2 - 1 if gated else None
    scores, values = torch.randn(batch, heads, 5).double(), torch.randn(batch, heads, 5, value_dim).double()

    own_keys, own_values = (one.double()[:, 0].repeat_interleave(each, 0) for one in (key, value))
    own = scale * (query.double()[:, :, 0] * own_keys).sum(-1, keepdim=True)
    alone = torch.einsum("bht,bhte->bhe", scores.softmax(-1), values)
    weights = torch.cat((own, scores), -1).softmax(-1)
    expected = weights[..., :1] * own_values + torch.einsum("bht,bhte->bhe", weights[..., 1:], values)
    if gate is not None:
        expected = alone + gate.double()[:, None] * (expected - alone)

    out, lse = (laid_out(one.to(dtype), groups, packed, turned) for one in (alone, scores.logsumexp(-1)))
    found = both(out, lse, query, key, value, gate, scale)
    torch.testing.assert_close(found[:, 0].double(), expected, **TOLERANCE[dtype])


def test_a_closed_gate_changes_no_bit_and_a_row_without_tokens_gets_the_column():
    torch.manual_seed(0)
    out, query, key, value = (
        torch.randn(2, 4, 1, 8),
        torch.randn(2, 4, 1, 8),
        torch.randn(2, 1, 8),
        torch.randn(2, 1, 8),
    )
    closed = both(out, torch.randn(2, 4, 1), query, key, value, torch.zeros(4), 0.5)
    assert torch.equal(closed, out.transpose(1, 2))
    unseen = both(torch.zeros_like(out), torch.full((2, 4, 1), -torch.inf), query, key, value, None, 0.5)
    assert torch.equal(unseen, value.repeat_interleave(2, 0).transpose(0, 1).expand(2, 1, 4, 8))


def arguments(**changed):
    given = {
        "out": torch.zeros(2, 4, 1, 6),
        "lse": torch.zeros(2, 4, 1),
        "query": torch.zeros(2, 4, 1, 8),
        "key": torch.zeros(2, 1, 8),
        "value": torch.zeros(2, 1, 6),
        "gate": torch.zeros(4),
    }
    return *(given | changed).values(), 1.0


@pytest.mark.skipif(native.cpu_kernels() is None, reason=f"no native ops: {native.reasons_for_none().get('cpu')}")
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("query", torch.zeros(2, 4, 2, 8), "query must be"),
        ("key", torch.zeros(3, 1, 8), "key must be"),
        ("key", torch.zeros(2, 1, 7), "key must be"),
        ("value", torch.zeros(1, 1, 6), "value must be"),
        ("out", torch.zeros(2, 4, 2, 6), "out must have"),
        ("lse", torch.zeros(2, 2, 2), "lse must be"),
        ("gate", torch.zeros(2), "gate must be"),
        ("gate", torch.zeros(4).double(), "one dtype"),
    ],
)
def test_what_does_not_go_together_is_refused(name, tensor, message):
    with pytest.raises(RuntimeError, match=message):
        merge_step(*arguments(**{name: tensor}))


@pytest.mark.parametrize("gate", [torch.rand(4), None])
def test_opcheck(gate):
    torch.library.opcheck(torch.ops.hf_galore.merge_step.default, arguments(gate=gate))
