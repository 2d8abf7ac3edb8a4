"""The explicit attention bias: each behaviour on each architecture, against the paper's formula written out."""

import copy

import pytest
import sweep_models
import torch
import transformers
from attention_cases import (
    DECODERS,
    EAGER_ALONE,
    ENCODERS,
    LENGTH,
    UNREACHABLE,
    biases,
    disturb,
    inputs_of,
    literal_attention,
    model_of,
    outputs,
)
from parts import slow
from torch.nn.attention import flex_attention
from transformers import AttentionInterface, DynamicCache, StaticCache
from version_cases import with_cache

import hf_galore
from hf_galore.attention.bias import KINDS, STARTS, Columns
from hf_galore.integrations import attention
from hf_galore.integrations import attention_bias_kernels as kernels
from hf_galore.integrations.attention_modules import attention_modules

pytestmark = pytest.mark.usefixtures("ours")

# Every rounding of the float64 computation, through two layers of weights of the order of one.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# transformers' eager functions take the softmax in float32.
EAGER = {"rtol": 2e-5, "atol": 2e-5}

BOTH = [(name, implementation) for name in (*DECODERS, *ENCODERS) for implementation in ("eager", "sdpa")]
ALL = [*BOTH, *((name, "eager") for name in EAGER_ALONE)]
VARIANTS = [(kind, start, n) for kind in KINDS for start in STARTS for n in (1, 3)]


def biased(name, implementation="sdpa", **options):
    """The model with columns that weigh as much as tokens."""
    model = hf_galore.add_attention_bias(model_of(name, implementation), **{"start": "random", **options})
    disturb(model)
    return model


def literally(name, model, inputs):
    """The outputs of the architecture with the columns of `model`, each head computed as the paper writes it."""
    plain = model_of(name, "eager")
    columns = {plain.get_submodule(path): module.kv_bias for path, module in biases(model).items()}
    with literal_attention(columns) as literal:
        plain.set_attn_implementation(literal)
        return outputs(plain, **inputs)


def gradients(model, **inputs):
    """Of a sum over the outputs, by the names of the parameters."""
    model.zero_grad()
    out = model(**inputs)[0]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


# The model as it was.


# float64 is not among the dtypes: there transformers' eager gives rows that see nothing, as pads do, NaN.
NOOP = [(name, implementation, torch.float32) for name, implementation in ALL]
NOOP += [(name, implementation, torch.bfloat16) for name in ("mistral", "opt") for implementation in ("eager", "sdpa")]


@pytest.mark.parametrize(("name", "implementation", "dtype"), NOOP)
def test_at_the_noop_start_the_model_is_the_original_bit_for_bit(name, implementation, dtype):
    plain, model = model_of(name, implementation, dtype), model_of(name, implementation, dtype)
    hf_galore.add_attention_bias(model, n=2)
    assert len(biases(model)) == 2
    for padded in (False, True):
        inputs = inputs_of(name, padded and name != "vit")
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        assert torch.equal(outputs(model, **inputs), outputs(plain, **inputs))
    after = gradients(model, **inputs)
    assert all(torch.equal(after[key], value) for key, value in gradients(plain, **inputs).items())
    for path in biases(model):
        assert after[f"{path}.kv_bias.gate"].abs().min() > 0
        assert not after[f"{path}.kv_bias.key"].any()  # until the gate has moved


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_removal_leaves_nothing(name):
    model, inputs = model_of(name), inputs_of(name)
    expected, keys = outputs(model, **inputs), list(model.state_dict())
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    hf_galore.add_attention_bias(model, start="random")
    assert not torch.equal(outputs(model, **inputs), expected)
    assert hf_galore.remove_attention_bias(model) is model
    assert torch.equal(outputs(model, **inputs), expected)
    assert list(model.state_dict()) == keys
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    with pytest.raises(ValueError, match="has no attention bias"):
        hf_galore.remove_attention_bias(model)


# The formula.


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_sdpa_computes_the_formula(name):
    model, plain = biased(name, n=2), model_of(name)
    for padded in (False, True):
        inputs = inputs_of(name, padded and name != "vit")
        expected = literally(name, model, inputs)
        seen = inputs.get("attention_mask", torch.ones(expected.shape[:2])).bool()
        torch.testing.assert_close(outputs(model, **inputs)[seen], expected[seen], **EXACT)
        assert (expected - outputs(plain, **inputs))[seen].abs().max() > 0.1


