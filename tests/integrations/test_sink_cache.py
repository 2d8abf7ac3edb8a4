"""SinkCache, in models of many architectures: what StreamingLLM computes, however the tokens are fed."""

import copy
import gc

import pytest
import torch
from parts import in_part
from sink_cases import (
    ARCHITECTURES,
    SHALLOW,
    SINGLE_TABLES,
    STATES,
    TOKENS,
    N,
    S,
    W,
    all_in_float64,
    build,
    fed,
    literal_logits,
    tokens,
)
from transformers import DynamicCache
from version_cases import with_cache

from hf_galore import SinkCache

FEEDS = {
    "token by token": None,
    "one prompt": [TOKENS],
    "pieces": [5, 1, 20, 1, 1, 2, TOKENS - 30],
}
PADDING = [0, 2, 7, N + 4]
PADDED_FEEDS_WITH_STATES = {
    "token by token": [PADDING[-1] + 1] + [1] * (TOKENS - PADDING[-1] - 1),
    "one prompt": [TOKENS],
    "pieces": [5, 2, 20, 1, 1, 2, TOKENS - 31],
}
EXACT = {"rtol": 0, "atol": 1e-10}  # logits of size 6 in float64, through two layers


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    """(name, model, tokens, literal logits), all in float64."""
    with all_in_float64():
        model = build(request.param)
        ids = tokens()
        return request.param, model, ids, literal_logits(request.param, model, ids)


@pytest.mark.parametrize("feed", FEEDS)
def test_equals_recomputation_within_the_cache(case, feed):
    _, model, ids, expected = case
    with all_in_float64():
        logits = fed(model, SinkCache(model, S, W), ids, FEEDS[feed])
    torch.testing.assert_close(logits, expected, **EXACT)


@pytest.mark.parametrize("feed", in_part(FEEDS, "one prompt", "pieces"))
def test_padded_rows_equal_the_rows_alone(case, feed):
    name, model, ids, expected = case
    sizes = PADDED_FEEDS_WITH_STATES[feed] if name in STATES else FEEDS[feed]
    batch = torch.cat([torch.cat([torch.zeros_like(ids[:, :pad]), ids[:, : TOKENS - pad]], 1) for pad in PADDING])
    mask = (torch.arange(TOKENS) >= torch.tensor(PADDING)[:, None]).long()
    with all_in_float64():
        logits = fed(model, SinkCache(model, S, W), batch, sizes, attention_mask=mask)
    for row, pad in enumerate(PADDING):
        torch.testing.assert_close(logits[row : row + 1, pad:], expected[:, : TOKENS - pad], **EXACT)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_the_rotary_tables_of_transformers(name):
    model, ids = build(name), tokens()
    logits = fed(model, SinkCache(model, S, W), ids)
    torch.testing.assert_close(logits, literal_logits(name, model, ids), **SINGLE_TABLES)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("pads", [[0, 0], [0, 3]], ids=["full", "padded"])
