"""Models with BitLinear in place of nn.Linear, and back."""

import copy

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from hf_galore import replace_linear, restore_linear
from hf_galore.nn.bitlinear import BitLinear
from hf_galore.nn.convert import bitlinears

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def model(config=transformers.LlamaConfig, **changes):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**SIZES | {"intermediate_size": 48} | changes))


def test_targets_become_bitlinear_and_nothing_else_changes():
    one = model()
    before, modules = copy.deepcopy(one.state_dict()), dict(one.named_modules())
    assert replace_linear(one) is one
    assert set(bitlinears(one)) == {name for name, m in modules.items() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert dict(one.named_modules()) == modules  # the same objects
    assert list(one.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert len(bitlinears(replace_linear(model(), ["q_proj", r".*\.0\.mlp\..*"]))) == 2 + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_and_back_bit_for_bit(dtype):
    one, ids = model().to(dtype), torch.arange(12)[None]
    before, logits = copy.deepcopy(one), one(ids).logits
    replace_linear(one)
    assert all(layer.weight.dtype == torch.float32 for layer in bitlinears(one).values())
    assert not torch.equal(one(ids).logits, logits)
    assert restore_linear(one) is one
    assert {name: type(m) for name, m in one.named_modules()} == {name: type(m) for name, m in before.named_modules()}
    assert all(vars(m).keys() == vars(before.get_submodule(name)).keys() for name, m in one.named_modules())
    assert torch.equal(one(ids).logits, logits)


def test_dequantized_weights_are_what_the_model_computed_with():
    one, ids = replace_linear(model(), quantize_activations=False), torch.arange(12)[None]
    logits = one(ids).logits
    weight = restore_linear(one, "dequantized").model.layers[0].mlp.up_proj.weight
    assert len(weight.unique()) == 3
    assert torch.allclose(one(ids).logits, logits, atol=1e-5)


def test_layers_with_hooks_of_accelerate_are_quantized_too():
    one, ids = model(), torch.arange(12)[None]
    logits, ternary = one(ids).logits, replace_linear(copy.deepcopy(one))(ids).logits
    for module in one.modules():
        add_hook_to_module(module, ModelHook())
    assert torch.equal(replace_linear(one)(ids).logits, ternary)
    assert torch.equal(restore_linear(one)(ids).logits, logits)


@pytest.mark.parametrize(("option", "normed"), [("use_rms_norm", 7), ("use_sub_norm", 2)])
def test_norms_stand_before_all_or_some(option, normed):
    one = replace_linear(model(), **{option: True})
    names = {name.rpartition(".")[2] for name, layer in bitlinears(one).items() if layer.rms_norm is not None}
    assert len(names) == normed
    assert normed == 7 or names == {"o_proj", "down_proj"}
    assert "model.layers.1.mlp.down_proj.rms_norm.weight" in one.state_dict()
    with pytest.raises(ValueError, match="has an RMSNorm of its own"):
        restore_linear(one)


def test_layers_with_one_input_quantize_it_once(monkeypatch):
    import hf_galore.nn.bitlinear as alone
    import hf_galore.nn.shared_activations as shared
    from hf_galore.nn.functional import absmax_int8

    calls = []
    for module in (alone, shared):
        monkeypatch.setattr(module, "absmax_int8", lambda x: calls.append(x.shape) or absmax_int8(x))
    replace_linear(model())(torch.arange(12)[None])
    assert len(calls) == 2 * 4  # q/k/v, o, gate/up, down


def tied():
    """Two layers with one weight."""
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers[1].weight = layers[0].weight
    return layers


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        (lambda: model(transformers.GPT2Config, n_embd=32), {}, "is a Conv1D; its weight is transposed; BitLinear"),
        (
            lambda: model(transformers.MixtralConfig, num_local_experts=2, num_key_value_heads=2),
            {},
            r"experts.*in one tensor.*Name the other layers, such as \['q_proj'",
        ),
        (lambda: replace_linear(model()), {}, "is a BitLinear already"),
        (tied, {}, "'0' has the weight of '1', which would not be ternary"),
        (model, {"target_modules": "nothing_like_it"}, "'nothing_like_it' matches no module; near matches"),
        (model, {"use_rms_norm": True, "use_sub_norm": True}, "use_rms_norm .* use_sub_norm .*choose one"),
    ],
)
def test_what_cannot_be_ternary_is_refused_and_left_alone(make, arguments, match):
    one = make()
    before = {name: type(m) for name, m in one.named_modules()}
    with pytest.raises(ValueError, match=match):
        replace_linear(one, **arguments)
    assert {name: type(m) for name, m in one.named_modules()} == before


def test_a_bad_way_back_is_refused():
    with pytest.raises(ValueError, match="weights='packed' is not one of master, dequantized"):
        restore_linear(replace_linear(model()), "packed")


def test_a_bitlinear_of_its_own_trains():
    one = nn.Sequential(BitLinear(16, 32), nn.Tanh(), BitLinear(32, 1))
    optimizer, x = torch.optim.AdamW(one.parameters(), lr=0.01), torch.randn(64, 16)
    target = x[:, :1] * 2
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append((one(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
