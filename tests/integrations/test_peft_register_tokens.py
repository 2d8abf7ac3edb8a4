"""Register tokens as a PEFT method: each behaviour of peft's own methods, in a decoder and in a vision transformer."""

import pytest
import torch
from attention_cases import inputs_of, model_of, outputs
from safetensors.torch import load_file
from trainer_cases import Run, assert_same, llama, weights
from version_cases import transformers_takes_peft

import hf_galore

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("ours")

HOMES = {"llama": "model", "gpt2": "transformer", "vit": "embeddings"}
every_model = pytest.mark.parametrize("name", HOMES)


def plain(name, dtype=torch.float32):
    return model_of(name, dtype=dtype)


def inputs(name):
    return {
        key: value.float() if value.is_floating_point() else value
        for key, value in inputs_of(name, padded=name != "vit").items()
    }


def adapted(name, dtype=torch.float32, **config):
    config = hf_galore.RegisterTokensConfig(**{"n_tokens": 2, "std": 1.0, **config})
    return peft.get_peft_model(plain(name, dtype), config).eval()


def tokens(model):
    return {path: param for path, param in model.named_parameters() if ".register_embeddings." in path}


@every_model
def test_it_computes_what_add_register_tokens_does_and_trains_nothing_else(name):
    model = adapted(name)
    ((path, param),) = tokens(model).items()
    assert path == f"base_model.model.{HOMES[name]}.bias_tokens.register_embeddings.default.tokens"
    assert [path] == [key for key, value in model.named_parameters() if value.requires_grad]
    assert model.get_nb_trainable_parameters()[0] == param.numel() == 2 * 32
    other = hf_galore.add_register_tokens(plain(name), 2)
    next(value for key, value in other.named_parameters() if "bias_tokens" in key).data.copy_(param)
    assert torch.equal(outputs(model, **inputs(name)), outputs(other, **inputs(name)))
    assert not torch.equal(outputs(model, **inputs(name)), outputs(plain(name), **inputs(name)))
    assert {value.dtype for value in tokens(adapted(name, torch.bfloat16)).values()} == {torch.float32}


@every_model
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_a_few_kilobytes_is_saved_and_loaded(name, low_cpu_mem_usage, tmp_path):
    model = adapted(name)
    expected = outputs(model, **inputs(name))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert file.stat().st_size < 2048
    assert len(load_file(file)) == 1
    loaded = peft.PeftModel.from_pretrained(plain(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(param.requires_grad for param in loaded.parameters())
    assert torch.equal(outputs(loaded, **inputs(name)), expected)


@transformers_takes_peft
@every_model
def test_transformers_own_methods_load_adapters(name, tmp_path):
    model = adapted(name)
    expected = outputs(model, **inputs(name))
    model.save_pretrained(tmp_path)
    of_transformers = plain(name)
    of_transformers.load_adapter(tmp_path)
    assert torch.equal(outputs(of_transformers, **inputs(name)), expected)
    of_transformers.load_adapter(tmp_path, "other")
    of_transformers.set_adapter("other")
    assert torch.equal(outputs(of_transformers, **inputs(name)), expected)
    of_transformers.disable_adapters()
    assert torch.equal(outputs(of_transformers, **inputs(name)), outputs(plain(name), **inputs(name)))


@every_model
def test_adapters_are_disabled_switched_deleted_and_unloaded(name):
    model, before = adapted(name), outputs(plain(name), **inputs(name))
    first = outputs(model, **inputs(name))
    with model.disable_adapter():
        assert torch.equal(outputs(model, **inputs(name)), before)
    model.add_adapter("other", hf_galore.RegisterTokensConfig(n_tokens=3, std=1.0))
    assert torch.equal(outputs(model, **inputs(name)), first)
    model.set_adapter("other")
    assert not torch.equal(outputs(model, **inputs(name)), first)
    assert [key for key, param in model.named_parameters() if param.requires_grad] == [
        f"base_model.model.{HOMES[name]}.bias_tokens.register_embeddings.other.tokens"
    ]
    with pytest.raises(ValueError, match="one set of register tokens is active at a time, not default, other"):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(outputs(model, **inputs(name)), first)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="register tokens are part of no weight of the model"):
            merge()
    assert torch.equal(outputs(model, **inputs(name)), first)
    unloaded = model.unload()
    assert torch.equal(outputs(unloaded, **inputs(name)), before)
    assert_same(weights(unloaded), weights(plain(name)))
    assert all(len(module._forward_hooks) + len(module._forward_pre_hooks) == 0 for module in unloaded.modules())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache):
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    model = adapted("llama")
    found = model.generate(**inputs("llama"), **settings, cache_implementation=cache)
    assert torch.equal(found, model.generate(**inputs("llama"), **settings, use_cache=False))
    with model.disable_adapter():
        found = model.generate(**inputs("llama"), **settings, cache_implementation=cache)
    assert torch.equal(found, plain("llama").generate(**inputs("llama"), **settings, use_cache=False))


def test_an_adapter_trains_alone_and_does_not_decay(tmp_path):
    model = peft.get_peft_model(llama(), hf_galore.RegisterTokensConfig(n_tokens=2, modules_to_save=["norm"]))
    before = weights(model)
    Run("adamw_torch", tmp_path).train(model, weight_decay=0.5, optim_target_modules=None)
    after = weights(model)
    moved = {path for path, value in after.items() if not torch.equal(value, before[path])}
    assert moved == {path for path, param in model.named_parameters() if param.requires_grad}
    assert set(tokens(model)) < moved


REFUSED = {
    "bert": (lambda: model_of("bert"), "BertForMaskedLM cannot have register tokens: tokens attend to later ones"),
    "no head": (lambda: model_of("llama").model, "LlamaModel: peft puts nothing on the model itself"),
    "second": (lambda: hf_galore.add_register_tokens(plain("llama")), "has register tokens already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_is_refused_stays_as_it_is(case):
    make, message = REFUSED[case]
    model = make()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, hf_galore.RegisterTokensConfig())
    assert list(model.state_dict()) == before


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="Invalid n_tokens: 0"):
        hf_galore.RegisterTokensConfig(n_tokens=0)
    with pytest.raises(TypeError, match="std='wide' is not a number"):
        hf_galore.RegisterTokensConfig(std="wide")
    hf_galore.unregister()
    with pytest.raises(RuntimeError, match="peft does not know RegisterTokensConfig yet"):
        hf_galore.RegisterTokensConfig()
