"""BitLinear as a PEFT method: each behaviour of peft's own methods, on each model."""

import copy
import pickle
import tempfile
from contextlib import nullcontext

import pytest
import torch
import transformers
from parts import in_part, slow
from safetensors.torch import load_file
from torch import nn
from trainer_cases import assert_same, build, llama, tokens, weights
from version_cases import transformers_takes_peft

import hf_galore
from hf_galore.nn.bitlinear import BitLinear
from hf_galore.nn.convert import bitlinears
from hf_galore.param_groups import all_linear

peft = pytest.importorskip("peft")
from hf_galore.integrations.peft import BitLinearConfig  # noqa: E402
from hf_galore.integrations.peft_layer import BitLinearLayer  # noqa: E402

pytestmark = pytest.mark.usefixtures("ours")

MODELS = {
    "llama-float32": llama,  # has biases
    "llama-bfloat16": lambda: llama(torch.bfloat16),
    "qwen2-float16": lambda: build(transformers.Qwen2Config, torch.float16, num_key_value_heads=2),
}
X = torch.stack([sample["input_ids"] for sample in tokens(2)])
TASK = "CAUSAL_LM"


@pytest.fixture(params=in_part(MODELS, "llama-float32", "qwen2-float16"))
def make(request):
    """Makes the same model each time."""
    return lambda: MODELS[request.param]().eval()


def adapted(model, **config):
    """The model with a fresh adapter."""
    return peft.get_peft_model(model, BitLinearConfig(task_type=TASK, **config)).eval()


def train(model, steps=2):
    """The model, after steps of AdamW, with an ε that float16 can hold."""
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2, eps=1e-4)
    for _ in range(steps):
        model(input_ids=X, labels=X).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=X).logits


def linears(model):
    """The paths of the linear layers, without the head."""
    return {path for path, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in path}


def base_names(model):
    """What trains, by its name in the base model."""
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


# What is put in.


def test_it_computes_what_replace_linear_makes(make):
    expected = logits(hf_galore.replace_linear(make()))
    assert torch.equal(logits(adapted(make())), expected)
    assert not torch.equal(logits(make()), expected)


def test_layers_are_the_modules_themselves_and_hold_no_second_weight(make):
    base = make()
    modules, state = dict(base.named_modules()), base.state_dict()
    model = adapted(base)
    layers = bitlinears(model.base_model.model)
    assert layers.keys() == linears(base)
    assert all(type(layer) is BitLinearLayer and layer is modules[path] for path, layer in layers.items())
    attention = [layers[f"model.layers.0.self_attn.{name}_proj"].shared for name in "qkv"]
    assert attention[0] is attention[1] is attention[2] is not None
    after = model.base_model.model.state_dict()
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in state.items()}
    train(model)
    logits(model)
    held = {value.numel() for layer in layers.values() for value in vars(layer).values() if torch.is_tensor(value)}
    assert held <= {1}


def test_what_trains_is_each_weight_and_bias_in_float32(make):
    base = make()
    expected = {name for name, _ in base.named_parameters() if name.rpartition(".")[0] in linears(base)}
    for autocast in (True, False):
        model = peft.get_peft_model(make(), BitLinearConfig(task_type=TASK), autocast_adapter_dtype=autocast)
        assert base_names(model) == expected
        assert {param.dtype for param in model.parameters() if param.requires_grad} == {torch.float32}
    frozen = {param.dtype for param in model.parameters() if not param.requires_grad}
    assert frozen == {base.lm_head.weight.dtype}
    assert logits(model).dtype == base.lm_head.weight.dtype


def test_peft_reports_on_it(make):
    model = adapted(make())
    status = model.get_model_status()
    trainable = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert (status.trainable_params, status.num_adapter_layers) == (trainable, len(linears(model.base_model.model)))
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert (status.requires_grad, status.devices) == ({"default": True}, {"default": ["cpu"]})
    model.set_requires_grad("default", False)
    assert not base_names(model)
    model.set_adapter("default")
    assert model.get_model_status().requires_grad == {"default": True}