@pytest.mark.parametrize("name", [*DECODERS, *EAGER_ALONE, *ENCODERS])
def test_eager_computes_the_formula(name):
    model, inputs = biased(name, "eager", n=2), inputs_of(name)
    torch.testing.assert_close(outputs(model, **inputs), literally(name, model, inputs), **EAGER)


@pytest.mark.parametrize(
    ("name", "kind", "start", "n"),
    [
        (name, *variant) if name == "mistral" or variant[2] == 3 else slow(name, *variant)
        for name in ("mistral", "gpt2", "deepseek_v3")
        for variant in VARIANTS
    ],
)
def test_every_variant_computes_its_formula(name, kind, start, n):
    model = biased(name, kind=kind, start=start, n=n)
    for padded in (False, True):
        inputs = inputs_of(name, padded)
        seen = inputs.get("attention_mask", torch.ones(2, LENGTH)).bool()
        expected = literally(name, model, inputs)[seen]
        torch.testing.assert_close(outputs(model, **inputs)[seen], expected, **EXACT)
    inputs = inputs_of(name)
    expected = literally(name, model, inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(outputs(model, **inputs), expected, **EAGER)


@pytest.mark.parametrize(("kind", "start", "n"), VARIANTS)
def test_the_gradients_are_those_of_the_formula(kind, start, n):
    """Of all parameters, the columns' own and the model's: torch differentiates the literal heads."""
    model, inputs = biased("mistral", kind=kind, start=start, n=n), inputs_of("mistral", padded=True)
    inputs["attention_mask"][:, :3] = 1  # every query sees a token: transformers and torch differ about the others
    inputs["attention_mask"][0, 5] = 0
    actual = gradients(model, **inputs)
    reference = copy.deepcopy(model)
    columns = {}
    for module in biases(reference).values():
        columns[module] = module.kv_bias
        attention.remove_hook(module, *getattr(module, attention._HOOKS))
    with literal_attention(columns) as literal:
        reference.set_attn_implementation(literal)
        expected = gradients(reference, **inputs)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-10, atol=1e-12 * max(1.0, value.abs().max().item()))


def test_one_column_is_a_prefix_of_one_token():
    """peft's prefix tuning holds the same k', v' in the cache, where it takes a position: ours are shifted by hand."""
    peft = pytest.importorskip("peft")
    inputs = inputs_of("llama")
    model = biased("llama")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    prefix = peft.get_peft_model(model_of("llama"), config).eval().double()
    flat = (
        [m.kv_bias.key.view(2, 8) for m in biases(model).values()],
        [m.kv_bias.value for m in biases(model).values()],
    )
    rows = torch.stack([torch.stack([key, value.view(2, 8)]) for key, value in zip(*flat, strict=True)])
    prefix.prompt_encoder["default"].embedding.weight.data.copy_(rows.reshape(1, -1))
    positions = torch.arange(1, LENGTH + 1).expand(2, -1)
    expected = outputs(prefix, **inputs, attention_mask=torch.ones(2, LENGTH, dtype=torch.long))
    torch.testing.assert_close(outputs(model, **inputs, position_ids=positions), expected, **EXACT)


# Generation.


@pytest.mark.parametrize(("implementation", "start"), [("eager", "random"), ("sdpa", "noop"), ("sdpa", "random")])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_tokens_one_by_one_give_what_all_at_once_do(name, cache, start, implementation):
    tolerance = EXACT if implementation == "sdpa" else EAGER
    model, ids = biased(name, implementation, start=start, n=2), inputs_of(name)["input_ids"]
    expected = outputs(model, input_ids=ids)
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=20)
    actual = [outputs(model, input_ids=ids[:, :5], **with_cache(model, past))]
    actual += [outputs(model, input_ids=ids[:, t : t + 1], **with_cache(model, past)) for t in range(5, LENGTH)]
    torch.testing.assert_close(torch.cat(actual, 1), expected, **tolerance)
    assert past.get_seq_length() == LENGTH  # columns take no slot


GENERATED = [*((name, "dynamic") for name in DECODERS), *((name, "static") for name in ("llama", "gemma3", "gpt2"))]


@pytest.mark.parametrize(("name", "cache"), GENERATED)
def test_generate_goes_on_as_recomputation_does(name, cache):
    model, inputs = biased(name), inputs_of(name, padded=True)
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    made = model.generate(**inputs, **settings, cache_implementation=cache)
    again = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(made, again)


