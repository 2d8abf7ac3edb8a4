"""Exports of ternary models, as a process with transformers alone computes with them."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parts import slow
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hf_galore
from hf_galore.integrations import bitnet_proof
from hf_galore.integrations.bitnet import save_bitnet
from hf_galore.integrations.bitnet_export import LINEAR_CLASSES, Export, prepare, quantization_config
from hf_galore.integrations.bitnet_plain import plain_model
from hf_galore.integrations.bitnet_verify import compare, examine, expect
from hf_galore.nn.convert import bitlinears
from hf_galore.nn.functional import absmean_ternary
from hf_galore.nn.masters import round_masters

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(seed=0, **config):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | config))


def ternary(model, **options):
    """The model with BitLinear layers; biases and norms are no longer what they start as."""
    hf_galore.replace_linear(model, **options)
    for name, param in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            nn.init.normal_(param, mean=float("norm" in name), std=0.2)
    return model


def adapted():
    """A PeftModel whose output layer is a copy that peft trains."""
    peft = pytest.importorskip("peft")
    hf_galore.register()
    try:
        config = pytest.importorskip("hf_galore.integrations.peft_config").BitLinearConfig(
            target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
        )
        model = peft.get_peft_model(llama(), config)
    finally:
        hf_galore.unregister()
    nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    return model


def mixture():
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return ternary(MixtralForCausalLM(config), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


MODELS = {
    "fp32": lambda: ternary(llama()),
    "bf16": lambda: ternary(llama().bfloat16()),
    "bias": lambda: ternary(llama(attention_bias=True, mlp_bias=True)),
    "tied": lambda: ternary(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True))),
    "rows": lambda: ternary(llama(intermediate_size=90)),
    "norms": lambda: ternary(llama(), use_rms_norm=True, rms_norm_eps=1e-5),
    "sub_norms": lambda: ternary(llama(hidden_act="relu2", attention_bias=True), use_sub_norm=True),
    "mixture": mixture,
    "deep": lambda: ternary(llama(num_hidden_layers=16)),
    "adapter": adapted,
}
REFUSED = {("bias", "transformers-auto"), ("sub_norms", "transformers-auto")}  # biases
CASES = [(name, target) for name in MODELS for target in LINEAR_CLASSES if (name, target) not in REFUSED]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All cases written, and read by one process: what was expected and what was found."""
    folder = tmp_path_factory.mktemp("exports")
    expected = {}
    for name, target in CASES:
        torch.manual_seed(0)
        plain = plain_model(MODELS[name]())
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        export = prepare(plain, target, dtype)
        directory = folder / f"{name}-{target}"
        export.write(directory, "20KB" if name == "tied" else "50GB")
        expected[name, target] = expect(export, directory)
    return {case: (expected[case], found) for case, found in zip(CASES, examine(list(expected.values())), strict=True)}


@pytest.mark.parametrize(("name", "target"), CASES)
def test_transformers_computes_what_was_trained(outcomes, name, target):
    expected, found = outcomes[name, target]
    report = compare(expected, found)
    assert report.codes_equal
    if name == "deep":  # a rounding to 8 bits that goes the other way is one code, and grows from layer to layer
        assert report.relative_error <= 0.03
        assert report.top1 >= 0.9
        return
    assert report.top1 == 1
    assert report.relative_error <= 1e-3
    if name == "rows" and target != "online":
        assert 1e-4 < report.error_of_storing < 0.05  # activations of some layers are no longer rounded
    elif name == "bf16":
        assert report.error_of_storing <= 0.02
        assert report.error_as_loaded <= 0.05
    else:
        assert report.error_of_storing <= 1e-3
        assert torch.equal(found[1]["loaded"].argmax(-1), expected.training.argmax(-1))


def test_rows_that_4_does_not_divide_are_listed(outcomes):
    report = compare(*outcomes["rows", "transformers"])
    assert report.unconverted["model.layers.0.mlp.up_proj"] == "4 does not divide out_features=90"
    assert report.unconverted["lm_head"] == "not a BitLinear in the model"
    assert "model.layers.0.mlp.down_proj" in report.converted
    assert "model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj" in str(report)
    assert "model.layers.0.mlp.up_proj" in compare(*outcomes["rows", "online"]).converted