TARGETS = {
    "names": ({"target_modules": ["q_proj", "down_proj"]}, {"q_proj", "down_proj"}, 4),
    "regex": ({"target_modules": r".*layers\.0\.mlp\..*_proj"}, {"gate_proj", "up_proj", "down_proj"}, 3),
    "excluded": ({"exclude_modules": ["mlp.gate_proj", "up_proj", "down_proj"]}, {f"{c}_proj" for c in "qkvo"}, 8),
    "layers": ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"q_proj"}, 1),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_are_matched_by_peft(case):
    config, leaves, count = TARGETS[case]
    paths = bitlinears(adapted(llama(), **config))
    assert ({path.rpartition(".")[2] for path in paths}, len(paths)) == (leaves, count)


@pytest.mark.parametrize(("option", "count"), [("use_rms_norm", 14), ("use_sub_norm", 4)])
def test_norms_train_and_are_saved(option, count, tmp_path):
    model = train(adapted(llama(), **{option: True}))
    norms = {name: param for name, param in model.named_parameters() if "rms_norm" in name}
    assert len(norms) == count
    assert not any(torch.equal(param, torch.ones_like(param)) for param in norms.values())
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), logits(model))
    assert_same(weights(model.unload()), weights(llama()))


def test_activations_may_stay_as_they_are():
    model = adapted(llama(), quantize_activations=False)
    assert torch.equal(logits(model), logits(hf_galore.replace_linear(llama(), quantize_activations=False)))


def test_layers_under_accelerates_hooks_are_ternary_and_come_out_again():
    hooks = pytest.importorskip("accelerate.hooks")
    base = llama().eval()
    for path in linears(base):
        hooks.add_hook_to_module(base.get_submodule(path), hooks.AlignDevicesHook(execution_device="cpu"))
    model = adapted(base)
    assert torch.equal(logits(model), logits(adapted(llama())))
    assert torch.equal(logits(train(model).unload()), logits(llama().eval()))


def test_it_can_be_compiled():
    model = adapted(llama())
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), logits(model))


# The original.


def test_a_disabled_adapter_is_the_original_bit_for_bit(make):
    original = logits(make())
    model = adapted(make())
    for _ in range(2):
        with model.disable_adapter(), model.disable_adapter():
            assert torch.equal(logits(model), original)
            assert not base_names(model)
        trained = logits(train(model))
        assert not torch.equal(trained, original)
    with model.disable_adapter():
        assert torch.equal(logits(model), original)
    assert torch.equal(logits(model), trained)
    assert base_names(model)


