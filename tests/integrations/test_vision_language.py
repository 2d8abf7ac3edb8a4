"""SinkCache and register tokens in whole vision-language models: text and images, or a refusal with its reason."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_galore
from hf_galore import SinkCache
from hf_galore.integrations.decoders import decoder_of
from hf_galore.integrations.register_decoder import CHILD

S, W = 2, 30
IMAGE = 10  # the id of image tokens
SINGLE = {"rtol": 1e-5, "atol": 1e-5}  # float32, in logits of the order of one
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
_QWEN |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, "num_position_embeddings": 16}
_STATES = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}

# The configuration, how many tokens an image is, and what the model is given of it.
MODELS = {
    "llava": (
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": 8, "patch_size": 4},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
        4,
        {"pixel_values": (1, 3, 8, 8)},
    ),
    "internvl": (
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {**_VISION, "image_size": [8, 8], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
        },
        1,
        {"pixel_values": (1, 3, 8, 8)},
    ),
    "qwen3_5": (  # positions in three dimensions, and layers with states
        {
            "text_config": {**_TEXT, **_STATES},
            "vision_config": _QWEN,
            "image_token_id": IMAGE,
            "video_token_id": 11,
            "vision_start_token_id": 12,
            "vision_end_token_id": 13,
        },
        4,
        {"pixel_values": (16, 48), "image_grid_thw": torch.tensor([[1, 4, 4]])},
    ),
    "gemma3": (
        {
            "text_config": _TEXT,
            "vision_config": {**_VISION, "image_size": 8, "patch_size": 4},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
        4,
        {"pixel_values": (1, 3, 8, 8)},
    ),
    "paligemma": (
        {
            "text_config": {"model_type": "gemma", **_TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION, "image_size": 8, "patch_size": 4},
            "image_token_index": IMAGE,
            "projection_dim": 32,
        },
        4,
        {"pixel_values": (1, 3, 8, 8)},
    ),
}
WHOLE = ["llava", "internvl", "qwen3_5"]
THREE_DIMENSIONS = {"qwen3_5"}


def build(name):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name](**MODELS[name][0])).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def text(length=14):
    return torch.randint(14, 64, (1, length), generator=torch.Generator().manual_seed(1))


def with_image(name):
    """The ids and the image that their image tokens stand for."""
    _, count, shapes = MODELS[name]
    generator = torch.Generator().manual_seed(2)
    ids = text()
    ids[:, 3 : 3 + count] = IMAGE
    image = {
        key: shape if isinstance(shape, torch.Tensor) else torch.randn(shape, generator=generator)
        for key, shape in shapes.items()
    }
    if name in THREE_DIMENSIONS:
        ids[:, 2] = 12
        image["mm_token_type_ids"] = (ids == IMAGE).int()
    return ids, image


def greedy(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, **options)


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_sink_cache_on_text(name):
    """DynamicCache's bits until something is evicted; then generate() is what prompts of other lengths lead to."""
    model, ids = build(name), text()
    caches = SinkCache(model, S, W), DynamicCache(config=model.config.get_text_config())
    ours, theirs = (model(ids, past_key_values=cache).logits for cache in caches)
    assert torch.equal(ours, theirs)
    out = greedy(model, ids, past_key_values=SinkCache(model, S, W))
    logits = model(out, past_key_values=SinkCache(model, S, W)).logits
    assert torch.equal(out[0, ids.shape[1] :], logits[0, ids.shape[1] - 1 : -1].argmax(-1))
    assert not torch.equal(out, greedy(model, ids))


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_sink_cache_on_images(name):
    model = build(name)
    ids, image = with_image(name)
    cache = SinkCache(model, S, W)
    if name in THREE_DIMENSIONS:
        with pytest.raises(ValueError, match="count an image or a video in three dimensions"):
            model(ids, past_key_values=cache, **image)
        return
    theirs = model(ids, past_key_values=DynamicCache(config=model.config.get_text_config()), **image).logits
    assert torch.equal(model(ids, past_key_values=cache, **image).logits, theirs)
    out = greedy(model, ids, past_key_values=SinkCache(model, S, W), **image)
    logits = model(out, past_key_values=SinkCache(model, S, W), **image).logits
    assert torch.equal(out[0, ids.shape[1] :], logits[0, ids.shape[1] - 1 : -1].argmax(-1))


@pytest.mark.parametrize("has_image", [False, True])
@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_register_tokens_are_the_decoder_on_what_the_model_hands_it_by_hand(name, has_image):
    plain, n = build(name), 2
    ids, image = with_image(name) if has_image else (text(), {})
    handed = {}
    hook = decoder_of(plain).register_forward_pre_hook(
        lambda module, args, kwargs: handed.update(kwargs), with_kwargs=True
    )
    plain(ids, **image)
    hook.remove()
    model = hf_galore.add_register_tokens(build(name), n, std=1.0)
    own = getattr(decoder_of(model), CHILD).tokens.view(1, n, -1)
    positions = handed.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1])[None]
    front = torch.arange(n).expand(*positions.shape[:-1], n)
    expected = decoder_of(plain)(
        inputs_embeds=torch.cat([own, handed["inputs_embeds"]], 1),
        position_ids=torch.cat([front, positions + n], -1),
    ).last_hidden_state[:, n:]
    logits = plain.get_output_embeddings()(expected)
    torch.testing.assert_close(model(ids, **image).logits, logits, **SINGLE)
    assert (logits - plain(ids, **image).logits).abs().max() > 0.1


@pytest.mark.parametrize("name", WHOLE)
def test_register_tokens_generate_on_images(name):
    model = hf_galore.add_register_tokens(build(name), 2, std=1.0)
    ids, image = with_image(name)
    options = {**image, "suppress_tokens": [IMAGE, 11, 12]}  # or it would make images of its own
    assert torch.equal(greedy(model, ids, **options), greedy(model, ids, use_cache=False, **options))


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_masks_that_the_model_makes_are_refused(name):
    model = build(name)
    with pytest.raises(ValueError, match="makes the masks of its decoder itself, for images"):
        SinkCache(model, S, W)
    with pytest.raises(ValueError, match=r"cannot have register tokens: (it makes the masks|tokens attend to later)"):
        hf_galore.add_register_tokens(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
