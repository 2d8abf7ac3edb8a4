"""Milliseconds of an optimizer step: native ops, their references in Python, galore-torch and torch's fused AdamW.

    python examples/benchmarks/native_step.py      # two threads; writes results/native_step.csv, resumable
    python examples/benchmarks/native_step.py --shapes tiny --rounds 3 --results /tmp/try.csv

A row is the matrices of a model's layers (examples/presets.py), the dtypes of weights and states, and a rank. Steps
are between two refreshes; gradients are given. The four take turns in one process, and so do a copy of 256 MiB and a
square product of 1024, from which the bound comes; figures are medians over the rounds. galore-torch and fused AdamW
keep states in the dtype of the weights: in the rows with other states they are the same as in the others.

Bytes and flops count each number once: project reads G and the basis and writes R; the rest reads R, the basis and the
moments and writes W and the moments. Each of the two takes at least max(bytes / copy bandwidth, flops / rate of the
product), and the bound is their sum.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import result_file
import torch
from conditions import conditions
from torch import Tensor
from torch.nn import Parameter
from turns import median_seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from presets import PRESETS

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit, native
from hf_galore.ops import product_dtype
from hf_galore.subspace import resolve_side

RESULTS = Path(__file__).parent / "results" / "native_step.csv"
LAYERS = {"60m": 8, "350m": 4, "tiny": 2}  # how many of the model's layers
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8 bits": 1 + 4 / 256}
KINDS = ("native", "reference", "galore-torch", "fused AdamW")
COPIED = 1 << 26  # float32 numbers
SQUARE = 1024


class Case(NamedTuple):
    """Whose matrices, in which dtypes, and the rank as a part of the hidden size."""

    shape: str
    weights: str
    states: str
    part: int

    @property
    def rank(self) -> int:
        return PRESETS[self.shape].hidden_size // self.part

    @property
    def matrices(self) -> list[tuple[int, int]]:
        shape = PRESETS[self.shape]
        width, inner = shape.hidden_size, shape.intermediate_size
        return [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner)] * LAYERS[self.shape]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind (%(default)s)")
    parser.add_argument("--shapes", nargs="+", choices=LAYERS, default=["60m", "350m"], help="whose matrices")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if native.cpu_kernels() is None:
        sys.exit(f"there are no native ops to measure: {native.reasons_for_none()['cpu']}")
    rows = result_file.read(options.results)
    done = {(row["shape"], row["weights"], row["states"], int(row["rank"])) for row in rows}
    for case in cases(options.shapes):
        if (*case[:3], case.rank) not in done:
            result_file.append(options.results, measure(case, options.rounds))


def cases(shapes: Iterable[str]) -> list[Case]:
    return [
        Case(shape, weights, states, part)
        for shape in shapes
        for weights in DTYPES
        for states in STATE_BYTES
        for part in (4, 16)
    ]


def measure(case: Case, rounds: int) -> dict[str, object]:
    """The row of a case."""
    load = os.getloadavg()[0]
    calls = {kind: step_of(kind, case) for kind in KINDS} | {"copy": copy_of(), "product": product_of(case)}
    seconds = median_seconds(calls, rounds)
    bandwidth, rate = 8 * COPIED / seconds["copy"], 2 * SQUARE**3 / seconds["product"]
    moved, flops, bound = work_of(case, bandwidth, rate)
    return {
        "shape": case.shape,
        "layers": LAYERS[case.shape],
        "weights": case.weights,
        "states": case.states,
        "rank": case.rank,
        **{f"{kind} ms": f"{1e3 * seconds[kind]:.2f}" for kind in KINDS},
        **{f"{kind} / native": f"{seconds[kind] / seconds['native']:.2f}" for kind in KINDS[1:]},
        "GB": f"{moved / 1e9:.3f}",
        "GFLOP": f"{flops / 1e9:.2f}",
        "copy GB/s": f"{bandwidth / 1e9:.1f}",
        "product GFLOP/s": f"{rate / 1e9:.0f}",
        "bound ms": f"{1e3 * bound:.2f}",
        "part of bound": f"{bound / seconds['native']:.2f}",
        "rounds": rounds,
        "kernels": native.cpu_kernels(),
        **conditions(load),
    }


def work_of(case: Case, bandwidth: float, rate: float) -> tuple[float, float, float]:
    """Bytes, flops, and the seconds that these take at least."""
    weight, state = DTYPES[case.weights].itemsize, STATE_BYTES[case.states]
    # A basis is kept as states are, but in float32 beside 8-bit moments.
    basis = 4.0 if case.states == "8 bits" else state
    moved = flops = bound = 0.0
    for m, n in case.matrices:
        side = resolve_side("std", (m, n))
        rank = min(case.rank, m, n)
        low, factor = torch.Size(side.low_rank(m, n, rank)).numel(), side.sizes(m, n)[0] * rank
        product = 2.0 * m * n * rank
        project = weight * m * n + basis * factor + 4 * low
        rest = 4 * low + basis * factor + 4 * state * low + 2 * weight * m * n
        moved, flops = moved + project + rest, flops + 2 * product
        bound += sum(max(part / bandwidth, product / rate) for part in (project, rest))
    return moved, flops, bound


def step_of(kind: str, case: Case) -> Callable[[], object]:
    """A step of one kind, on weights of its own; the first one has been taken, with its refresh."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in case.matrices:
        params.append(Parameter(torch.randn(shape, generator=generator).to(DTYPES[case.weights])))
        params[-1].grad = torch.randn(shape, generator=generator).to(DTYPES[case.weights])
    step = optimizer_of(kind, params, case).step
    step()
    if kind != "reference":
        return step

    def reference() -> None:
        with native.references_only():
            step()

    return reference


def optimizer_of(kind: str, params: list[Parameter], case: Case) -> torch.optim.Optimizer:
    if kind == "fused AdamW":
        return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=True)
    group = {"params": params, "rank": case.rank, "update_proj_gap": 1 << 30, "scale": 0.25, "proj_type": "std"}
    if kind == "galore-torch":
        import galore_torch

        return galore_torch.GaLoreAdamW([group], lr=1e-3, weight_decay=0.1, no_deprecation_warning=True)
    if case.states == "8 bits":
        return GaLoreAdamW8bit([group], lr=1e-3, weight_decay=0.1)
    return GaLoreAdamW([group], lr=1e-3, weight_decay=0.1, state_dtype=case.states)


def copy_of() -> Callable[[], Tensor]:
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product_of(case: Case) -> Callable[[], Tensor]:
    """A product in the precision in which weights of this dtype are projected."""
    dtype = product_dtype(DTYPES[case.weights], torch.device("cpu"))
    one, other = torch.randn(SQUARE, SQUARE).to(dtype), torch.randn(SQUARE, SQUARE).to(dtype)
    return lambda: one @ other


if __name__ == "__main__":
    main()
