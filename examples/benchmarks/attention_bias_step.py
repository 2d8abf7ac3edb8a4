"""Milliseconds of training and of decoding with an attention bias against the same model without, in one process.

    python examples/benchmarks/attention_bias_step.py      # two threads; writes results/attention_bias_step.csv

A row is an attention implementation, a number of tokens, and `training` (forward and backward pass of one sequence,
no optimizer) or `decoding` (one more token, with so many in a cache). Three copies of a random Llama take turns:
without a bias, with `start="random"` (the paper's) and with `start="noop"` (a gate). The figures are medians over the
rounds. Rows that are in the CSV already are skipped.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import result_file
import torch
import transformers
from conditions import conditions
from sink_cache import random_llama
from transformers import DynamicCache, LlamaForCausalLM
from turns import median_seconds

import hf_galore

RESULTS = Path(__file__).parent / "results" / "attention_bias_step.csv"
KINDS = ("plain", "random", "noop")
IMPLEMENTATIONS = ("sdpa", "eager")
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="60m", help="of the model, a preset (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="(%(default)s)")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--rounds", type=int, default=7, help="training steps of each kind (%(default)s)")
    parser.add_argument("--decoded", type=int, default=100, help="tokens decoded by each kind (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hf_galore.register()
    keys = ("shape", "implementation", "tokens", "phase")
    done = {tuple(row[key] for key in keys) for row in result_file.read(options.results)}
    for implementation in options.implementations:
        for tokens in options.tokens:
            for phase, make, rounds in (
                ("training", training, options.rounds),
                ("decoding", decoding, options.decoded),
            ):
                case = (options.shape, implementation, str(tokens), phase)
                if case not in done:
                    models = {kind: model_of(kind, options.shape, implementation) for kind in KINDS}
                    steps = {kind: make(model, tokens) for kind, model in models.items()}
                    result_file.append(options.results, {**dict(zip(keys, case, strict=True)), **timed(steps, rounds)})


def model_of(kind: str, shape: str, implementation: str) -> LlamaForCausalLM:
    """The preset's model with this bias; all parameters train."""
    model = random_llama(shape)
    model.set_attn_implementation(implementation)
    return model if kind == "plain" else hf_galore.add_attention_bias(model, start=kind)


def training(model: LlamaForCausalLM, tokens: int) -> Step:
    """A forward and a backward pass."""
    ids = torch.randint(model.config.vocab_size, (1, tokens))

    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    return step


def decoding(model: LlamaForCausalLM, tokens: int) -> Step:
    """One more token."""
    prompt = torch.randint(model.config.vocab_size, (1, tokens))
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def step(ids: torch.Tensor = prompt[:, -1:]) -> None:
        model(ids, past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)

    step(prompt)
    return step


def timed(steps: dict[str, Step], rounds: int) -> dict[str, object]:
    """What a row says of steps that take turns."""
    load = os.getloadavg()[0]
    seconds = median_seconds(steps, rounds)
    return {
        **{f"{kind} ms": f"{1e3 * value:.2f}" for kind, value in seconds.items()},
        **{f"{kind} / plain": f"{seconds[kind] / seconds['plain']:.3f}" for kind in KINDS[1:]},
        "rounds": rounds,
        "transformers": transformers.__version__,
        **conditions(load),
    }


if __name__ == "__main__":
    main()