@pytest.mark.parametrize("name", ["mistral", "gpt_neox", "opt", "qwen3_moe"])
def test_left_padded_rows_are_the_rows_alone(name):
    model, inputs = biased(name), inputs_of(name, padded=True)
    together = model.generate(**inputs, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    alone = model.generate(input_ids=inputs["input_ids"][:1, 3:], do_sample=False, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(together[0, 3:], alone[0])


# Training, compiling.


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant, implementation):
    model, inputs = biased("mistral", implementation, start="noop").train(), inputs_of("mistral")
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients(model, **inputs)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.parametrize(("start", "implementation"), [("noop", "sdpa"), slow("random", "eager")])
def test_it_compiles_into_one_graph(start, implementation):
    model, inputs = biased("llama", implementation, start=start), inputs_of("llama")
    expected, of_parameters = outputs(model, **inputs), gradients(model, **inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled, **inputs), expected, **EXACT)
    for key, value in gradients(compiled, **inputs).items():
        torch.testing.assert_close(value, of_parameters[key.removeprefix("_orig_mod.")], **EXACT)


@pytest.mark.parametrize("start", STARTS)
def test_dropout_masks_and_other_devices_take_the_column(start):
    """sdpa that torch may not fuse (here: switched off) computes the same by a column in front."""
    model, inputs = biased("mistral", start=start, n=2), inputs_of("mistral", padded=True)
    seen = inputs["attention_mask"].bool()
    expected = outputs(model, **inputs)[seen]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        actual = outputs(model, **inputs)[seen]
    torch.testing.assert_close(actual, expected, **EXACT)
    for kind in KINDS:
        model = biased("mistral", start=start, kind=kind)
        expected = outputs(model, input_ids=inputs["input_ids"])
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            torch.testing.assert_close(outputs(model, input_ids=inputs["input_ids"]), expected, **EXACT)


@pytest.mark.parametrize(("kind", "start", "n"), VARIANTS)
def test_a_kernel_that_shares_no_keys_is_not_given_fewer_of_them(monkeypatch, kind, start, n):
    """torch's older ones read on behind the keys: sdpa's own way is taken, which is another kernel there."""
    model, ids = biased("llama", kind=kind, start=start, n=n), {"input_ids": inputs_of("llama")["input_ids"]}
    expected, called = outputs(model, **ids), []
    monkeypatch.setattr(kernels, "SHARES_KEYS", False)
    monkeypatch.setattr(kernels, "_fused", lambda *_: called.append(1))
    torch.testing.assert_close(outputs(model, **ids), expected, **EXACT)
    assert not called


# Flex attention: transformers compiles it, and on the CPU asks for no log-sum-exp; torch's own function runs here.


def uncompiled_flex(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' flex attention on a device that gives the log-sum-exp, without its compilation."""
    request = getattr(flex_attention, "AuxRequest", None)  # from torch 2.9 on
    asked = {"return_lse": True} if request is None else {"return_aux": request(lse=True)}
    block = {"block_mask": attention_mask}
    out, extra = flex_attention.flex_attention(query, key, value, scale=scaling, enable_gqa=True, **block, **asked)
    return out.transpose(1, 2).contiguous(), extra if request is None else extra.lse


@pytest.fixture
def flex():
    """torch's flex attention behind its name."""
    original = AttentionInterface._global_mapping["flex_attention"]
    AttentionInterface.register("flex_attention", uncompiled_flex)
    yield "flex_attention"
    AttentionInterface.register("flex_attention", original)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("kind", "start", "n"), VARIANTS)
@pytest.mark.parametrize("name", ["mistral"])
def test_flex_attention_is_merged_through_its_log_sum_exp(flex, name, kind, start, n):
    model, inputs = biased(name, kind=kind, start=start, n=n), inputs_of(name, padded=True)
    inputs["attention_mask"][:, :3] = 1
    expected = outputs(model, **inputs)
    model.set_attn_implementation(flex)
    torch.testing.assert_close(outputs(model, **inputs), expected, rtol=1e-5, atol=1e-5)  # its softmax is in float32


def test_flex_attention_of_transformers_is_refused_on_the_cpu():
    model = model_of("llama", "flex_attention", torch.float32)
    with torch.compiler.set_stance("force_eager"):
        hf_galore.add_attention_bias(model)
        with pytest.raises(ValueError, match="transformers gives no log-sum-exp of it on the CPU"):
            outputs(model, **inputs_of("llama"))


