"""Shares of attention and sink scores, against those of output_attentions."""

import pytest
import torch
from activation_cases import DELIMITER, HEADS, PADDINGS, delimiters, dtype_for, inputs, kind_of, make, padded, tokens

from hf_galore import massive_activations, record_activations

SHARP = {"spread": 0.4}  # so that heads attend to some tokens more than to others


def literal(model, batch, threshold=0.3):
    """Per block: shares of the start and of the first delimiter by head, of every position, and the sink score."""
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    found = []
    for matrices in weights:
        start, delimiter, positions = [], [], {}
        for row in range(len(matrices)):
            keep = [at for at in range(matrices.shape[-1]) if mask is None or mask[row, at]]
            own = None if ids is None else ids[row][keep].tolist()
            share = matrices[row].double()[:, keep][:, :, keep].mean(1)  # (heads, tokens)
            for position in range(len(keep)):
                kind = kind_of(position, own)
                positions.setdefault(position, []).append(float(share[:, position].mean()))
                if kind == "start":
                    start.append(share[:, position])
                if kind == "first_delimiter":
                    delimiter.append(share[:, position])
        by_head = torch.stack(start).mean(0)
        found.append(
            {
                "start": by_head.tolist(),
                "first_delimiter": torch.stack(delimiter).mean(0).tolist() if delimiter else None,
                "by_position": [sum(values) / len(values) for _, values in sorted(positions.items())],
                "sink_score": sum(float(head) > threshold for head in by_head) / len(by_head),
            }
        )
    return found


@pytest.mark.parametrize(("name", "side"), PADDINGS)
def test_shares_are_those_of_output_attentions(name, side):
    model, batch = make(name, dtype_for(name, side), **SHARP), padded(name, side)
    report = massive_activations(model, [batch], delimiters=delimiters(name))
    wanted = literal(model, batch)
    close = {"rel": 1e-12 if model.dtype == torch.float64 else 1e-6}  # means of 12 numbers in float32
    assert len(wanted) == len(report.blocks)
    for block, found in zip(report.blocks, wanted, strict=True):
        assert len(block.shares.start) == HEADS
        assert block.shares.start == pytest.approx(found["start"], **close)
        assert block.shares.first_delimiter == (found["first_delimiter"] and pytest.approx(found["first_delimiter"]))
        assert block.shares.by_position == pytest.approx(found["by_position"], **close)
        assert block.shares.sink_score == found["sink_score"]
    assert report.sink_score == pytest.approx(sum(found["sink_score"] for found in wanted) / len(wanted))


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_shares_of_one_sequence_sum_to_1(name):
    report = massive_activations(make(name, **SHARP), [inputs(name, batch=1)])
    for block in report.blocks:
        assert sum(block.shares.by_position) == pytest.approx(1.0)


def test_a_head_that_attends_to_the_start_alone_is_a_sink():
    """Half of the heads have keys that only the start token's feature makes large."""
    model = make("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[1] = 0
        model.transformer.wte.weight[1, 3] = 5
        for block in model.transformer.h:
            weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
            weight[:, :64] = 0  # queries and keys
            bias[:16] = 10  # queries of heads 0 and 1
            weight[3, 32:48] = 1  # their keys
    ids = tokens(2, 10)
    report = massive_activations(model, [{"input_ids": ids}])
    for block in report.blocks:
        assert block.shares.sink_score == 0.5
        assert block.shares.start[:2] == pytest.approx([1.0, 1.0], abs=1e-3)
        uniform = sum(1 / (query + 1) for query in range(10)) / 10
        assert block.shares.start[2:] == pytest.approx([uniform] * 2)
    assert report.sink_score == 0.5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_any_implementation_can_be_reported_on(implementation):
    model, batch = make("llama", torch.float32, implementation, **SHARP), padded("llama", "left")
    report = massive_activations(model, [batch], delimiters=(DELIMITER,))
    assert model.config._attn_implementation == implementation
    assert report.sink_score is not None


def test_without_weights_it_is_an_error_that_says_what_to_do():
    model = make("llama", attention="sdpa", **SHARP)
    with (
        record_activations(model, attention=True),
        pytest.raises(ValueError, match=r"LlamaAttention of model\.layers\.0 does not show weights.*'eager'"),
    ):
        model(input_ids=tokens(1, 4))


def test_attention_can_be_left_out():
    model = make("llama", attention="sdpa")
    report = massive_activations(model, [inputs("llama")], attention=False)
    assert report.sink_score is None
    assert all(block.shares is None for block in report.blocks)
    assert model.config._attn_implementation == "sdpa"


def test_other_states_of_that_shape_are_not_taken_for_weights():
    """Linear attention returns a state (batch, heads, d, d), and here there are d = 8 tokens."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    model = MiniMaxForCausalLM(MiniMaxConfig(**sizes, num_hidden_layers=2, intermediate_size=32, num_local_experts=2))
    with pytest.raises(ValueError, match=r"MiniMaxLightningAttention of model\.layers\.\d does not show weights"):
        massive_activations(model.eval(), [{"input_ids": tokens(1, 8)}])
    report = massive_activations(model, [{"input_ids": tokens(1, 8)}], attention=False)
    assert len(report.blocks) == 2
