"""The explicit attention bias as a PEFT method: each behaviour of peft's own methods."""

import copy

import pytest
import torch
from attention_cases import biases, disturb, inputs_of, model_of, outputs
from safetensors.torch import load_file
from trainer_cases import assert_same, weights
from version_cases import transformers_takes_peft

import hf_galore
from hf_galore.attention.bias import KINDS, STARTS

peft = pytest.importorskip("peft")
from hf_galore.integrations.peft_attention_bias import AttentionBiasConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("ours")

MODELS = ("llama", "gpt2")
VARIANTS = [(kind, start) for kind in KINDS for start in STARTS if (kind, start) != ("off_by_one", "random")]
every_model = pytest.mark.parametrize("name", MODELS)


def adapted(name, dtype=torch.float32, **config):
    """The model with a fresh adapter."""
    config = AttentionBiasConfig(task_type="CAUSAL_LM", **config)
    return peft.get_peft_model(model_of(name, dtype=dtype), config).eval()


def trained(name, **config):
    """The model with an adapter whose columns weigh as much as tokens."""
    model = adapted(name, **config)
    generator = torch.Generator().manual_seed(3)
    for param in model.parameters():
        if param.requires_grad:
            param.data.copy_(torch.randn(param.shape, generator=generator))
    return model


def same(model, name, expected=None, implementation="sdpa"):
    """Whether it computes what the architecture does, or the outputs that are given, bit for bit."""
    inputs = inputs_of(name, padded=name != "vit")
    expected = outputs(model_of(name, dtype=torch.float32), **inputs) if expected is None else expected
    return torch.equal(outputs(model, **inputs), expected)


@every_model
@pytest.mark.parametrize(("kind", "start"), VARIANTS)
def test_it_computes_what_add_attention_bias_does(name, kind, start):
    plain = hf_galore.add_attention_bias(model_of(name, dtype=torch.float32), kind=kind, start=start, n=2)
    disturb(plain)
    model = adapted(name, kind=kind, start=start, n=2)
    assert same(model, name) == (start == "noop")
    for path, module in biases(plain).items():
        model.base_model.model.get_submodule(path).kv_bias.kv_columns["default"].load_state_dict(
            module.kv_bias.state_dict()
        )
    assert same(model, name, outputs(plain, **inputs_of(name, padded=True)))


@every_model
def test_what_trains_is_the_columns_alone_in_float32(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(name, dtype)
        trains = {key: param for key, param in model.named_parameters() if param.requires_grad}
        assert all(".kv_bias.kv_columns.default." in key for key in trains)
        assert {key.rpartition(".")[2] for key in trains} == {"key", "value", "gate"}
        assert {param.dtype for param in trains.values()} == {torch.float32}
        assert outputs(model, **inputs_of(name)).dtype == dtype
    assert 0 < model.get_nb_trainable_parameters()[0] == sum(param.numel() for param in trains.values())


@every_model
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_a_few_kilobytes_is_saved_and_loaded(name, low_cpu_mem_usage, tmp_path):
    model = trained(name)
    expected = outputs(model, **inputs_of(name, padded=True))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert file.stat().st_size < 4096
    assert all(key.rpartition(".")[0].endswith("kv_bias.kv_columns") for key in load_file(file))
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = peft.PeftModel.from_pretrained(model_of(name, dtype=torch.float32), tmp_path, **options)
    assert not any(param.requires_grad for param in loaded.parameters())
    assert same(loaded, name, expected)


@transformers_takes_peft
@every_model
def test_transformers_own_methods_load_an_adapter(name, tmp_path):
    model = trained(name)
    expected = outputs(model, **inputs_of(name, padded=True))
    model.save_pretrained(tmp_path)
    of_transformers = model_of(name, dtype=torch.float32)
    of_transformers.load_adapter(tmp_path)
    assert same(of_transformers, name, expected)
    of_transformers.disable_adapters()
    assert same(of_transformers, name)


@every_model
def test_a_disabled_adapter_leaves_the_original(name):
    model = trained(name)
    expected = outputs(model, **inputs_of(name, padded=True))
    assert not same(model, name)
    with model.disable_adapter():
        assert same(model, name)
    assert same(model, name, expected)


@every_model
def test_unload_leaves_nothing(name):
    plain = model_of(name, dtype=torch.float32)
    model = trained(name).unload()
    assert type(model) is type(plain)
    assert same(model, name)
    assert_same(weights(model), weights(plain))
    assert not biases(model)
    assert [set(vars(m)) - {"_hf_peft_config_loaded"} for m in model.modules()] == [
        set(vars(m)) for m in plain.modules()
    ]
    again = peft.get_peft_model(model, AttentionBiasConfig())
    assert len(biases(again)) == 2


def test_adapters_are_switched_and_deleted():
    model, inputs = trained("llama"), inputs_of("llama", padded=True)
    first = outputs(model, **inputs)
    model.add_adapter(
        "sinks", AttentionBiasConfig(kind="sink_logits", start="random", target_modules=r".*layers\.1\.self_attn")
    )
    assert same(model, "llama", first)
    model.set_adapter("sinks")
    second = outputs(model, **inputs)
    assert not torch.equal(second, first)
    trains = [key for key, param in model.named_parameters() if param.requires_grad]
    assert trains == ["base_model.model.model.layers.1.self_attn.kv_bias.kv_columns.sinks.logit"]
    with pytest.raises(ValueError, match="one attention bias is active at a time, not default, sinks"):
        model.base_model.set_adapter(["default", "sinks"])
    model.set_adapter("default")
    assert same(model, "llama", first)
    model.delete_adapter("sinks")
    assert same(model, "llama", first)


def test_modules_to_save_are_saved_with_it(tmp_path):
    model = trained("llama", modules_to_save=["lm_head"])
    assert any("lm_head" in key for key, param in model.named_parameters() if param.requires_grad)
    expected = outputs(model, **inputs_of("llama", padded=True))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model_of("llama", dtype=torch.float32), tmp_path)
    assert same(loaded, "llama", expected)