class Transposed(nn.Module):
    """Gives its layer tokens that are not contiguous, whose product torch rounds by whether the weight trains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(37, 29)

    def forward(self, x):
        return self.linear(x.mT)


@pytest.mark.parametrize("trains", [True, False])
def test_a_disabled_adapter_is_the_original_of_inputs_that_are_not_contiguous(trains):
    torch.manual_seed(0)
    model, x = Transposed().requires_grad_(trains), torch.randn(4, 37, 5)
    with torch.no_grad():
        original = model(x)
        adapter = peft.get_peft_model(model, BitLinearConfig(target_modules=["linear"]))
        with adapter.disable_adapter():
            assert torch.equal(adapter(x), original)


def test_unload_gives_the_original(make):
    model = train(adapted(make())).unload()
    assert_same(weights(model), weights(make()))
    assert {type(module) for module in model.modules()} == {type(module) for module in make().modules()}
    assert not hasattr(model, "peft_config")


def test_delete_adapter_gives_the_original_and_room_for_another(make):
    model = train(adapted(make()))
    model.delete_adapter("default")
    assert_same(weights(model.base_model.model), weights(make()))
    assert not bitlinears(model)
    assert torch.equal(logits(model.base_model), logits(make()))
    model.add_adapter("other", BitLinearConfig(task_type=TASK))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(adapted(make())))
    assert torch.equal(logits(train(model).unload()), logits(make()))


def test_an_adapter_that_is_not_active_does_not_act():
    model = train(adapted(llama()))
    model.base_model.set_adapter([])
    assert torch.equal(logits(model), logits(llama()))
    assert not base_names(model)
    assert not any(layer.quantized for layer in bitlinears(model).values())  # which the projected backward asks
    model.set_adapter("default", inference_mode=True)
    assert all(layer.quantized for layer in bitlinears(model).values())
    assert not torch.equal(logits(model), logits(llama()))
    assert not base_names(model)


def test_without_the_original_all_works_until_the_first_change(make):
    original = logits(make())
    model = adapted(make(), keep_original=False)
    with model.disable_adapter():
        assert torch.equal(logits(model), original)
    trained = logits(train(model))
    for undo in (lambda: model.disable_adapter().__enter__(), model.unload, lambda: model.delete_adapter("default")):
        with pytest.raises(ValueError, match=r"has changed and its original was not kept: .*keep_original=True"):
            undo()
    model.base_model.enable_adapter_layers()
    if "default" in model.peft_config:
        assert torch.equal(logits(model), trained)
    assert_same(weights(adapted(make(), keep_original=False).unload()), weights(make()))


def test_the_original_is_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = train(adapted(llama()))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    with pytest.raises(FileNotFoundError):
        adapted(llama())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_of_their_own(make, copied):
    model = train(adapted(make()))
    expected = logits(model)
    other = copied(model)
    assert torch.equal(logits(other), expected)
    assert not torch.equal(logits(train(other)), expected)
    assert torch.equal(logits(model), expected)
    del model
    with other.disable_adapter():
        assert torch.equal(logits(other), logits(make()))
    assert_same(weights(other.unload()), weights(make()))


# Saved and loaded.


@pytest.mark.parametrize(
    ("is_trainable", "low_cpu_mem_usage"), [(False, True), (True, False), slow(False, False), slow(True, True)]
)
def test_loaded_it_is_what_was_saved(make, is_trainable, low_cpu_mem_usage, tmp_path):
    model = train(adapted(make()))
    model.save_pretrained(tmp_path)
    options = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path, **options).eval()
    assert_same(weights(loaded), weights(model))
    assert torch.equal(logits(loaded), logits(model))
    assert base_names(loaded) == (base_names(model) if is_trainable else set())
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(make()))
    if is_trainable:
        assert not torch.equal(logits(train(loaded)), logits(model))


def test_the_file_has_what_trains_in_float32(make, tmp_path):
    model = adapted(make())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert_same(saved, {name: param.detach() for name, param in model.named_parameters() if param.requires_grad})
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(config) is BitLinearConfig
    assert set(config.target_modules) == linears(make())


def test_the_auto_classes_load_it(make, tmp_path):
    make().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = train(adapted(base))
    model.save_pretrained(tmp_path / "adapter")
    for auto in (peft.AutoPeftModelForCausalLM, transformers.AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(logits(loaded), logits(model))
        assert {layer.weight.dtype for layer in bitlinears(loaded).values()} == {torch.float32}


@transformers_takes_peft
def test_transformers_own_methods(make, tmp_path):
    model = make()
    model.add_adapter(BitLinearConfig())
    assert torch.equal(logits(train(model).eval()), logits(model))
    model.save_pretrained(tmp_path)
    loaded = make()
    loaded.load_adapter(tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert base_names(loaded) == base_names(model)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(make()))
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), logits(model))
    loaded.delete_adapter("default")
    assert_same(weights(loaded), weights(make()))
    loaded.add_adapter(BitLinearConfig(), "again")
    assert torch.equal(logits(loaded), logits(adapted(make())))


def test_modules_to_save(make, tmp_path):
    model = train(adapted(make(), modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make()))
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert not torch.equal(head, make().lm_head.weight)
    assert torch.equal(model.merge_and_unload().lm_head.weight, head)


def test_the_name_of_an_adapter_may_be_that_of_a_module(tmp_path):
    model = train(peft.get_peft_model(llama(), BitLinearConfig(task_type=TASK), adapter_name="q_proj"))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "q_proj", adapter_name="q_proj")
    assert_same(weights(loaded), weights(model))
    assert load_file(tmp_path / "q_proj" / "adapter_model.safetensors").keys() < weights(model).keys()


# Merged.


def ternary_of(weight):
    """Codes and scale of a weight, literally."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return torch.round(weight * (1 / scale)).clamp(-1, 1), scale


