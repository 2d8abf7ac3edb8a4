"""load_bitnet: each convention comes back with its codes and its scales, and trains on."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import hf_galore
from hf_galore.integrations.bitnet import load_bitnet, save_bitnet
from hf_galore.integrations.bitnet_export import LINEAR_CLASSES
from hf_galore.nn.convert import bitlinears
from hf_galore.nn.functional import Ternary, absmean_ternary
from hf_galore.nn.masters import masters_of
from hf_galore.nn.packing import unpack_ternary

TOKENS = torch.arange(24).view(2, 12)
UNIT = 2**-23  # the spacing of float32 next to 1


def llama(dtype=torch.float32, bias=False, **options):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=bias)).to(dtype)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param)
    return hf_galore.replace_linear(model, **options)


def edit(directory, tensors=lambda stored: stored, **quantization):
    """Rewrites a checkpoint, as others may have written theirs."""
    file = directory / "model.safetensors"
    save_file(tensors(load_file(file)), file, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= quantization
    (directory / "config.json").write_text(json.dumps(config))


def scaled(function):
    return lambda stored: {k: function(v) if k.endswith("weight_scale") else v for k, v in stored.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", LINEAR_CLASSES)
def test_round_trip(tmp_path, caplog, target, dtype):
    model = llama(dtype).eval()
    save_bitnet(model, tmp_path / "out", target, verify=False)
    with caplog.at_level(logging.INFO, "hf_galore"):
        loaded = load_bitnet(tmp_path / "out").eval()
    stored = "float weights" if target == "online" else "packed codes and weight_scale = "
    assert f"14 layers, {stored}" in caplog.text
    assert loaded.dtype == dtype
    layers = bitlinears(loaded)
    for path, layer in bitlinears(model).items():
        assert torch.equal(layers[path].ternary().codes, layer.ternary().codes)
        tolerance = UNIT if dtype == torch.float32 else 2**-8
        assert torch.allclose(layers[path].ternary().scale, layer.ternary().scale, rtol=tolerance, atol=0)
        assert layers[path].weight.dtype == torch.float32
        assert layers[path].weight.requires_grad
        assert layers[path].original_dtype == dtype
        if target == "online":
            assert torch.equal(layers[path].weight, layer.weight.to(dtype).float())
    if dtype == torch.float32:
        assert torch.allclose(loaded(TOKENS).logits, model(TOKENS).logits, atol=1e-5)


def test_what_is_loaded_trains_and_is_saved_as_any_model(tmp_path):
    save_bitnet(llama(), tmp_path / "out", verify=False)
    model = load_bitnet(tmp_path / "out")
    assert not hasattr(model.config, "quantization_config")
    assert getattr(model, "hf_quantizer", None) is None
    before = {path: layer.ternary().codes for path, layer in bitlinears(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((layer.ternary().codes != before[path]).any() for path, layer in bitlinears(model).items())
    model.save_pretrained(tmp_path / "masters")
    assert load_file(tmp_path / "masters" / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize("target", ["transformers", "transformers-auto"])
def test_what_is_loaded_is_exported_as_it_was(tmp_path, target):
    save_bitnet(llama(), tmp_path / "a", target, verify=False)
    save_bitnet(load_bitnet(tmp_path / "a"), tmp_path / "b", target, verify=False)
    first, second = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(second[key], value) or key.endswith("weight_scale")
        assert torch.allclose(second[key].float(), value.float(), rtol=2 * UNIT, atol=0)


@pytest.mark.parametrize("options", [{"use_rms_norm": True, "rms_norm_eps": 1e-5}, {"use_sub_norm": True}])
def test_norms_come_back(tmp_path, options):
    model = llama(**options).eval()
    for layer in bitlinears(model).values():
        if layer.rms_norm is not None:
            torch.nn.init.uniform_(layer.rms_norm.weight)
    save_bitnet(model, tmp_path / "out", verify=False)
    loaded = load_bitnet(tmp_path / "out").eval()
    assert torch.allclose(loaded(TOKENS).logits, model(TOKENS).logits, atol=1e-5)


def test_a_scale_in_the_other_sense_has_to_be_named(tmp_path):
    model = llama().eval()
    save_bitnet(model, tmp_path / "out", verify=False)
    edit(tmp_path / "out", scaled(lambda scale: 1 / scale))
    with pytest.raises(ValueError, match=r"weight_scale: its median is .* Say what it is"):
        load_bitnet(tmp_path / "out")
    loaded = load_bitnet(tmp_path / "out", weight_scale="absmean").eval()
    assert torch.allclose(loaded(TOKENS).logits, model(TOKENS).logits, atol=1e-5)
    with pytest.raises(ValueError, match="weight_scale='s' is not one of absmean, inverse"):
        load_bitnet(tmp_path / "out", weight_scale="s")


def test_large_scales_of_autobitlinear_are_taken_as_they_are(tmp_path):
    save_bitnet(llama(), tmp_path / "out", "transformers-auto", verify=False)
    edit(tmp_path / "out", scaled(lambda scale: torch.full_like(scale, 1.5)))  # about what microsoft's model has
    layers = bitlinears(load_bitnet(tmp_path / "out"))
    assert all(
        torch.allclose(layer.ternary().scale, torch.tensor(1.5), rtol=UNIT, atol=0) for layer in layers.values()
    )


def test_biases_that_transformers_multiplies_are_what_it_makes_of_them(tmp_path):
    save_bitnet(llama(bias=True), tmp_path / "out", verify=False)
    edit(tmp_path / "out", scaled(lambda scale: 1 / scale), linear_class="autobitlinear")
    with torch.compiler.set_stance("force_eager"):  # theirs is compiled, which takes long and changes nothing
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()(TOKENS).logits
    loaded = load_bitnet(tmp_path / "out").eval()
    assert torch.allclose(loaded(TOKENS).logits, theirs, atol=1e-5)


def test_other_checkpoints_are_refused(tmp_path):
    hf_galore.restore_linear(llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no BitNet checkpoint; from_pretrained loads it"):
        load_bitnet(tmp_path)


@pytest.mark.parametrize("shape", [(4, 4), (12, 20), (96, 64), (256, 640)])
@pytest.mark.parametrize("scale", [2e-5, 0.0173, 1.5])
def test_masters_are_rounded_to_the_codes_and_the_scale(shape, scale):
    codes = unpack_ternary(torch.randint(0, 170, (shape[0] // 4, shape[1])).to(torch.uint8)).clamp(max=1)
    made = absmean_ternary(masters_of(Ternary(codes, torch.tensor(scale))))
    assert torch.equal(made.codes, codes)
    assert torch.allclose(made.scale, torch.tensor(scale), rtol=2 * UNIT, atol=0)


@pytest.mark.parametrize("value", [0, 1])
def test_masters_of_one_code_alone(value):
    codes = torch.full((8, 12), value, dtype=torch.int8)
    made = absmean_ternary(masters_of(Ternary(codes, torch.tensor(0.02))))
    assert torch.equal(made.codes, codes)