def test_bit_identical_to_dynamic_cache_until_something_is_evicted(name, pads):
    model, ids = build(name, torch.float32), tokens(N, rows=2)
    mask = (torch.arange(N) >= torch.tensor(pads)[:, None]).long()
    sizes = [5, 1, 1, N - 7]

    def logits(cache):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out, seen = [], 0
        for piece, place in zip(ids.split(sizes, 1), places.split(sizes, 1), strict=True):
            seen += piece.shape[1]
            step = model(piece, attention_mask=mask[:, :seen], position_ids=place, **with_cache(model, cache)).logits
            out.append(step)
        return torch.cat(out, 1)[mask.bool()]

    with torch.no_grad():
        assert torch.equal(logits(SinkCache(model, S, W)), logits(DynamicCache(config=model.config)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("n_sink", [0, 1, 4])
def test_numbers_of_sinks_and_attention_implementations(attention, n_sink):
    ids = tokens()
    with all_in_float64():
        model = build("llama", attention=attention)
        expected = literal_logits("llama", model, ids, n_sink, W)
        for sizes in FEEDS.values():
            torch.testing.assert_close(fed(model, SinkCache(model, n_sink, W), ids, sizes), expected, **EXACT)


def test_attention_implementations_without_masks_are_fed_token_by_token(monkeypatch):
    monkeypatch.setattr("hf_galore.integrations.sink_forward._TAKES_MASKS", ())
    ids = tokens()
    with all_in_float64():
        model = build("llama")
        logits = fed(model, SinkCache(model, S, W), ids, [TOKENS])
        torch.testing.assert_close(logits, literal_logits("llama", model, ids), **EXACT)


@pytest.mark.parametrize("name", SHALLOW)
def test_one_layer_equals_the_model_without_a_cache_on_the_kept_tokens(name):
    ids = tokens()
    with all_in_float64():
        model = build(name, **SHALLOW[name][1])
        logits = fed(model, SinkCache(model, S, W), ids)
        for feed in FEEDS.values():
            torch.testing.assert_close(fed(model, SinkCache(model, S, W), ids, feed), logits, **EXACT)
        for last in range(TOKENS):
            kept = [*range(min(S, last + 1)), *range(max(S, last + 1 - W), last + 1)]
            with torch.no_grad():
                alone = model(ids[:, kept], position_ids=torch.arange(len(kept))[None], use_cache=False).logits
            torch.testing.assert_close(logits[:, last], alone[:, -1], **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_rotating_anew(dtype):
    ids = tokens(15 * N)
    exact = literal_logits("llama", build("llama"), ids)
    model = build("llama", dtype)
    literal = (literal_logits("llama", model, ids).double() - exact).abs().mean()
    ours = (fed(model, SinkCache(model, S, W), ids).double() - exact).abs().mean()
    assert ours <= 1.2 * literal


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_positions_counted_anew(name, monkeypatch):
    monkeypatch.setattr("hf_galore.integrations.sink_cache.POSITION_LIMIT", 2 * N)
    ids = tokens()
    batch = torch.cat([ids, torch.cat([torch.zeros(1, 5, dtype=torch.long), ids[:, :-5]], 1)])
    mask = (torch.arange(TOKENS) >= torch.tensor([[0], [5]])).long()
    with all_in_float64():
        model = build(name)
        expected = literal_logits(name, model, ids)
        for sizes in FEEDS.values():
            cache = SinkCache(model, S, W)
            logits = fed(model, cache, batch, sizes, attention_mask=mask)
            assert cache.steps.window.base.min() > 0
            torch.testing.assert_close(logits[:1], expected, **EXACT)
            torch.testing.assert_close(logits[1:, 5:], expected[:, :-5], **EXACT)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "deepseek_v3"])
def test_positions_counted_anew_beside_states_and_latents(name, monkeypatch):
    ids = tokens()
    with all_in_float64():
        model = build(name)
        expected = fed(model, SinkCache(model, S, W), ids)
        monkeypatch.setattr("hf_galore.integrations.sink_cache.POSITION_LIMIT", 2 * N)
        cache = SinkCache(model, S, W)
        torch.testing.assert_close(fed(model, cache, ids), expected, **EXACT)
    assert cache.steps.window.base.min() > 0


def test_memory_is_flat_beside_states():
    model = build("qwen3_next", torch.float32)
    cache = SinkCache(model, S, W)
    fed(model, cache, tokens(N), [N])
    size = cache.nbytes
    states = [*cache.layers[0].conv_states.values(), *cache.layers[0].recurrent_states.values()]
    assert size == sum(held.nbytes for held in (*states, *cache.layers[1].ring.tensors()))
    fed(model, cache, tokens(), [TOKENS])
    assert cache.nbytes == size


def test_memory_is_flat():
    model = build("llama", torch.float32)
    cache = SinkCache(model, S, W)
    fed(model, cache, tokens(1))

    def places():
        tensors = [tensor for layer in cache.layers for tensor in (layer.ring.keys, layer.ring.values)]
        return [(tensor.data_ptr(), tensor.untyped_storage().nbytes()) for tensor in tensors]

    layers, heads, width, before = 2, 2, 8, places()
    size = 2 * 4 * layers * heads * width * (N + S)
    for sizes in ([20], [1] * TOKENS, [TOKENS]):
        assert cache.nbytes == size
        fed(model, cache, tokens(sum(sizes)), sizes)
        assert places() == before
    storages = {tensor.untyped_storage() for layer in cache.layers for tensor in layer.ring.tensors()}
    assert sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) == size


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "lfm2", "falcon_h1"])
@pytest.mark.parametrize("select", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_rows_can_be_selected(select, name):
    model, ids = build(name), tokens(rows=3)
    mask = (torch.arange(TOKENS) >= torch.tensor([[0], [4], [1]])).long()
    cache, rows = SinkCache(model, S, W), torch.tensor([2, 0, 0])
    before = 2 * N
    fed(model, cache, ids[:, :before], [before], attention_mask=mask)
    if select == "batch_repeat_interleave":
        rows = torch.tensor([0, 0, 1, 1, 2, 2])
        cache.batch_repeat_interleave(2)
    else:
        getattr(cache, select)(rows)
    whole = fed(model, SinkCache(model, S, W), ids, [TOKENS], attention_mask=mask)
    rest = [
        model(ids[rows, at : at + 1], attention_mask=mask[rows, : at + 1], **with_cache(model, cache)).logits
        for at in range(before, TOKENS)
    ]
    torch.testing.assert_close(torch.cat(rest, 1), whole[rows, before:], **SINGLE_TABLES)


def test_a_copy_goes_its_own_way():
    model, ids = build("llama"), tokens()
    prompt = SinkCache(model, S, W)
    fed(model, prompt, ids[:, :20], [20])
    one, two = copy.deepcopy(prompt), copy.deepcopy(prompt)
    assert one.decoder is model.model
    expected = literal_logits("llama", model, ids)[:, 20:]
    torch.testing.assert_close(fed(model, one, ids[:, 20:]), expected, **SINGLE_TABLES)
    torch.testing.assert_close(fed(model, two, ids[:, 20:]), expected, **SINGLE_TABLES)


@pytest.mark.parametrize("name", ["llama", "lfm2", "falcon_h1"])
def test_reset_and_another_batch_size(name):
    model, ids = build(name), tokens(rows=2)
    cache = SinkCache(model, S, W)
    fed(model, cache, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(fed(model, cache, ids[:1]), fed(model, SinkCache(model, S, W), ids[:1]))


def test_hooks_go_with_the_cache_and_leave_other_caches_alone():
    model, ids = build("llama", torch.float32), tokens()
    alone = fed(model, DynamicCache(config=model.config), ids, [TOKENS])
    cache = SinkCache(model, S, W)
    assert torch.equal(fed(model, DynamicCache(config=model.config), ids, [TOKENS]), alone)
    fed(model, cache, ids, [TOKENS])
    del cache
    gc.collect()
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks
    assert not model.model._forward_hooks_with_kwargs


def test_a_peft_model():
    peft = pytest.importorskip("peft")
    model, ids = build("llama"), tokens()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False)).eval()
    expected = literal_logits("llama", wrapped, ids)
    torch.testing.assert_close(fed(wrapped, SinkCache(wrapped, S, W), ids), expected, **SINGLE_TABLES)
