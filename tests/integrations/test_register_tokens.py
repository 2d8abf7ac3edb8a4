"""Register tokens in decoders: each behaviour on each architecture, against embeddings put together by hand."""

import copy

import pytest
import torch
from attention_cases import DECODERS, EAGER_ALONE, LENGTH, UNREACHABLE, inputs_of, model_of, outputs
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    CompileConfig,
    DynamicCache,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    StaticCache,
)
from transformers.cache_utils import StaticLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from version_cases import cache_in, checkpoint_activations, with_cache

import hf_galore
from hf_galore.integrations.decoders import decoder_of
from hf_galore.integrations.register_decoder import CHILD

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # every rounding in float64, through two layers of weights of the order of one
SINGLE = {"rtol": 1e-5, "atol": 1e-5}
N = 2
# Rows of `inputs_of(padded=True)`: the first has three pads.
PADS = (3, 0)


def plain_model(name, dtype=torch.float64, **changes):
    return model_of(name, "sdpa" if name in DECODERS else "eager", dtype, **changes)


def with_tokens(name, n=N, dtype=torch.float64, **changes):
    """The model with tokens of the size of its embeddings."""
    return hf_galore.add_register_tokens(plain_model(name, dtype, **changes), n, std=1.0)


def own(model):
    """The tokens' embeddings, (n, d)."""
    child = getattr(decoder_of(model), CHILD)
    return child.tokens.view(child.n_tokens, -1)


def by_hand(name, model, ids, **options):
    """The output of the architecture for the tokens' embeddings in front of those of the ids."""
    plain = plain_model(name, model.dtype)
    plain.set_attn_implementation(model.config._attn_implementation)
    tokens = own(model).detach().expand(len(ids), -1, -1)
    embeds = torch.cat([tokens, plain.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        return plain(inputs_embeds=embeds, **options)


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", [*DECODERS, *EAGER_ALONE])
def test_computes_the_model_on_embeddings_put_together_by_hand(name, n):
    model, ids = with_tokens(name, n), inputs_of(name)["input_ids"]
    expected = by_hand(name, model, ids).logits[:, n:]
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids)
        embeds = model.get_input_embeddings()(ids)
        of_embeds = model(inputs_embeds=embeds).logits
    assert found.logits.shape[1] == LENGTH
    for logits in (found.logits, of_embeds):
        torch.testing.assert_close(logits, expected, **EXACT)
    loss = cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found.loss.double(), loss, **SINGLE)
    assert (found.logits - outputs(plain_model(name), input_ids=ids)).abs().max() > 0.1


@pytest.mark.parametrize("name", UNREACHABLE)
def test_models_with_attention_code_of_their_own_take_them_too(name):
    model, ids = with_tokens(name, dtype=torch.float32), inputs_of(name)["input_ids"]
    torch.testing.assert_close(outputs(model, input_ids=ids), by_hand(name, model, ids).logits[:, N:], **SINGLE)


@pytest.mark.parametrize("name", DECODERS)
def test_padded_rows_are_the_rows_alone(name):
    """On the left, where the tokens stand between the padding and the row, and on the right."""
    model, left = with_tokens(name), inputs_of(name, padded=True)
    ids, mask = left["input_ids"], left["attention_mask"]
    right = {"input_ids": torch.stack([ids[0].roll(-3), ids[1]]), "attention_mask": mask.flip(1)}
    for inputs, is_left in ((left, True), (right, False)):
        found = outputs(model, **inputs, position_ids=positions(inputs["attention_mask"]))
        for row, pads in enumerate(PADS):
            seen = slice(pads, None) if is_left else slice(0, LENGTH - pads)
            alone = by_hand(name, model, inputs["input_ids"][row : row + 1, seen]).logits[0, N:]
            torch.testing.assert_close(found[row, seen], alone, **EXACT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_every_output_is_that_of_the_users_tokens(name, implementation):
    model, ids = with_tokens(name), inputs_of(name)["input_ids"]
    wanted = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    wanted |= {"output_router_logits": True} if name == "mixtral" else {}
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        found, as_tuple = model(ids, **wanted), model(ids, return_dict=False)
    expected = by_hand(name, model, ids, **wanted)
    torch.testing.assert_close(as_tuple[0], found.logits)
    assert len(found.hidden_states) == 3
    for state, whole in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, whole[:, N:], **EXACT)
    for weights in found.attentions or ():
        assert weights.shape == (2, 4, LENGTH, N + LENGTH)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **SINGLE)
    routers = (getattr(out, "router_logits", None) or () for out in (found, expected))
    for logits, whole in zip(*routers, strict=True):
        torch.testing.assert_close(logits, whole.view(2, -1, 4)[:, N:].flatten(0, 1), **SINGLE)


