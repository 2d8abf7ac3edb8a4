"""What save_bitnet does not export, and its messages."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen3Config, Qwen3ForCausalLM

import hf_galore
from hf_galore.integrations.bitnet import save_bitnet
from hf_galore.nn.convert import bitlinears
from hf_galore.nn.functional import dequantize

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def ternary(model=LlamaForCausalLM, config=None, **options):
    return hf_galore.replace_linear(model(config or LlamaConfig(**SIZES)), **options)


def with_layer(**attributes):
    model = ternary()
    for name, value in attributes.items():
        setattr(model.model.layers[0].mlp.up_proj, name, value)
    return model


def dequantized():
    model = ternary()
    for layer in bitlinears(model).values():
        layer.weight = nn.Parameter(dequantize(layer.ternary(), torch.float32))
    return model


def untied():
    model = ternary(config=LlamaConfig(**SIZES, tie_word_embeddings=True))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    return model


def with_a_part_more():
    model = ternary()
    model.model.layers[0].extra = nn.Linear(2, 2)
    return model


def partly_normed():
    model = ternary(target_modules=["up_proj"], use_rms_norm=True)
    return hf_galore.replace_linear(model, ["gate_proj"])


SUB = {"use_sub_norm": True}
CASES = {
    "target": (
        ternary,
        {"target": "ggml"},
        "target='ggml' is not one of transformers, .*, gguf",
    ),
    "float16": (ternary, {"dtype": torch.float16}, "dtype=float16 is not one of float32, bfloat16"),
    "float16 model": (
        lambda: hf_galore.replace_linear(LlamaForCausalLM(LlamaConfig(**SIZES)).half()),
        {},
        "dtype=float16 is not one of float32, bfloat16",
    ),
    "plain": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), {}, "no BitLinear layers to export"),
    "no head": (lambda: ternary(LlamaModel), {}, "LlamaModel has no layer for logits"),
    "bias": (
        lambda: ternary(config=LlamaConfig(**SIZES, mlp_bias=True)),
        {"target": "transformers-auto"},
        "'transformers-auto': .* has a bias.*choose target='transformers' or 'online'",
    ),
    "weight λ": (lambda: with_layer(weight_lambda=0.5), {}, "up_proj' has weight_lambda=0.5, activation_lambda=1.0"),
    "activation λ": (lambda: with_layer(activation_lambda=0.0), {}, "activation_lambda=0.0"),
    "activations": (lambda: ternary(quantize_activations=False), {}, "has quantize_activations=False"),
    "off": (lambda: with_layer(quantized=False), {}, "up_proj' is switched off or merged"),
    "dequantized": (dequantized, {}, "holds only -c, 0 and c"),
    "untied": (untied, {}, "'lm_head.weight' to 'model.embed_tokens.weight', but they differ"),
    "more": (with_a_part_more, {}, "LlamaForCausalLM has no 'model.layers.0.extra"),
    "some norms": (partly_normed, {}, "some of its BitLinear layers have an RMSNorm of their own"),
    "norm and rows": (
        lambda: ternary(config=LlamaConfig(**SIZES | {"intermediate_size": 18}), use_rms_norm=True),
        {},
        "stored as nn.Linear.*no place for its RMSNorm; choose target='online'",
    ),
    "SubLN of another architecture": (
        lambda: ternary(Qwen3ForCausalLM, Qwen3Config(**SIZES), **SUB),
        {},
        "its architecture is qwen3",
    ),
    "SubLN, mlp_bias": (lambda: ternary(config=LlamaConfig(**SIZES, mlp_bias=True), **SUB), {}, "mlp_bias"),
    "SubLN, eps": (lambda: ternary(rms_norm_eps=1e-3, **SUB), {}, r"eps of its norms is not config\.rms_norm_eps"),
    "SubLN, some": (
        lambda: ternary(config=LlamaConfig(**SIZES), target_modules=["up_proj", "down_proj"], **SUB),
        {},
        "not every o_proj and down_proj is a BitLinear",
    ),
    "SubLN, heads": (lambda: ternary(config=LlamaConfig(**SIZES, head_dim=16), **SUB), {}, "not as wide as"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case, tmp_path):
    make, arguments, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        save_bitnet(make(), tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Sequential is neither a PreTrainedModel nor a PeftModel"):
        save_bitnet(hf_galore.replace_linear(nn.Sequential(nn.Linear(4, 4)), ["0"]), tmp_path / "out")


def test_directories_with_files_are_refused(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_bitnet(ternary(), tmp_path, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_empty_directories_are_taken(tmp_path):
    (tmp_path / "out").mkdir()
    report = save_bitnet(ternary(), tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert report.top1 is None
    assert str(report).endswith("not verified")


def test_a_lost_import_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_galore.integrations.bitnet_verify.sys.executable", "false")
    with pytest.raises(RuntimeError, match="cannot load the export"):
        save_bitnet(ternary(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
