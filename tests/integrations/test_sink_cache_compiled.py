"""SinkCache under torch.compile: a step is one graph, of shapes that stay, and gives the bits of eager mode."""

import pytest
import torch
from sink_cases import N, S, W, build, tokens
from torch._dynamo.utils import counters
from version_cases import with_cache

from hf_galore import SinkCache

STEPS = 6


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("pads", [[0], [0, 3]], ids=["full", "padded"])
def test_a_step_of_a_full_window_is_one_graph_for_all_positions(pads):
    """Two are made: the first takes the number of tokens seen for a constant, the second does not."""
    model = build("llama", torch.float32, num_hidden_layers=3 - len(pads))
    ids = tokens(2 * N + STEPS, rows=len(pads))
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")

    def given(start, end):
        padding = {"attention_mask": mask[:, :end].clone()} if any(pads) else {}
        return {"input_ids": ids[:, start:end], "position_ids": places[:, start:end], **padding}

    caches = [SinkCache(model, S, W) for _ in range(2)]
    for cache in caches:
        model(**given(0, 2 * N), **with_cache(model, cache))
    for index in range(STEPS):
        inputs = given(2 * N + index, 2 * N + index + 1)
        eager, compiled = (
            call(**inputs, **with_cache(model, cache)).logits
            for call, cache in zip((model, step), caches, strict=True)
        )
        assert torch.equal(compiled, eager)
        assert graphs() == min(index + 1, 2)


def test_generate_with_a_compiled_forward_pass():
    """The prompt breaks into graphs, as padding is looked for in it; later calls add none for their steps."""
    model, ids = build("llama", torch.float32, num_hidden_layers=1), tokens(N)
    options = {"max_new_tokens": STEPS, "do_sample": False}
    expected = model.generate(ids, **with_cache(model, SinkCache(model, S, W)), **options)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    cache = SinkCache(model, S, W)
    assert not cache.is_compileable  # generate() compiles nothing itself
    assert torch.equal(model.generate(ids, **with_cache(model, cache), **options), expected)
    before = graphs()
    model.generate(expected, **with_cache(model, cache), **options)
    assert graphs() == before
