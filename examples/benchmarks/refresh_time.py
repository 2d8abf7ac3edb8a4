"""Seconds of a basis refresh by method, against torch.linalg.svd in the same process, and the energy it captures.

    python examples/benchmarks/refresh_time.py      # one thread; writes results/refresh_time.csv, resumable

A row is a shape and a rank. The gradient is synthetic: singular values 1/k on random singular vectors, and white noise
with a hundredth of their energy. `warm` starts from the basis of another gradient, which is this one and half as much
of a third one of the same kind. Times are through `refresh`, with all its guards. The methods take turns, so that what
else the machine does hits all of them alike, and the figures are medians over the rounds; the largest shape has one.
Energy is relative to svd's. Where the previous basis is out of date, a warm refresh takes as long as a cold one.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import result_file
import torch
from conditions import conditions

from hf_galore.subspace import SUBSPACES, captured_energy, refresh, resolve_side

RESULTS = Path(__file__).parent / "results" / "refresh_time.csv"
METHODS = ["svd", "gram", "randomized cold", "randomized warm"]


class Case(NamedTuple):
    """A shape, a rank, and how often it is measured."""

    rows: int
    cols: int
    rank: int
    rounds: int


CASES = [
    Case(2736, 1024, 256, rounds=15),
    Case(2736, 1024, 64, rounds=15),
    Case(4096, 2048, 512, rounds=7),
    Case(4096, 2048, 128, rounds=7),
    Case(4096, 11008, 1024, rounds=1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = finished(options.results, options.threads)
    for case in CASES:
        if case[:3] not in done:
            result_file.append(options.results, measure(*case))


def measure(rows: int, cols: int, rank: int, rounds: int) -> dict[str, object]:
    """The row of a shape and a rank."""
    load = os.getloadavg()[0]
    grad = gradient(rows, cols, seed=0)
    side = resolve_side("std", grad.shape)

    def take(method: str, matrix: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
        return refresh(matrix, rank, side, SUBSPACES[method], previous, seed=0)[0]

    old = take("randomized", grad + 0.5 * gradient(rows, cols, seed=1))
    calls = {
        "randomized warm": partial(take, "randomized", grad, old),
        "randomized cold": partial(take, "randomized", grad),
        "gram": partial(take, "gram", grad),
        "svd": partial(take, "svd", grad),
    }
    energy: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            basis = call()
            times[name].append(time.perf_counter() - start)
            energy[name] = float(captured_energy(grad, basis, side))
    seconds = {name: median(values) for name, values in times.items()}
    return {
        "rows": rows,
        "cols": cols,
        "rank": rank,
        "rounds": rounds,
        **{f"{name} ms": f"{1e3 * seconds[name]:.1f}" for name in METHODS},
        **{f"svd / {name}": f"{seconds['svd'] / seconds[name]:.1f}" for name in METHODS[1:]},
        **{f"{name} energy": f"{energy[name] / energy['svd']:.5f}" for name in METHODS[1:]},
        "old basis energy": f"{float(captured_energy(grad, old, side)) / energy['svd']:.5f}",
        **conditions(load),
    }


def gradient(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Singular values 1/k, k = 1 ... min(rows, cols), on nearly orthonormal normal factors, and 1 % of white noise."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, cols)
    left, right = torch.randn(rows, size, generator=generator), torch.randn(size, cols, generator=generator)
    signal = (left / torch.arange(1, size + 1)) @ right
    noise = torch.randn(rows, cols, generator=generator)
    return signal + 0.1 * signal.norm() / noise.norm() * noise


def finished(path: Path, threads: int) -> set[tuple[int, ...]]:
    """The cases that the CSV holds for this number of threads."""
    rows = [row for row in result_file.read(path) if int(row["threads"]) == threads]
    return {tuple(int(row[name]) for name in ("rows", "cols", "rank")) for row in rows}


if __name__ == "__main__":
    main()