@pytest.mark.parametrize("kind", ["master", "dequantized"])
def test_merged_weights_are_those_that_were_trained(make, kind):
    model = train(adapted(make()))
    trained = {path: layer.weight.detach().clone() for path, layer in bitlinears(model.base_model.model).items()}
    biases = {
        path: layer.bias.detach()
        for path, layer in bitlinears(model.base_model.model).items()
        if layer.bias is not None
    }
    merged = model.merge_and_unload() if kind == "master" else model.merge_and_unload(weights=kind)
    assert {name: p.dtype for name, p in merged.named_parameters()} == {
        n: p.dtype for n, p in make().named_parameters()
    }
    assert {type(module) for module in merged.modules()} == {type(module) for module in make().modules()}
    for path, weight in trained.items():
        codes, scale = ternary_of(weight)
        layer = merged.get_submodule(path)
        assert torch.equal(layer.weight, (weight if kind == "master" else codes * scale).to(layer.weight.dtype))
        assert path not in biases or torch.equal(layer.bias, biases[path].to(layer.bias.dtype))
    assert not hasattr(merged, "peft_config")


def test_dequantized_weights_compute_what_the_layers_do():
    model = train(adapted(llama(), quantize_activations=False))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload(weights="dequantized")), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_are_those_of_transformers(dtype):
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    model = train(adapted(llama(dtype), use_sub_norm=True))
    layers = bitlinears(model.base_model.model)
    ternary = {path: ternary_of(layer.weight.detach()) for path, layer in layers.items()}
    expected = logits(model)
    packed = model.merge_and_unload(weights="packed")
    assert isinstance(packed, transformers.LlamaForCausalLM)
    for path, (codes, scale) in ternary.items():
        layer = packed.get_submodule(path)
        assert type(layer) is bitnet.BitLinear
        assert (layer.weight.dtype, layer.weight.shape) == (torch.uint8, (len(codes) // 4, codes.shape[1]))
        unpacked = torch.cat([(layer.weight >> 2 * i & 3).int() - 1 for i in range(4)])
        assert torch.equal(unpacked, codes.int())
        assert torch.equal(layer.weight_scale, (1 / scale).to(dtype).reshape(1))
    with torch.compiler.set_stance("force_eager"):
        actual = logits(packed)
    # In bfloat16 their scale and norm are rounded, so that roundings of activations may fall to the other side.
    eps = torch.finfo(dtype).eps
    assert (actual - expected).abs().max() <= 32 * eps * expected.abs().max() + (
        0.02 if dtype == torch.bfloat16 else 0
    )


UNPACKABLE = {
    "odd": (lambda: llama(intermediate_size=510), {}, r"layers\.0\.mlp\.gate_proj.*not divisible by 4"),
    "float16": (lambda: llama(torch.float16), {}, "are float16"),
    "activations": (llama, {"quantize_activations": False}, "do not quantize activations"),
}


@pytest.mark.parametrize("case", UNPACKABLE)
def test_what_cannot_be_packed_is_named(case):
    make, config, message = UNPACKABLE[case]
    model = adapted(make(), **config)
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(weights="packed")
    assert bitlinears(model)


def test_other_merges_are_refused():
    with pytest.raises(ValueError, match="weights='float' is not one of master, dequantized, packed"):
        adapted(llama()).merge_and_unload(weights="float")
    with pytest.raises(ValueError, match="o_proj' has an RMSNorm of its own"):
        adapted(llama(), use_sub_norm=True).merge_and_unload()


def test_a_merge_in_place_shows_ternary_weights_and_is_undone(make, tmp_path):
    model = train(adapted(make()))
    before, expected = weights(model), logits(model)
    model.merge_adapter()
    for layer in bitlinears(model).values():
        assert layer.weight.unique().numel() <= 3
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="is merged: call unmerge_adapter"):
        model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    assert_same(weights(model), before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make()))
    assert_same(weights(model), before)
    model.merge_adapter()
    assert_same(weights(model.merge_and_unload()), weights(copy.deepcopy(model).merge_and_unload()))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_refuses_what_is_not_finite(merge):
    model = adapted(llama())
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        getattr(model, merge)(safe_merge=True)


# Refused.


def test_a_second_adapter_is_refused_and_changes_nothing(make, tmp_path):
    model = train(adapted(make()))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    config = BitLinearConfig(task_type=TASK)
    for add in (
        lambda: model.add_adapter("second", config),
        lambda: model.add_adapter("second", BitLinearConfig(task_type=TASK, inference_mode=True, use_rms_norm=True)),
        lambda: model.load_adapter(tmp_path, "second", is_trainable=True),
    ):
        with pytest.raises(ValueError, match="the model has the adapter 'default' already"):
            add()
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), expected)