# Continuous batching.


PROMPTS = [[5, 9, 14], [3, 8, 21, 30, 7], [40, 41]]
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": 98}


def batched(model):
    """The tokens that continuous batching generates after each prompt."""
    config = transformers.GenerationConfig(**SETTINGS)
    cache = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # not most of the memory
    results = model.generate_batch(PROMPTS, config, continuous_batching_config=cache, warmup=False)
    return [results[name].generated_tokens for name in sorted(results) if results[name].error is None]


def one_by_one(model):
    """What generate() generates after each prompt."""
    return [model.generate(torch.tensor([ids]), **SETTINGS)[0, len(ids) :].tolist() for ids in PROMPTS]


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi"])
def test_continuous_batching_has_the_bias_of_generate_or_is_refused(name, caplog):
    """From transformers 5.24 on sdpa is given gathered keys; before, the attention function gathers them itself."""
    model, gathers = biased(name, start="random"), []

    def watch(call, attend):
        gathers.append(call.options.get("cache") is not None)
        return attend(call)

    attention.add_hook(next(iter(biases(model).values())), watch)
    found = batched(model)
    if any(gathers):
        assert "does not run with the paged cache of continuous batching: use generate()" in caplog.text
        assert found == []
        return
    assert found == one_by_one(model)
    assert found != one_by_one(model_of(name))


def test_continuous_batching_in_eager_is_refused(caplog):
    assert batched(biased("llama", "eager")) == []
    assert "an attention bias runs with eager, sdpa" in caplog.text


# Refused.


@pytest.mark.parametrize("name", UNREACHABLE)
def test_architectures_with_attention_of_their_own_are_refused_by_name(name):
    model = model_of(name, "eager", torch.float32)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=f"{type(model).__name__} computes attention in its own code"):
        hf_galore.add_attention_bias(model)
    assert list(model.state_dict()) == before


class Recorder:
    """A hook that is a method, which is another object, though an equal one, each time it is asked for."""

    def __init__(self):
        self.calls = 0

    def hook(self, call, attend):
        self.calls += 1
        return attend(call)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_hook_that_is_a_bound_method_comes_off(name):
    model, recorder, other = model_of(name), Recorder(), Recorder()
    modules = list(attention_modules(model).values())
    for module in modules:
        attention.add_hook(module, recorder.hook)
        attention.add_hook(module, other.hook)
        attention.remove_hook(module, recorder.hook)
    outputs(model, **inputs_of(name))
    assert (recorder.calls, other.calls) == (0, len(modules))
    for module in modules:
        attention.remove_hook(module, other.hook)
        assert not hasattr(module, "_hf_galore_attention_hooks")


def test_attention_that_takes_another_way_is_refused():
    model = model_of("gpt2", "eager", torch.float32, reorder_and_upcast_attn=True)
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.attn' .* does not attend through"):
        hf_galore.add_attention_bias(model)
    assert not biases(model)
    assert not any(attention._HOOKS in vars(module) for module in model.modules())


def linear():
    return torch.nn.Linear(2, 2)


