"""What SinkCache does not take, each with its reason, and before anything is changed."""

import pytest
import torch
from sink_cases import LATENT, VOCAB, N, S, W, build, fed, tokens
from transformers import (
    AutoModelForCausalLM,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_galore import SinkCache

_LLAMA_LIKE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "head_dim": 8}
_LATENT = {**LATENT, "v_head_dim": 8}
POSITIONS = {
    "gpt2": ({"n_embd": 32, "n_head": 4, "n_layer": 2}, "GPT2Model .* it has learned positions .wpe."),
    "opt": (
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "word_embed_proj_dim": 32,
        },
        "OPTDecoder .* it has learned positions .embed_positions.",
    ),
    "bloom": ({"hidden_size": 32, "n_head": 4, "n_layer": 2}, "BloomModel .* it has ALiBi"),
    "falcon": (
        {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "alibi": True},
        "FalconModel .* it has ALiBi",
    ),
    "smollm3": (
        {**_LLAMA_LIKE, "num_key_value_heads": 2, "no_rope_layers": [1, 0], "pad_token_id": 0, "bos_token_id": 1},
        "SmolLM3Model .* the keys of layer 1 do not change with the position",
    ),
    "beam": (
        {**_LLAMA_LIKE, "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"]},
        "BeamModel .* the keys of full_attention have no position .NoPE.",
    ),
    "gptj": (  # in transformers 5.23 each layer has the table
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
        "GPTJModel .* (angles are in a table that ends|has no rotary embedding for all layers)",
    ),
    "nemotron_h": (
        {**_LLAMA_LIKE, "num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention"], **_MAMBA},
        "NemotronHModel .* its keys do not change with the position",
    ),
    "jamba": (
        {**_LLAMA_LIKE, "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1},
        "JambaModel .* its keys do not change with the position",
    ),
    "kimi_linear": (
        {
            **_LLAMA_LIKE,
            **_LATENT,
            "layer_types": ["full_attention"] * 2,
            "first_k_dense_replace": 2,
            "pad_token_id": 0,
        },
        "KimiLinearModel .* its keys do not change with the position",
    ),
    "deepseek_v32": ({**_LLAMA_LIKE, **_LATENT}, "layers of deepseek_v32 are indexed_attention"),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2}, "RwkvModel takes no cache of keys and values"),
    "minimax": ({**_LLAMA_LIKE, "num_key_value_heads": 2}, "MiniMaxModel takes no other cache than MiniMaxCache"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2}, "layers of mamba are|takes no cache"),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_that_are_not_rotary(kind):
    own, reason = POSITIONS[kind]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](vocab_size=VOCAB, **own)).eval()
    with pytest.raises(ValueError, match=reason):
        SinkCache(model, S, W)
    assert all(not module._forward_pre_hooks for module in model.modules())


OTHERS = {
    "an encoder beside the decoder": (
        lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB)),
        "T5ForConditionalGeneration has an encoder",
    ),
    "several codebooks": (
        lambda: MusicgenForCausalLM(
            MusicgenDecoderConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
        ),
        "MusicgenDecoder has no embeddings of tokens, or several for each token",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_are_more_than_a_decoder_of_tokens(kind):
    make, reason = OTHERS[kind]
    with pytest.raises(ValueError, match=reason):
        SinkCache(make().eval(), S, W)


def test_rotary_in_some_other_way():
    model = build("llama", torch.float32)
    norm = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, out: out.cumsum(0))
    with pytest.raises(ValueError, match="a key of layer 1 at a later position is not the rotated key"):
        SinkCache(model, S, W)
    norm.remove()
    SinkCache(model, S, W)


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"n_sink": -1}, ValueError, "Invalid n_sink: -1"),
        ({"n_sink": 1.0}, TypeError, "n_sink=1.0 is not an integer"),
        ({"window": 0}, ValueError, "Invalid window: 0"),
        ({"window": True}, TypeError, "window=True is not an integer"),
    ],
)
def test_sizes(arguments, error, reason):
    with pytest.raises(error, match=reason):
        SinkCache(build("llama"), **arguments)


def test_windows_that_the_model_cannot_have():
    with pytest.raises(
        ValueError, match=f"all attention layers of mistral have a sliding window of {N} tokens.* may be {N}"
    ):
        SinkCache(build("mistral_sliding"), S, W + 1)
    with pytest.raises(ValueError, match=f"changes from position {2 * N} on, .* half of that, {N}"):
        SinkCache(build("llama_dynamic"), S, W + 1)
    with pytest.raises(ValueError, match=f"changes from position {2 * N} on"):
        SinkCache(build("llama_longrope"), S, W + 1)