@transformers_takes_peft
def test_a_second_adapter_by_transformers_own_method_is_refused(make):
    plain = make()
    plain.add_adapter(BitLinearConfig())
    with (
        pytest.raises(ValueError, match="the model has the adapter 'default' already"),
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
    ):
        plain.add_adapter(BitLinearConfig(), "second")
    assert list(plain.peft_config) == ["default"]


def mixtral():
    return build(transformers.MixtralConfig, intermediate_size=64, num_key_value_heads=2, num_local_experts=2)


def gpt2():
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def of_four_bits():
    bnb = pytest.importorskip("bitsandbytes")
    model = llama()
    model.model.layers[0].mlp.up_proj = bnb.nn.Linear4bit(32, 512)
    return model


def offloaded():
    hooks = pytest.importorskip("accelerate.hooks")
    model = llama()
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True)
    hooks.add_hook_to_module(model.model.layers[0].mlp.up_proj, hook)
    return model


def with_a_forward_of_its_own():
    model = llama()
    model.model.layers[0].mlp.up_proj.forward = lambda x: x
    return model


def split_by_zero3():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.empty(0))
    return model


class Subclass(torch.Tensor):
    """As torchao's quantized weights, and DTensor."""


def of_a_tensor_subclass():
    model = llama()
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().as_subclass(Subclass))
    return model


REFUSED = {
    "ZeRO-3": (split_by_zero3, {}, "up_proj' is quantized or spread over ranks"),
    "tensor subclass": (of_a_tensor_subclass, {}, "up_proj' is quantized or spread over ranks"),
    "experts": (
        mixtral,
        {},
        r"mlp\.experts\.gate_up_proj' holds the experts of a mixture in one tensor.*Name the other",
    ),
    "Conv1D": (gpt2, {}, "is a Conv1D; its weight is transposed"),
    "activation": (llama, {"target_modules": r".*\.mlp\..*"}, "act_fn' is a SiLU"),
    "embeddings": (llama, {"target_modules": ["q_proj", "embed_tokens"]}, "is a Embedding"),
    "tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj", "lm_head"]},
        "'lm_head' has the weight of 'model.embed_tokens'",
    ),
    "4 bits": (of_four_bits, {}, "is a Linear4bit"),
    "offloaded": (offloaded, {}, "up_proj' is offloaded"),
    "forward": (with_a_forward_of_its_own, {}, "up_proj' has a forward method of its own"),
    "nothing": (llama, {"target_modules": ["qqq"]}, "qqq"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_is_refused_stays_as_it_is(case):
    make, config, message = REFUSED[case]
    model = make()
    types = [type(module) for module in model.modules()]
    before = weights(model) if case != "offloaded" else {}
    ties = pytest.warns(UserWarning, match="tie_word_embeddings") if case == "tied" else nullcontext()
    with ties, pytest.raises(ValueError, match=message):
        adapted(model, **config)
    assert [type(module) for module in model.modules()] == types
    assert not before or all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_the_other_layers_of_a_mixture_can_be_named(tmp_path):
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = train(adapted(mixtral(), target_modules=names))
    assert {path.rpartition(".")[2] for path in bitlinears(model)} == set(names)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(mixtral(), tmp_path)), logits(model))
    loaded = mixtral()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