REFUSED = {
    "kind": ({"kind": "prefix"}, ValueError, "kind='prefix' is not one of key_value, sink_logits, off_by_one"),
    "start": ({"start": "zero"}, ValueError, "start='zero' is not one of noop, random"),
    "n": ({"n": 0}, ValueError, "Invalid n: 0"),
    "n type": ({"n": 1.5}, TypeError, "n=1.5 is not an integer"),
    "std": ({"std": -1.0}, ValueError, "Invalid std: -1.0"),
    "names": (
        {"target_modules": ["mlp"]},
        ValueError,
        r"no attention module matches 'mlp'; there are model\.layers\.0",
    ),
    "no names": ({"target_modules": []}, ValueError, "no attention module matches it"),
    "names type": ({"target_modules": 3}, TypeError, "target_modules=3 must be 'all-attention'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_named_and_change_nothing(case):
    options, error, message = REFUSED[case]
    model = model_of("llama")
    with pytest.raises(error, match=message):
        hf_galore.add_attention_bias(model, **options)
    assert not biases(model)


def test_other_models_and_a_second_bias_are_refused():
    with pytest.raises(TypeError, match="Linear is not a model of transformers"):
        hf_galore.add_attention_bias(linear())
    model = hf_galore.add_attention_bias(model_of("llama"), "layers.0")
    assert list(biases(model)) == ["model.layers.0.self_attn"]
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn' has an attention bias already"):
        hf_galore.add_attention_bias(model)
    hf_galore.unregister()
    with pytest.raises(RuntimeError, match=r"call hf_galore\.register\(\) first"):
        hf_galore.add_attention_bias(model_of("llama"))


def test_an_implementation_of_someone_else_is_refused():
    with literal_attention({}) as literal:
        model = model_of("llama", literal)
        with pytest.raises(ValueError, match="attn_implementation='literal': an attention bias runs with eager, sdpa"):
            hf_galore.add_attention_bias(model)


# Registered.


def everything_in_the_registry():
    table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    return dict(table._global_mapping), dict(table._local_mapping), dict(vars(AttentionInterface)), list(table)


def test_unregister_restores_the_registry_exactly():
    hf_galore.unregister()
    before = everything_in_the_registry()
    for _ in range(2):
        hf_galore.register()
        hf_galore.register()
        during = everything_in_the_registry()
        assert during[0] == before[0]
        assert during != before
        hf_galore.unregister()
        assert everything_in_the_registry() == before


def test_a_model_without_hooks_calls_the_original_with_what_it_was_given(monkeypatch):
    """Whatever the arguments: none is bound, copied or left out."""
    given = []
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "sdpa", lambda *args, **options: given.append((args, options))
    )
    module, arguments, options = linear(), (object(), object()), {"anything": object()}
    function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    function(module, *arguments, **options)
    assert given == [((module, *arguments), options)]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_weights_that_eager_returns_are_those_of_the_tokens(name, start):
    inputs, model = inputs_of(name), biased(name, "eager", kind="off_by_one", n=3, start=start)
    before = model_of(name, "eager")(**inputs, output_attentions=True).attentions[0]
    after = model(**inputs, output_attentions=True).attentions[0]
    assert after.shape == before.shape
    rescaled = after / after.sum(-1, keepdim=True) * before.sum(-1, keepdim=True)
    torch.testing.assert_close(rescaled, before, **EAGER)  # in the same proportions,
    assert (start == "noop") == bool((after.sum(-1) > before.sum(-1)).any())  # and less, but for a gate below zero


def test_copies_of_a_model_have_columns_of_their_own():
    model, inputs = biased("llama"), inputs_of("llama")
    expected = outputs(model, **inputs)
    twin = copy.deepcopy(model)
    disturb(twin)
    for module in biases(twin).values():
        module.kv_bias.key.data.neg_()
    assert torch.equal(outputs(model, **inputs), expected)
    assert not torch.equal(outputs(twin, **inputs), expected)


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("mask", [None, "seen", "added"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_decoding_step_is_what_any_number_of_queries_gets(heads, mask, gated):
    """`_step`, which has few operators, against `_fused`."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, count, length, 8).double() for count, length in ((4, 1), (heads, 5), (heads, 5))
    )
    columns = Columns(
        torch.randn(heads, 1, 8).double(),
        torch.randn(heads, 1, 8).double(),
        None,
        torch.rand(4).double() if gated else None,
        1,
    )
    masks = {"seen": torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()[:, None, None]}
    masks["added"] = torch.zeros(2, 1, 1, 5).double().masked_fill(~masks["seen"], -torch.inf)
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // heads
    call = attention.AttentionCall(module, "sdpa", query, key, value, masks.get(mask), {"scaling": 0.7})
    assert not kernels._is_step(call, columns)
    with torch.no_grad():
        assert kernels._is_step(call, columns)
        torch.testing.assert_close(kernels._step(call, columns), kernels._fused(call, columns, False), **EXACT)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MusicgenForCausalLM", "does not run on input_ids"),  # rows are codebooks
        ("VivitForVideoClassification", "does not run on pixel_values"),  # of several frames
        ("SegformerForImageClassification", "says no image_size"),
    ],
)
def test_a_model_that_cannot_be_tried_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        hf_galore.add_attention_bias(sweep_models.build(name).eval())


@pytest.mark.parametrize("name", ["CLIPForImageClassification", "SiglipForImageClassification", "AltCLIPModel"])
def test_images_of_a_part_s_size_and_beside_text(name):
    model = sweep_models.build(name).eval()
    hf_galore.add_attention_bias(model)
    assert any(path.endswith("kv_bias.gate") for path, _ in model.named_parameters())
