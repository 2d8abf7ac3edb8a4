"""Register tokens in a SinkCache: the first of its sinks, as if they were tokens of a larger vocabulary."""

import pytest
import torch
from sink_cases import SINGLE_TABLES, TOKENS, VOCAB, N, W, all_in_float64, build, fed, literal_logits, tokens
from torch import nn
from version_cases import with_cache

import hf_galore
from hf_galore import SinkCache

OWN, SINKS = 2, 3
EXACT = {"rtol": 0, "atol": 1e-10}
FEEDS = {"token by token": None, "one prompt": [TOKENS], "pieces": [5, 1, 20, 1, 1, 2, TOKENS - 30]}
PADDING = [0, 2, 7, N + 4]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt_neox"])
def case(request):
    """(model with register tokens, ids, literal logits of a model in whose vocabulary they are)."""
    with all_in_float64():
        model, other, ids = build(request.param), build(request.param), tokens()
        hf_galore.add_register_tokens(model, OWN, std=0.3)
        embeddings = other.get_input_embeddings()
        own = model.get_decoder().bias_tokens.tokens.detach().view(OWN, -1)
        other.set_input_embeddings(nn.Embedding.from_pretrained(torch.cat([embeddings.weight.detach(), own])))
        literal = torch.cat([torch.arange(VOCAB, VOCAB + OWN)[None], ids], 1)
        return model, ids, literal_logits(request.param, other, literal, SINKS, W)[:, OWN:]


@pytest.mark.parametrize("feed", FEEDS)
def test_they_are_its_first_sinks(case, feed):
    """However the tokens are fed, and in rows that are padded; which begin where their row does."""
    model, ids, expected = case
    batch = torch.cat([torch.cat([torch.zeros_like(ids[:, :pad]), ids[:, : TOKENS - pad]], 1) for pad in PADDING])
    mask = (torch.arange(TOKENS) >= torch.tensor(PADDING)[:, None]).long()
    with all_in_float64():
        torch.testing.assert_close(fed(model, SinkCache(model, SINKS, W), ids, FEEDS[feed]), expected, **EXACT)
        if feed == "one prompt":
            logits = fed(model, SinkCache(model, SINKS, W), batch, FEEDS[feed], attention_mask=mask)
            for row, pad in enumerate(PADDING):
                torch.testing.assert_close(logits[row : row + 1, pad:], expected[:, : TOKENS - pad], **EXACT)


def test_generate_over_many_calls(case):
    model, ids, _ = case
    said, cache = ids[:, :4], SinkCache(model, SINKS, W)
    for _ in range(3):
        said = model.generate(said, **with_cache(model, cache), max_new_tokens=8, do_sample=False)
        assert cache.get_seq_length() == said.shape[1] - 1
    whole = fed(model, SinkCache(model, SINKS, W), said, [said.shape[1]])
    assert torch.equal(whole[0, 3:-1].argmax(-1), said[0, 4:])
    torch.testing.assert_close(fed(model, cache, said[:, -1:]), whole[:, -1:], **SINGLE_TABLES)


def test_hooks_of_both_in_either_order():
    """A cache that was made before the tokens were added, and one after."""
    model, ids = build("llama"), tokens()
    earlier = SinkCache(model, SINKS, W)
    hf_galore.add_register_tokens(model, OWN)
    later = SinkCache(model, SINKS, W)
    torch.testing.assert_close(fed(model, earlier, ids, [TOKENS]), fed(model, later, ids, [TOKENS]), rtol=0, atol=0)