ARGUMENTS = {
    "target_modules type": ({"target_modules": 3}, TypeError, "target_modules=3 must be 'all-linear', a regular"),
    "target_modules None": ({"target_modules": None}, TypeError, "target_modules=None must be"),
    "target_modules of": ({"target_modules": [1]}, TypeError, r"target_modules=\[1\] must be"),
    "target_modules empty": ({"target_modules": []}, ValueError, "names no modules"),
    "exclude_modules": ({"exclude_modules": 3}, TypeError, "exclude_modules=3 must be"),
    "quantize_activations": ({"quantize_activations": 8}, TypeError, "quantize_activations=8 is not True or False"),
    "keep_original": ({"keep_original": "disk"}, TypeError, "keep_original='disk' is not True or False"),
    "use_rms_norm": ({"use_rms_norm": None}, TypeError, "use_rms_norm=None"),
    "use_sub_norm": ({"use_sub_norm": 1}, TypeError, "use_sub_norm=1"),
    "both norms": ({"use_rms_norm": True, "use_sub_norm": True}, ValueError, "choose one"),
    "rms_norm_eps": ({"rms_norm_eps": -1.0}, ValueError, "rms_norm_eps: -1.0"),
    "rms_norm_eps type": ({"rms_norm_eps": "small"}, TypeError, "rms_norm_eps='small' is not a number"),
    "layers_to_transform": ({"layers_to_transform": [0]}, ValueError, "layers_to_transform goes with a list"),
    "layers_pattern": ({"layers_pattern": "h"}, ValueError, "layers_pattern goes with layers_to_transform"),
    "task_type": ({"task_type": "PAINT"}, ValueError, "Invalid task type"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_are_named(case):
    arguments, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        BitLinearConfig(**arguments)


# Registered.


def everything_in_peft():
    """What `register` could change."""
    mapping, kinds = peft.mapping, peft.PeftType
    tables = [vars(mapping)[name] for name in sorted(vars(mapping)) if name.startswith("PEFT_TYPE_TO")]
    inside = [kinds._member_names_, kinds._member_map_, kinds._value2member_map_]
    return [list(kinds), dict(vars(kinds)), *map(copy.copy, tables), *map(copy.copy, inside)]


def test_unregister_restores_peft_exactly():
    hf_galore.unregister()
    before = everything_in_peft()
    for _ in range(2):
        hf_galore.register()
        hf_galore.register()
        during = everything_in_peft()
        hf_galore.unregister()
        assert len(during[0]) == len(before[0]) + 3  # BitLinear, the attention bias, the register tokens
        assert everything_in_peft() == before
    hf_galore.unregister()
    with pytest.raises(RuntimeError, match=r"call hf_galore.register\(\) first"):
        BitLinearConfig()


def test_the_member_of_the_enumeration_is_one_like_the_others():
    kind = BitLinearConfig().peft_type
    assert kind is peft.PeftType("HF_GALORE_BITLINEAR") is peft.PeftType.HF_GALORE_BITLINEAR
    assert kind in list(peft.PeftType)
    assert (kind, str(kind)) == ("HF_GALORE_BITLINEAR", "PeftType.HF_GALORE_BITLINEAR")
    assert pickle.loads(pickle.dumps(kind)) is kind


def test_methods_of_peft_are_what_they_were():
    def lora():
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        return logits(peft.get_peft_model(llama().eval(), config))

    registered = lora()
    hf_galore.unregister()
    assert torch.equal(lora(), registered)


def test_lora_may_stand_on_ternary_layers():
    """peft wraps a BitLinearLayer as it does any nn.Linear; the model below computes with its codes."""
    model = hf_galore.replace_linear(llama().eval())
    expected = logits(model)
    with_lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert isinstance(with_lora.base_model.model.model.layers[0].self_attn.q_proj.base_layer, BitLinear)
    assert torch.equal(logits(with_lora), expected)


def test_a_layer_whose_weight_the_model_reads_stays_as_it_is():
    """FalconMamba reads that of its dt_proj: what is disabled is then the original model."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "state_size": 4, "time_step_rank": 2}
    model = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**shape)).eval()
    ids = torch.randint(0, 32, (1, 8))
    with torch.no_grad():
        original = model(input_ids=ids).logits
        with pytest.warns(UserWarning, match=r"reads the weight of 'backbone\.layers\.0\.mixer\.(x|dt)_proj'"):
            adapted = peft.get_peft_model(model, BitLinearConfig())
        ternary = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(input_ids=ids).logits, original)
    assert (ternary - original).abs().max() > 1e-3
    adapted.merge_and_unload(weights="packed")


def test_all_linear_leaves_out_what_all_linear_leaves_out():
    """The same layers as everywhere: not the head of a question answering model."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**shape))
    expected = all_linear(model)
    adapted = peft.get_peft_model(model, BitLinearConfig())
    assert set(bitlinears(adapted.get_base_model())) == expected
    assert "qa_outputs" not in expected
