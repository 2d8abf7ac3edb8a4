"""Milliseconds of a training step with BitLinear against nn.Linear and a plain straight-through layer, in one process.

    python examples/benchmarks/bitlinear_step.py      # two threads; writes results/bitlinear_step.csv, resumable
    python examples/benchmarks/bitlinear_step.py --cases 60m --micro_batches 1 --rounds 2      # a part of it

A row is a case (one layer of 2048 x 2048, or the 60m model of examples/presets.py), a number of tokens and of
micro-batches in a step. nn.Linear and the straight-through layer have bfloat16 weights, BitLinear float32 masters; all
three are given bfloat16 inputs, and all take a step of torch's fused AdamW. The straight-through layer rounds anew in
every forward pass, `x + (Q(x) - x).detach()`. The three take turns, and the figures are medians over the rounds.
"""

import argparse
import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import result_file
import torch
from conditions import conditions
from torch import Tensor, nn
from torch.nn.functional import linear
from turns import median_seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from presets import PRESETS
from transformers import LlamaConfig, LlamaForCausalLM

from hf_galore import replace_linear
from hf_galore.nn.bitlinear import BitLinear

RESULTS = Path(__file__).parent / "results" / "bitlinear_step.csv"
WIDTH, MODEL = 2048, "60m"
KINDS = ("nn.Linear", "straight-through", "BitLinear")
NAMES, TOKENS, MICRO_BATCHES = (f"layer {WIDTH} x {WIDTH}", MODEL), (128, 512, 2048), (1, 8)


class StraightThroughLinear(nn.Linear):
    """BitLinear as it is usually written."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean().clamp(min=1e-5)
        weight = (self.weight / scale).round().clamp(-1, 1) * scale
        a = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        tokens = (x * a).round().clamp(-128, 127) / a
        return linear(x + (tokens - x).detach(), self.weight + (weight - self.weight).detach(), self.bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (%(default)s)")
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=NAMES, help="(all)")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="of a micro-batch (%(default)s)")
    parser.add_argument("--micro_batches", nargs="+", type=int, default=MICRO_BATCHES, help="in a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each kind (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = {(row["case"], int(row["tokens"]), int(row["micro_batches"])) for row in result_file.read(options.results)}
    for case in product(options.cases, options.tokens, options.micro_batches):
        if case not in done:
            result_file.append(options.results, measure(*case, options.rounds))


def measure(case: str, tokens: int, micro_batches: int, rounds: int) -> dict[str, object]:
    """The row of a case."""
    load = os.getloadavg()[0]
    make = model_step if case == MODEL else layer_step
    steps = {kind: make(kind, tokens, micro_batches) for kind in KINDS}
    seconds = median_seconds(steps, rounds)
    return {
        "case": case,
        "tokens": tokens,
        "micro_batches": micro_batches,
        **{f"{kind} ms": f"{1e3 * seconds[kind]:.1f}" for kind in KINDS},
        **{f"{kind} / nn.Linear": f"{seconds[kind] / seconds['nn.Linear']:.2f}" for kind in KINDS[1:]},
        "rounds": rounds,
        **conditions(load),
    }


def layer_step(kind: str, tokens: int, micro_batches: int) -> Callable[[], None]:
    """A training step of one layer."""
    torch.manual_seed(0)
    made = {"nn.Linear": nn.Linear, "straight-through": StraightThroughLinear, "BitLinear": BitLinear}[kind]
    layer = made(WIDTH, WIDTH, bias=False)
    if kind != "BitLinear":
        layer.bfloat16()
    x = torch.randn(tokens, WIDTH).bfloat16().requires_grad_()
    gy = torch.randn(tokens, WIDTH).bfloat16()
    return _step(layer, micro_batches, lambda: layer(x).backward(gy))


def model_step(kind: str, tokens: int, micro_batches: int) -> Callable[[], None]:
    """A training step of the model."""
    torch.manual_seed(0)
    shape = PRESETS[MODEL]
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.heads,
        num_hidden_layers=shape.layers,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).bfloat16()
    if kind == "BitLinear":
        replace_linear(model)
    elif kind == "straight-through":
        for name, module in model.named_modules():
            if type(module) is nn.Linear and name != "lm_head":
                module.__class__ = StraightThroughLinear
    ids = torch.randint(0, model.config.vocab_size, (max(1, tokens // 256), min(tokens, 256)))
    return _step(model, micro_batches, lambda: model(ids, labels=ids).loss.backward())


def _step(module: nn.Module, micro_batches: int, backward: Callable[[], None]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        for _ in range(micro_batches):
            backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
