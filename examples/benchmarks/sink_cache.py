"""Milliseconds per token with SinkCache, with DynamicCache at the same length, and with recomputation of the window.

    python examples/benchmarks/sink_cache.py                    # one thread; writes results/sink_cache.csv, resumable
    python examples/benchmarks/sink_cache.py --endless 100000   # writes results/sink_cache_memory.csv

A row of the first file is a window: the tokens that are kept, 4 sinks included. The three take turns on a random Llama
of the 60m shape of examples/presets.py, greedy tokens one by one, and the figures are medians. DynamicCache holds as
many tokens as the SinkCache and is cut back after each; recomputation runs the model on the whole window for one more
token, as a sliding window without a cache must. The paper (arXiv 2309.17453) reports up to 22.2 times for the last.

--endless generates so many tokens with generate() in a process of its own, and writes the resident memory and the
speed at every twentieth of the way.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import result_file
import torch
import transformers
from conditions import conditions
from turns import median_seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from presets import PRESETS
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_galore import SinkCache
from hf_galore.integrations.streaming import Figures, Meter, stream

RESULTS = Path(__file__).parent / "results"
WINDOWS = (256, 512, 1024)
N_SINK = 4
KINDS = ("SinkCache", "DynamicCache", "recomputation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=PRESETS, default="60m", help="of the model (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(%(default)s)")
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS, help="tokens kept (%(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="tokens of each kind (%(default)s)")
    parser.add_argument("--endless", type=int, metavar="TOKENS", help="measure memory over so many tokens instead")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the CSV (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_llama(options.shape).to(getattr(torch, options.dtype))
    if options.endless:
        endless(model, options)
        return
    path = options.results / "sink_cache.csv"
    keys = ("shape", "dtype", "window")
    done = {tuple(row[key] for key in keys) for row in result_file.read(path)}
    for window in options.windows:
        if (options.shape, options.dtype, str(window)) not in done:
            result_file.append(path, measure(model, window, options))


def random_llama(shape: str) -> LlamaForCausalLM:
    """The preset's model with random weights."""
    torch.manual_seed(0)
    preset = PRESETS[shape]
    config = LlamaConfig(
        vocab_size=preset.vocab_size,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_attention_heads=preset.heads,
        num_hidden_layers=preset.layers,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def measure(model: LlamaForCausalLM, window: int, options: argparse.Namespace) -> dict[str, object]:
    """The row of a window."""
    load = os.getloadavg()[0]
    prompt = torch.randint(model.config.vocab_size, (1, window))
    steps = steps_of(model, prompt)
    seconds = median_seconds(steps, options.rounds, warm_up=3)
    return {
        "shape": options.shape,
        "dtype": options.dtype,
        "window": window,
        **{f"{kind} ms": f"{1e3 * seconds[kind]:.2f}" for kind in KINDS},
        "SinkCache / DynamicCache": f"{seconds['SinkCache'] / seconds['DynamicCache']:.3f}",
        "recomputation / SinkCache": f"{seconds['recomputation'] / seconds['SinkCache']:.2f}",
        "rounds": options.rounds,
        "transformers": transformers.__version__,
        **conditions(load),
    }


def steps_of(model: LlamaForCausalLM, prompt: torch.Tensor) -> dict[str, Callable[[], None]]:
    """One more token of each kind."""
    sink = SinkCache(model, N_SINK, prompt.shape[1] - N_SINK)
    dynamic = DynamicCache(config=model.config)
    for cache in (sink, dynamic):
        model(prompt, past_key_values=cache, logits_to_keep=1)
    dynamic.crop(-1)
    token = prompt[:, -1:]

    def with_dynamic() -> None:
        model(token, past_key_values=dynamic)
        dynamic.crop(-1)

    def with_sinks() -> None:
        model(token, past_key_values=sink)

    def anew() -> None:
        model(prompt, use_cache=False, logits_to_keep=1)

    return dict(zip(KINDS, (with_sinks, with_dynamic, anew), strict=True))


def endless(model: LlamaForCausalLM, options: argparse.Namespace) -> None:
    """Rows of memory and speed, each written as soon as it is known."""
    origin = conditions(os.getloadavg()[0])  # what it imports is in memory before the first row

    def write(window: int, figures: Figures) -> None:
        row = {
            "shape": options.shape,
            "dtype": options.dtype,
            "window": window,
            "tokens": figures.tokens,
            "tokens_per_second": f"{figures.tokens_per_second:.1f}",
            "cache_bytes": figures.cache_bytes,
            "process_bytes": figures.process_bytes,
            "transformers": transformers.__version__,
            **origin,
        }
        result_file.append(options.results / "sink_cache_memory.csv", row)

    for window in options.windows:
        cache = SinkCache(model, N_SINK, window - N_SINK)
        meter = Meter(cache, every=max(1, options.endless // 20), report=partial(write, window))
        stream(model, torch.randint(model.config.vocab_size, (1, 8)), meter, options.endless, do_sample=False)


if __name__ == "__main__":
    main()
