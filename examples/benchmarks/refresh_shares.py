"""What a warm refresh of `randomized` spends its time on: products, triangular solves, the eigendecomposition, other.

    python examples/benchmarks/refresh_shares.py      # one thread; writes results/refresh_shares.csv

It says what native kernels for the orthonormalisation could win: no more than all that is not a product. Gradients and
previous bases are those of refresh_time.py. Shares are of the processor time that torch's profiler gives to operators;
what Python spends between them is not in it.
"""

import argparse
import os
from pathlib import Path

import result_file
import torch
from conditions import conditions
from refresh_time import CASES, gradient
from torch.profiler import ProfilerActivity, profile

from hf_galore.subspace import SUBSPACES, refresh, resolve_side

RESULTS = Path(__file__).parent / "results" / "refresh_shares.csv"
KINDS = {
    "products": ("aten::mm", "aten::addmm_", "aten::addmm", "aten::bmm"),
    "triangular solves": ("aten::linalg_solve_triangular",),
    "Cholesky": ("aten::linalg_cholesky_ex",),
    "eigh": ("aten::_linalg_eigh",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="refreshes of each shape (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES[:-1]:
        load = os.getloadavg()[0]
        row = {
            **case._asdict(),
            "rounds": options.rounds,
            **shares(*case[:3], options.rounds),
            **conditions(load),
        }
        result_file.append(options.results, row)


def shares(rows: int, cols: int, rank: int, rounds: int) -> dict[str, str]:
    """Milliseconds of a warm refresh, and the percentage of each kind of operator."""
    grad, method = gradient(rows, cols, seed=0), SUBSPACES["randomized"]
    side = resolve_side("std", grad.shape)
    old, _ = refresh(grad + 0.5 * gradient(rows, cols, seed=1), rank, side, method, None, seed=0)
    refresh(grad, rank, side, method, old, seed=0)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(rounds):
            refresh(grad, rank, side, method, old, seed=0)
    spent = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    whole = sum(spent.values())
    found = {kind: sum(spent.get(name, 0.0) for name in names) / whole for kind, names in KINDS.items()}
    found["rest"] = 1.0 - sum(found.values())
    return {"ms": f"{whole / 1e3 / rounds:.1f}", **{f"{kind} %": f"{100 * part:.1f}" for kind, part in found.items()}}


if __name__ == "__main__":
    main()
