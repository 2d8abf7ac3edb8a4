"""Register tokens in vision transformers: a forward pass by hand, and transformers' own models with registers."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, Dinov2Backbone
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from version_cases import checkpoint_activations

import hf_galore
from hf_galore.attention.blocks import find_blocks
from hf_galore.integrations.register_decoder import CHILD

EXACT = {"rtol": 1e-12, "atol": 1e-12}
N = 3
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
TOKENS = {"vit": 17, "deit": 18, "dinov2": 17, "dinov2_with_registers": 21, "siglip_vision_model": 16}
REFUSED = {
    "beit": ({"use_relative_position_bias": True}, "it does not run with them"),
    "vit_mae": ({}, "ViTMAEEmbeddings puts out more than embeddings"),
    "convnext": ({"hidden_sizes": [8] * 4, "depths": [1] * 4}, "ConvNextModel has no ModuleList of blocks"),
}


def config(name, **changes):
    return CONFIG_MAPPING[name](**SMALL | changes)


def made(maker, config, attention="sdpa"):
    """The model in float64, the same at every call, with attention that is not flat."""
    torch.manual_seed(0)
    model = maker.from_config(config, attn_implementation=attention)
    for param in model.parameters():
        if param.ndim > 1:
            nn.init.normal_(param, std=0.3)
    return model.double().eval()


def model_of(name, maker=AutoModel, attention="sdpa", **changes):
    return made(maker, config(name, **changes), attention)


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def with_tokens(*args, **kwargs):
    return hf_galore.add_register_tokens(model_of(*args, **kwargs), N, std=1.0)


def own(model):
    """The parameter with the tokens."""
    return next(param for path, param in model.named_parameters() if f"{CHILD}." in path)


@torch.no_grad()
def by_hand(model, tokens, pixels):
    """Hidden states after each block, with the tokens behind all others; and what the model makes of the last ones."""
    rows = model.embeddings(pixels)
    length = rows.shape[1]
    rows = torch.cat([rows, tokens.expand(len(rows), -1, -1)], 1)
    states = [rows[:, :length]]
    for block in find_blocks(model).values():
        rows = block(rows, None)
        states.append(rows[:, :length])
    final = (model.layernorm if hasattr(model, "layernorm") else model.post_layernorm)(states[-1])
    if hasattr(model, "head"):
        return states, final, model.head(final)
    return states, final, model.pooler(final) if hasattr(model, "pooler") else final[:, 0]


@pytest.mark.parametrize("name", TOKENS)
def test_computes_the_forward_pass_by_hand(name):
    model, pixels = with_tokens(name), images()
    states, final, pooled = by_hand(model_of(name), own(model).detach().view(N, -1), pixels)
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True)
    assert found.last_hidden_state.shape == (2, TOKENS[name], 32)
    torch.testing.assert_close(found.last_hidden_state, final, **EXACT)
    torch.testing.assert_close(found.pooler_output, pooled, **EXACT)
    for state, expected in zip(found.hidden_states[:-1], states[:-1], strict=True):
        torch.testing.assert_close(state, expected, **EXACT)
    with torch.no_grad():
        assert (found[0] - model_of(name)(pixels)[0]).abs().max() > 0.1
        assert torch.equal(model(pixels, return_dict=False)[0], found[0])


@pytest.mark.parametrize(
    ("name", "of_transformers"), [("dinov2", "dinov2_with_registers"), ("dinov3_vit", "dinov3_vit")]
)
def test_computes_what_transformers_models_with_registers_do(name, of_transformers):
    expected = made(AutoModel, config(of_transformers, num_register_tokens=N))
    without = {"num_register_tokens": 0} if name == of_transformers else {}
    model, pixels = with_tokens(name, **without), images()
    weights = expected.state_dict()
    registers = weights.pop("embeddings.register_tokens")
    if name == of_transformers:
        weights["embeddings.register_tokens"] = registers[:, :0]
    model.load_state_dict(weights | {f"embeddings.{CHILD}.tokens": registers.flatten()})
    with torch.no_grad():
        found, whole = model(pixels), expected(pixels).last_hidden_state
    torch.testing.assert_close(found.last_hidden_state, torch.cat([whole[:, :1], whole[:, 1 + N :]], 1), **EXACT)
    torch.testing.assert_close(found.pooler_output, whole[:, 0], **EXACT)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_heads_attention_weights_and_gradients(name):
    model, pixels = with_tokens(name, AutoModelForImageClassification, "eager"), images()
    out = model(pixels, output_attentions=True, labels=torch.tensor([0, 1]))
    assert {weights.shape for weights in out.attentions} == {(2, 4, TOKENS[name], TOKENS[name] + N)}
    out.loss.backward()
    gradient = own(model).grad.clone()
    assert gradient.view(N, -1).abs().amax(1).min() > 0
    model.train()
    checkpoint_activations(model, use_reentrant=True)
    model.zero_grad()
    model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    torch.testing.assert_close(own(model).grad, gradient, rtol=1e-10, atol=1e-12)


def test_copies_and_removal():
    model, pixels = with_tokens("vit"), images()
    plain, twin = model_of("vit"), copy.deepcopy(model)
    with torch.no_grad():
        expected = model(pixels)[0]
        own(twin).neg_()
        assert not torch.equal(twin(pixels)[0], expected)
        hf_galore.remove_register_tokens(twin)
        assert torch.equal(twin(pixels)[0], plain(pixels)[0])
        assert torch.equal(model(pixels)[0], expected)
    assert list(twin.state_dict()) == list(plain.state_dict())
    for module, other in zip(twin.modules(), plain.modules(), strict=True):
        assert set(vars(module)) == set(vars(other))
        assert len(module._forward_hooks) + len(module._forward_pre_hooks) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_have_them_are_named(name):
    changes, message = REFUSED[name]
    model = model_of(name, attention="eager", **changes)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        hf_galore.add_register_tokens(model)
    assert list(model.state_dict()) == before
    assert all(len(module._forward_hooks) + len(module._forward_pre_hooks) == 0 for module in model.modules())


def test_backbones_and_masks_are_refused():
    with pytest.raises(ValueError, match=r"Dinov2Backbone cannot have .* not one sequence of hidden states"):
        hf_galore.add_register_tokens(Dinov2Backbone(config("dinov2")))
    with pytest.raises(ValueError, match="attention_mask: register tokens in a vision transformer go with none"):
        with_tokens("vit")(images(), attention_mask=torch.ones(2, 17))