# Generation.

NEW = 5
SETTINGS = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "suppress_tokens": None}


def literally_generated(name, model, ids):
    """The best tokens one after another, from the whole sequence by hand each time."""
    for _ in range(NEW):
        logits = by_hand(name, model, ids).logits[:, -1].clone()
        logits[:, model.config.eos_token_id or 0] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


CACHES = {
    "none": lambda model: {"use_cache": False},
    "dynamic": lambda model: {},
    "static": lambda model: {"cache_implementation": "static"},
    "the user's static": lambda model: with_cache(model, StaticCache(model.config, max_cache_len=LENGTH + NEW)),
    "in chunks": lambda model: {"prefill_chunk_size": 5},
    "in chunks, static": lambda model: {"prefill_chunk_size": 5, "cache_implementation": "static"},
}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "opt", "gpt_neox"])
def test_generate_with_every_cache_is_what_is_generated_by_hand(name):
    model, inputs = with_tokens(name, eos_token_id=1), inputs_of(name, padded=True)
    alone = [
        literally_generated(name, model, inputs["input_ids"][row : row + 1, pads:]) for row, pads in enumerate(PADS)
    ]
    for case, options in CACHES.items():
        found = model.generate(**inputs, **SETTINGS, **options(model))
        for row, pads in enumerate(PADS):
            assert torch.equal(found[row, pads:], alone[row][0]), (case, row)


@pytest.mark.parametrize("padded", [False, True])
def test_further_ways_to_generate(padded):
    model, inputs = with_tokens("llama"), inputs_of("llama", padded)
    beams = {"num_beams": 3}
    expected = model.generate(**inputs, **SETTINGS, **beams, use_cache=False)
    assert torch.equal(model.generate(**inputs, **SETTINGS, **beams), expected)
    row = {key: value[:1] for key, value in inputs.items()}
    looked_up = model.generate(**row, **SETTINGS, prompt_lookup_num_tokens=2)
    assert torch.equal(looked_up, model.generate(**row, **SETTINGS, use_cache=False))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_conversation_over_many_calls(kind):
    """All tokens are given again, or the new ones with the mask of all; a cache that was reset begins anew."""
    model, inputs = with_tokens("llama"), inputs_of("llama", padded=True)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for turn in range(3):
        whole = model.generate(ids, attention_mask=mask, **SETTINGS, use_cache=False)
        start = 0 if turn != 1 else int(cache.get_seq_length())
        said = model.generate(ids[:, start:], attention_mask=mask, **SETTINGS, **with_cache(model, cache))
        assert torch.equal(said[:, -NEW:], whole[:, -NEW:])
        ids = torch.cat([whole, ids[:, 4:6]], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, NEW + 2)], dim=1)
        assert cache.get_seq_length() == whole.shape[1] - 1
    if kind == "static":
        cache.reset()
        again = model.generate(**inputs, **SETTINGS, **with_cache(model, cache))
        assert torch.equal(again, model.generate(**inputs, **SETTINGS, use_cache=False))


static_caches_go_back = pytest.mark.skipif(
    not StaticLayer.is_croppable, reason="assisted decoding takes static caches from transformers 5.24 on"
)
LOOK_UP = {"prompt_lookup_num_tokens": 2}


@static_caches_go_back
@pytest.mark.parametrize(("name", "window"), [("llama", None), ("mistral", 64), ("gemma3", 64)])
def test_assisted_decoding_in_a_static_cache(name, window):
    """Two slots more than the tokens need, for drafts that go past the end: transformers' own overrun without them."""
    model = with_tokens(name, **({} if window is None else {"sliding_window": window}))
    ids, room = inputs_of(name)["input_ids"][:1].repeat(1, 2), 2 * LENGTH + NEW + 2
    cache = StaticCache(model.config, max_cache_len=room)
    found = model.generate(ids, **SETTINGS, **LOOK_UP, **with_cache(model, cache))
    assert torch.equal(found, model.generate(ids, **SETTINGS, use_cache=False))
    assert cache.get_max_length() == room