def test_large_models_are_split(outcomes):
    assert len(list(outcomes["tied", "transformers"][0].directory.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("target", LINEAR_CLASSES)
def test_packed_files_are_small(outcomes, target):
    (file,) = outcomes["fp32", target][0].directory.glob("*.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors = load_file(file)
    if target == "online":
        assert tensors[f"{name}.weight"].dtype == torch.float32
    else:
        assert tensors[f"{name}.weight"].shape == (24, 64)
        assert tensors[f"{name}.weight"].dtype == torch.uint8
        assert tensors[f"{name}.weight_scale"].shape == (1,)


def test_masters_rounded_to_bfloat16_keep_their_codes():
    layer = hf_galore.replace_linear(nn.Sequential(nn.Linear(256, 256)), ["0"])[0]
    codes, scale = layer.ternary()
    assert (absmean_ternary(layer.weight.bfloat16()).codes != codes).any()
    stored = round_masters(layer.weight, codes, torch.bfloat16)
    assert stored.dtype == torch.bfloat16
    assert torch.equal(absmean_ternary(stored).codes, codes)
    assert torch.allclose(absmean_ternary(stored).scale, scale, rtol=1e-3)
    assert ((stored.float() - layer.weight).abs() <= 2**-7 * layer.weight.abs()).all()  # one step of bfloat16


@pytest.mark.parametrize("damage", ["logits", "one token", "nan", "codes", "norm"])
def test_damage_is_found(outcomes, damage):
    expected, (digests, logits) = outcomes["fp32", "transformers"]
    wrong = json.loads(json.dumps(digests))
    if damage == "codes":
        wrong["codes"]["model.layers.0.mlp.up_proj"] = "0"
    elif damage == "norm":
        wrong["state"]["model.norm.weight"] = "0"
    else:
        loaded = logits["float32"].clone()
        if damage == "logits":
            loaded += 0.2 * loaded.std() * torch.randn_like(loaded)
        else:
            loaded[0, 0, loaded[0, 0].argmin()] = loaded[0, 0].max() + 0.1 if damage == "one token" else torch.nan
        logits = logits | {"float32": loaded}
    with pytest.raises(RuntimeError, match="other values" if damage in ("codes", "norm") else "something else"):
        compare(expected, (wrong, logits))


def test_the_proof_has_no_hf_galore(tmp_path):
    source = Path(bitnet_proof.__file__).read_text() + "\nimport hf_galore\n"
    (tmp_path / "none.json").write_text("[]")
    done = subprocess.run([sys.executable, "-c", source, "none.json"], cwd=tmp_path, capture_output=True, text=True)
    assert "ModuleNotFoundError: import of hf_galore halted" in done.stderr


def test_save_bitnet_proves_and_leaves_the_model_alone(tmp_path):
    model = ternary(llama()).train()
    model.model.layers[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    config = model.config.to_dict()
    report = save_bitnet(model, tmp_path / "new" / "ternary", dtype="bfloat16")
    assert report.codes_equal
    assert report.top1 == 1
    assert report.dtype == "bfloat16"
    assert "top-1 equal at 100.0% of positions" in str(report)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ternary"]
    files = {path.name for path in (tmp_path / "new" / "ternary").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    written = json.loads((tmp_path / "new" / "ternary" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["quantization_config"] == {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
        "use_rms_norm": False,
        "rms_norm_eps": 1e-6,
    }
    assert_unchanged(model, before, modes, config)


@pytest.mark.parametrize("process", [slow("another"), "the first"])
def test_a_failed_proof_leaves_nothing(tmp_path, monkeypatch, outcomes, process):
    """What the first process found in the same model was in the right sense."""
    model = ternary(llama()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    config = model.config.to_dict()
    write = Export.write

    def written_in_the_wrong_sense(export, directory, max_shard_size):
        write(export, directory, max_shard_size)
        tensors = load_file(directory / "model.safetensors")
        scales = {key: 1 / value for key, value in tensors.items() if key.endswith("weight_scale")}
        save_file(tensors | scales, directory / "model.safetensors", {"format": "pt"})

    if process == "another":
        monkeypatch.setattr(Export, "write", written_in_the_wrong_sense)
    else:
        digests, logits = outcomes["fp32", "transformers"][1]
        wrong = digests | {"state": dict.fromkeys(digests["state"], "0")}
        monkeypatch.setattr("hf_galore.integrations.bitnet.examine", lambda expected: [(wrong, logits)])
    with pytest.raises(RuntimeError, match="other values from the export, such as of '"):
        save_bitnet(model, tmp_path / "a" / "ternary")
    assert not list(tmp_path.iterdir())
    assert_unchanged(model, before, modes, config)


def assert_unchanged(model, before, modes, config):
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert modes == [module.training for module in model.modules()]
    assert model.config.to_dict() == config
    assert not any("ternary" in vars(layer) for layer in bitlinears(model).values())
    assert all(layer.quantize_activations for layer in bitlinears(model).values())


def test_names_that_end_as_a_converted_one_are_anchored():
    layer = SimpleNamespace(rms_norm=None)
    export = SimpleNamespace(
        target="online",
        converted=["blocks.0.fc"],
        unconverted={"fc": "", "lm_head": ""},
        shell=SimpleNamespace(),
        plain=SimpleNamespace(norms="none", layers={"blocks.0.fc": layer}),
    )
    assert quantization_config(export)["modules_to_not_convert"] == ["^fc$", "lm_head"]