TARGETS = {
    "all": ({}, {0, 1}),
    "names": ({"target_modules": ["self_attn"]}, {0, 1}),
    "expression": ({"target_modules": r".*\.1\.self_attn"}, {1}),
    "layers": ({"layers_to_transform": [0]}, {0}),
    "excluded": ({"exclude_modules": r".*\.0\..*"}, {1}),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_are_chosen_as_peft_does(case):
    config, layers = TARGETS[case]
    found = biases(adapted("llama", **config).base_model.model)
    assert set(found) == {f"model.layers.{layer}.self_attn" for layer in layers}


# Merging.


@pytest.mark.parametrize("n", [1, 3])
def test_learned_sinks_are_merged_into_native_ones(n):
    def make():
        base = model_of("gpt_oss", "eager", torch.float32)
        config = AttentionBiasConfig(kind="sink_logits", start="random", n=n, std=1.0)
        return peft.get_peft_model(base, config).eval()

    inputs, model = inputs_of("gpt_oss"), make()
    original, expected = outputs(model_of("gpt_oss", "eager", torch.float32), **inputs), outputs(model, **inputs)
    assert (expected - original).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, **inputs), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, **inputs), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model, **inputs), original)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, **inputs), expected, rtol=1e-5, atol=1e-5)
    assert not biases(merged)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_other_merges_are_refused_and_change_nothing(merge):
    cases = [
        ("llama", {}),
        ("llama", {"kind": "sink_logits", "start": "random"}),
        ("gpt_oss", {"kind": "sink_logits"}),
    ]
    for name, config in cases:
        base = model_of(name, "eager", torch.float32)
        model = peft.get_peft_model(base, AttentionBiasConfig(**config))
        expected = outputs(model, **inputs_of(name))
        with pytest.raises(ValueError, match="no weight of the model can hold it: only kind='sink_logits'"):
            getattr(model, merge)()
        assert torch.equal(outputs(model, **inputs_of(name)), expected)
        assert len(biases(model)) == 2


# Refused.


def with_a_bias():
    return hf_galore.add_attention_bias(model_of("llama"))


REFUSED = {
    "architecture": (
        lambda: model_of("bloom", "eager", torch.float32),
        {},
        "BloomForCausalLM computes",
    ),
    "no attention": (
        lambda: model_of("llama"),
        {"target_modules": ["mlp"]},
        r"\.mlp' is no attention",
    ),
    "nothing": (lambda: model_of("llama"), {"target_modules": ["qqq"]}, "qqq"),
    "second": (with_a_bias, {}, "has an attention bias already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_is_refused_stays_as_it_is(case):
    make, config, message = REFUSED[case]
    model = make()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, AttentionBiasConfig(**config))
    assert list(model.state_dict()) == before


ARGUMENTS = {
    "kind": ({"kind": "prefix"}, ValueError, "kind='prefix' is not one of"),
    "start": ({"start": "zero"}, ValueError, "start='zero' is not one of"),
    "n": ({"n": 0}, ValueError, "Invalid n: 0"),
    "std": ({"std": "wide"}, TypeError, "std='wide' is not a number"),
    "nothing trains": ({"kind": "off_by_one", "start": "random"}, ValueError, "has nothing to train"),
    "target_modules": ({"target_modules": 3}, TypeError, "target_modules=3 must be 'all-attention', a regular"),
    "empty": ({"target_modules": []}, ValueError, "names no modules: pass 'all-attention'"),
    "exclude_modules": ({"exclude_modules": [1]}, TypeError, "exclude_modules"),
    "layers_pattern": ({"layers_pattern": "h"}, ValueError, "layers_pattern goes with layers_to_transform"),
    "layers": ({"layers_to_transform": [0], "target_modules": ".*attn"}, ValueError, "layers_to_transform goes with"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_are_named(case):
    arguments, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        AttentionBiasConfig(**arguments)


def test_peft_knows_it_while_hf_galore_is_registered():
    assert AttentionBiasConfig().peft_type is peft.PeftType.HF_GALORE_ATTENTION_BIAS
    before = copy.copy(peft.PeftType._member_map_)
    hf_galore.unregister()
    ours = {"HF_GALORE_ATTENTION_BIAS", "HF_GALORE_BITLINEAR", "HF_GALORE_REGISTER_TOKENS"}
    assert set(before) - set(peft.PeftType._member_map_) == ours
    with pytest.raises(RuntimeError, match="peft does not know AttentionBiasConfig yet"):
        AttentionBiasConfig()