@static_caches_go_back
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss"])
def test_assisted_decoding_is_refused_where_a_window_lets_go_of_tokens_for_ours(name):
    room = 2 * LENGTH + NEW  # the whole sequence, without ours
    model = with_tokens(name, sliding_window=room)
    ids = inputs_of(name)["input_ids"][:1].repeat(1, 2)
    cache = with_cache(model, StaticCache(model.config, max_cache_len=room))
    with pytest.raises(ValueError, match="requires a cache that can be cropped"):
        model.generate(ids, **SETTINGS, **LOOK_UP, **cache)


def test_a_cache_that_the_forward_pass_has_made_goes_on():
    model, ids = with_tokens("llama"), inputs_of("llama")["input_ids"]
    with torch.no_grad():
        first = model(ids[:, :7])
        second = model(ids[:, 7:], **with_cache(model, copy.deepcopy(cache_in(first))))
    assert cache_in(first).get_seq_length() == 7
    logits = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(logits, by_hand("llama", model, ids).logits[:, N:], **EXACT)


# Training, compiling, copying.


def gradients(model, **inputs):
    model.zero_grad()
    out = model(**inputs).logits
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {name: param.grad.clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_with_and_without_checkpointing_are_those_by_hand(use_reentrant):
    model, ids = with_tokens("mistral").train(), inputs_of("mistral")["input_ids"]
    expected = gradients(model, input_ids=ids)
    plain = model_of("mistral")
    tokens = own(model).detach().clone().requires_grad_()
    embeds = torch.cat([tokens.expand(2, -1, -1), plain.get_input_embeddings()(ids)], dim=1)
    out = plain(inputs_embeds=embeds).logits[:, N:]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    literal = {name: param.grad for name, param in plain.named_parameters()}
    literal[f"model.{CHILD}.tokens"] = tokens.grad.flatten()
    assert expected.keys() == literal.keys()
    for name, value in literal.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(expected[name], value, rtol=1e-10, atol=1e-12 * scale)
    checkpoint_activations(model, use_reentrant)
    for name, value in gradients(model, input_ids=ids).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("padded", [False, True])
def test_it_compiles_into_one_graph(padded):
    model, inputs = with_tokens("llama"), inputs_of("llama", padded)
    expected = outputs(model, **inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled, **inputs), expected, **EXACT)


@pytest.mark.parametrize("padded", [False, True])
def test_generate_compiles_a_step_with_a_static_cache_once(padded):
    model, inputs = with_tokens("llama"), inputs_of("llama", padded)
    expected = model.generate(**inputs, **SETTINGS)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    found = model.generate(**inputs, **SETTINGS, cache_implementation="static", compile_config=how)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_copies_and_removal():
    model, ids = with_tokens("gpt2"), inputs_of("gpt2")["input_ids"]
    plain = model_of("gpt2")
    expected, twin = outputs(model, input_ids=ids), copy.deepcopy(model)
    getattr(twin.get_decoder(), CHILD).tokens.data.neg_()
    assert not torch.equal(outputs(twin, input_ids=ids), expected)
    assert hf_galore.remove_register_tokens(twin) is twin
    assert torch.equal(outputs(model, input_ids=ids), expected)
    assert torch.equal(outputs(twin, input_ids=ids), outputs(plain, input_ids=ids))
    assert list(twin.state_dict()) == list(plain.state_dict())
    for module, other in zip(twin.modules(), plain.modules(), strict=True):
        assert set(vars(module)) == set(vars(other))
        assert len(module._forward_hooks) + len(module._forward_pre_hooks) == 0
    with pytest.raises(ValueError, match="has no register tokens"):
        hf_galore.remove_register_tokens(twin)


# Refused.

