"""generate() with a SinkCache: loops by hand, padding, conversations, beams, and no end."""

import pytest
import torch
from sink_cases import SINGLE_TABLES, N, S, W, build, fed, literal_logits, tokens
from transformers import DynamicCache
from version_cases import with_cache

from hf_galore import SinkCache


def greedy(model, cache, ids, count, **kwargs):
    options = {"max_new_tokens": count, "do_sample": False, **with_cache(model, cache)}
    options |= {"attention_mask": torch.ones_like(ids)} | kwargs  # or generate() takes tokens 0 for padding
    return model.generate(ids, **options)


def assert_greedy(model, out, prompt):
    """Every token after the prompt is the best by the literal logits of those before, as in a loop by hand."""
    expected = literal_logits("llama", model, out)[0, prompt - 1 : -1].argmax(-1)
    assert torch.equal(out[0, prompt:], expected)


@pytest.mark.parametrize("prompt", [4, 2 * N])
def test_generate_equals_a_loop(prompt):
    model, ids = build("llama"), tokens(prompt)
    out = greedy(model, SinkCache(model, S, W), ids, 20)
    assert out.shape == (1, prompt + 20)
    assert_greedy(model, out, prompt)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "lfm2", "deepseek_v3"])
def test_generate_beside_states_and_with_latents_equals_a_loop(name):
    model, ids = build(name), tokens(2 * N)
    out = greedy(model, SinkCache(model, S, W), ids, 15)
    logits = fed(model, SinkCache(model, S, W), out)
    assert torch.equal(out[0, 2 * N :], logits[0, 2 * N - 1 : -1].argmax(-1))
    assert not torch.equal(out, greedy(model, DynamicCache(config=model.config), ids, 15))


@pytest.mark.parametrize("chunk", [1, 7])
def test_generate_with_a_prompt_in_chunks(chunk):
    model, ids = build("llama"), tokens(2 * N)
    whole = greedy(model, SinkCache(model, S, W), ids, 10)
    assert torch.equal(greedy(model, SinkCache(model, S, W), ids, 10, prefill_chunk_size=chunk), whole)


def test_generate_with_padding_equals_the_rows_alone():
    model, ids = build("llama"), tokens(8)
    batch = torch.cat([torch.cat([torch.zeros_like(ids[:, :pad]), ids[:, : 8 - pad]], 1) for pad in (0, 3)])
    mask = (torch.arange(8) >= torch.tensor([[0], [3]])).long()
    both = greedy(model, SinkCache(model, S, W), batch, 30, attention_mask=mask)
    for row, pad in enumerate((0, 3)):
        alone = greedy(model, SinkCache(model, S, W), ids[:, : 8 - pad], 30)
        assert torch.equal(both[row : row + 1, pad:], alone)


def test_a_conversation_over_many_calls():
    model = build("llama")
    cache = SinkCache(model, S, W)
    said = torch.empty(1, 0, dtype=torch.long)
    for turn, length in enumerate((3, 5, 1, 20, 2)):
        said = torch.cat([said, tokens(length) if turn % 2 else tokens(length).flip(1)], 1)
        said = greedy(model, cache, said, 6)
    assert cache.get_seq_length() == said.shape[1] - 1  # generate() does not feed its last token
    logits = fed(model, cache, said[:, -1:])
    torch.testing.assert_close(logits, literal_logits("llama", model, said)[:, -1:], **SINGLE_TABLES)


def test_a_conversation_with_new_tokens_alone_and_the_mask_of_all():
    model, ids = build("llama"), tokens(4 * N)
    one, two = SinkCache(model, S, W), SinkCache(model, S, W)
    whole = greedy(model, one, ids, 5)
    fed(model, two, ids[:, : 3 * N])
    mask = torch.ones_like(ids)
    assert torch.equal(greedy(model, two, ids[:, 3 * N :], 5, attention_mask=mask), whole[:, 3 * N :])


def test_goes_beyond_the_positions_of_the_model():
    model = build("llama", torch.float32, max_position_embeddings=32)
    out = greedy(model, SinkCache(model, S, W), tokens(4), 150)
    assert out.shape == (1, 154)
    assert_greedy(model, out, 4)


def test_beam_search_scores_are_those_of_the_sequences():
    model = build("llama")
    batch = torch.cat([tokens(6), torch.cat([torch.zeros(1, 2, dtype=torch.long), tokens(4)], 1)])
    mask = (torch.arange(6) >= torch.tensor([[0], [2]])).long()
    options = {"num_beams": 3, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
    out = greedy(model, SinkCache(model, S, W), batch, 25, attention_mask=mask, **options)
    for row, pad in enumerate((0, 2)):
        sequence = out.sequences[row : row + 1, pad:]
        logits = literal_logits("llama", model, sequence).log_softmax(-1)
        score = logits[0, 5 - pad : -1].gather(1, sequence[0, 6 - pad :, None]).sum()
        torch.testing.assert_close(out.sequences_scores[row].double(), score, rtol=1e-5, atol=0)