def test_what_is_not_a_model_for_generation():
    with pytest.raises(TypeError, match="model=Linear is not a model of transformers"):
        SinkCache(torch.nn.Linear(2, 2), S, W)
    with pytest.raises(ValueError, match="model: it is in training mode"):
        SinkCache(build("llama").train(), S, W)


def test_another_model_and_gradients():
    model, other, ids = build("llama"), build("llama"), tokens(4)
    cache = SinkCache(model, S, W)
    with pytest.raises(RuntimeError, match="works in the model that it was made for"):
        fed(other, cache, ids)
    with pytest.raises(RuntimeError, match="has no gradients"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": True}], ids=lambda x: next(iter(x))
)
def test_assisted_decoding(options):
    model = build("llama")
    if "assistant_model" in options:
        options = {"assistant_model": build("llama")}
    cache = SinkCache(model, S, W)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot be cropped, which assisted decoding needs"):
        model.generate(tokens(4), past_key_values=cache, max_new_tokens=5, **options)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


ONES = torch.ones(1, 6, dtype=torch.long)
HOLE, RIGHT = (torch.tensor([row]) for row in ([0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]))


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"attention_mask": HOLE}, "padding on the left alone"),
        ({"attention_mask": RIGHT}, "padding on the left alone"),
        ({"attention_mask": ONES[:, :5]}, "it is for 5 tokens; 0 were seen and 6 are new"),
        ({"attention_mask": ONES[None, None].bool()}, "needs the mask of .batch, tokens seen and new."),
        ({"position_ids": torch.arange(1, 7)[None]}, "SinkCache counts positions itself"),
        ({"position_ids": torch.arange(18).view(3, 1, 6)}, "count an image or a video in three dimensions"),
    ],
    ids=["hole", "right", "narrow", "4-D", "positions", "3-D positions"],
)
@torch.no_grad()
def test_masks_and_positions(inputs, reason):
    model = build("llama")
    cache = SinkCache(model, S, W)
    with pytest.raises(ValueError, match=reason):
        model(tokens(6), past_key_values=cache, **inputs)
    assert cache.get_seq_length() == 0
    fed(model, cache, tokens(6))


@torch.no_grad()
def test_padding_alone_before_states():
    model, ids = build("lfm2"), tokens(6, rows=2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    cache = SinkCache(model, S, W)
    with pytest.raises(ValueError, match="take padding for a token if it comes alone: pass it together"):
        fed(model, cache, ids, attention_mask=mask)
    assert cache.get_seq_length() == 0
    fed(model, cache, ids, [3, 1, 1, 1], attention_mask=mask)


@torch.no_grad()
def test_padding_that_changes():
    model = build("llama")
    cache, ids = SinkCache(model, S, W), tokens(6, rows=2)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    fed(model, cache, ids[:, :4], [4], attention_mask=mask)
    with pytest.raises(ValueError, match="pass the mask of all tokens"):
        model(ids[:, 4:], past_key_values=cache)
    with pytest.raises(ValueError, match="the padding is not that of the tokens seen before"):
        model(ids[:, 4:], past_key_values=cache, attention_mask=mask.flip(0))


def test_a_conversation_that_forgets_what_was_seen():
    """generate() takes what it is given for all tokens, and positions would begin again."""
    model = build("llama")
    cache = SinkCache(model, S, W)
    fed(model, cache, tokens(6))
    with pytest.raises(ValueError, match=r"no token is new after the 6 seen; generate\(\) takes all tokens"):
        model.generate(tokens(3), past_key_values=cache, max_new_tokens=2, attention_mask=ONES[:, :3])
    with torch.no_grad(), pytest.raises(ValueError, match="count the tokens of each row through all calls"):
        model(tokens(3), past_key_values=cache, position_ids=torch.arange(3)[None])


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@torch.no_grad()
def test_inner_outputs_of_a_long_prompt(name):
    model = build("llama", attention="eager")
    with pytest.raises(ValueError, match=f"{name}: a prompt that does not fit"):
        model(tokens(), past_key_values=SinkCache(model, S, W), **{name: True})
    assert model(tokens(N), past_key_values=SinkCache(model, S, W), **{name: True})[-1] is not None