ARGUMENTS = {
    "zero": ({"n_tokens": 0}, ValueError, "Invalid n_tokens: 0"),
    "float": ({"n_tokens": 1.0}, TypeError, "n_tokens=1.0 is not an integer"),
    "std": ({"std": -1.0}, ValueError, "Invalid std: -1.0"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_are_named(case):
    arguments, error, message = ARGUMENTS[case]
    model = model_of("llama")
    with pytest.raises(error, match=message):
        hf_galore.add_register_tokens(model, **arguments)
    assert not hasattr(model.model, CHILD)


def test_models_that_cannot_have_them_are_named():
    bert = model_of("bert")
    with pytest.raises(ValueError, match="BertForMaskedLM cannot have register tokens: tokens attend to later ones"):
        hf_galore.add_register_tokens(bert)
    assert not any(hasattr(module, CHILD) for module in bert.modules())
    for kind, sizes in (("mamba", {"num_hidden_layers": 1}), ("t5", {"d_model": 32, "num_layers": 1})):
        other = AutoModel.from_config(CONFIG_MAPPING[kind](vocab_size=9, **sizes))
        with pytest.raises(
            ValueError, match="cannot have register tokens: it is neither a decoder with attention nor a"
        ):
            hf_galore.add_register_tokens(other)
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    music = MusicgenForCausalLM(MusicgenDecoderConfig(**sizes))
    with pytest.raises(ValueError, match="MusicgenDecoder has no embeddings of tokens, or several for each token"):
        hf_galore.add_register_tokens(music)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    low_rank = {"q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 1, "head_dim": 16, "num_key_value_heads": 1}
    deepseek = AutoModel.from_config(CONFIG_MAPPING["deepseek_v4"](vocab_size=9, **sizes, **low_rank))
    with pytest.raises(ValueError, match="cannot have register tokens: it does not run on embeddings"):
        hf_galore.add_register_tokens(deepseek)
    assert not any(hasattr(module, CHILD) for module in deepseek.modules())
    with pytest.raises(TypeError, match="Linear is not a model of transformers"):
        hf_galore.add_register_tokens(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaForCausalLM has register tokens already"):
        hf_galore.add_register_tokens(with_tokens("llama"))
    scaled = model_of("llama")
    scaled.model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            (args, kwargs | {"position_ids": 2 * torch.arange(3)[None]})
            if kwargs.get("input_ids") is not None
            else None
        ),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="embeddings of ids are not all that it makes of ids"):
        hf_galore.add_register_tokens(scaled)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_models_that_look_up_more_than_embeddings_by_token_id_are_named(kind):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    sizes |= {"vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "pad_token_id": 0}
    sizes |= {"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0}
    extra = {"activation_sparsity_pattern": [0.0] * 2, "laurel_rank": 4} if kind == "gemma3n_text" else {}
    model = AutoModel.from_config(CONFIG_MAPPING[kind](**sizes, **extra))
    with pytest.raises(ValueError, match="it looks up inputs of each layer by token ids, and they have none"):
        hf_galore.add_register_tokens(model)
    assert not any(hasattr(module, CHILD) for module in model.modules())


IDS = torch.arange(3, 9)[None]
INPUTS = {
    "4-D mask": (
        {"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)},
        r"attention_mask: .* \(batch, tokens\)",
    ),
    "1-D positions": ({"position_ids": torch.arange(6)}, "position_ids: .* need those of"),
    "packed": ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "packed into one row"),
    "lengths": (
        {"cu_seq_lens_q": torch.tensor([0, 3, 6])},
        "cu_seq_lens_q: register tokens do not go with this input",
    ),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_do_not_go_with_them_are_named(case):
    inputs, message = INPUTS[case]
    with pytest.raises(ValueError, match=message):
        with_tokens("llama")(IDS, **inputs)


def test_caches_that_do_not_go_with_them_are_named():
    model, plain = with_tokens("llama"), model_of("llama")
    with torch.no_grad(), pytest.raises(ValueError, match="it holds tokens without the register tokens in front"):
        model(IDS, **with_cache(model, cache_in(plain(IDS))))
    with pytest.raises(ValueError, match=r"a row has no token.*: pass longer chunks"):
        model(IDS, attention_mask=torch.zeros_like(IDS), **with_cache(model, DynamicCache()))
    inner = model_of("llama")
    hf_galore.add_register_tokens(inner.model)
    with pytest.raises(ValueError, match="unless the tokens were added to the model that generates"):
        inner.generate(IDS, cache_implementation="static", max_new_tokens=2)
