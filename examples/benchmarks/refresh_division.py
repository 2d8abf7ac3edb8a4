"""Seconds of a refresh of all bases when ranks divide it among them, against each rank doing all of it.

    OMP_NUM_THREADS=1 python examples/benchmarks/refresh_division.py

GaLoreAdamW steps with T = 1 on the matrices of two layers of the 60m shape, with gradients that both ranks have, as
under DDP; `optimizer.replicas`, which the Trainer sets, is the group of both or None, in turns. Each rank has one
thread. `wall` is the optimizer's refresh_seconds, `cpu` the processor time of the rank's process in that step less
that of a step without a refresh; each from the shortest of the rounds, of the rank that took longer. The machine need
not be idle: what else runs lengthens `wall`, most of all where ranks wait for each other, and hardly `cpu`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import result_file
import torch
import torch.distributed as dist

from hf_galore import GaLoreAdamW
from hf_galore.cli.env import environment

RESULTS = Path(__file__).parent / "results" / "refresh_division.csv"
SHAPES = ([(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]) * 2
RANK, NEVER = 128, 10**9
SUBSPACES = ("svd", "randomized")
TEAMS = ("alone", "divided")


def seconds(subspace: str, rounds: int) -> dict[str, dict[str, float]]:
    """The shortest wall and processor seconds of this rank, alone and divided."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    group = {"params": params, "rank": RANK, "update_proj_gap": 1, "scale": 0.25, "subspace": subspace}
    optimizer = GaLoreAdamW([group], lr=1e-3)
    optimizer.step()  # randomized starts from a basis from then on
    best = {team: {"wall": float("inf"), "cpu": float("inf")} for team in ("alone", "divided", "none")}
    for _ in range(rounds):
        for team in best:
            optimizer.replicas = dist.group.WORLD if team == "divided" else None
            optimizer.param_groups[0]["update_proj_gap"] = NEVER if team == "none" else 1
            dist.barrier()
            wall, cpu = optimizer.refresh_seconds, time.process_time()
            optimizer.step()
            found = {"wall": optimizer.refresh_seconds - wall, "cpu": time.process_time() - cpu}
            best[team] = {name: min(best[team][name], value) for name, value in found.items()}
    without = best.pop("none")["cpu"]
    return {team: {"wall": times["wall"], "cpu": times["cpu"] - without} for team, times in best.items()}


def measure(subspace: str, ranks: int, rounds: int) -> dict[str, object]:
    """The row of a basis method."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        case = json.dumps([subspace, rounds, folder])
        command = [sys.executable, *torchrun, __file__, "--case", case]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        found = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    worst = {team: {name: max(rank[team][name] for rank in found) for name in ("wall", "cpu")} for team in TEAMS}
    return {
        "subspace": subspace,
        "ranks": ranks,
        "rounds": rounds,
        **{f"{name} {team}": f"{worst[team][name]:.3f}" for name in ("wall", "cpu") for team in TEAMS},
        **{f"{name} ratio": f"{worst['alone'][name] / worst['divided'][name]:.2f}" for name in ("wall", "cpu")},
        "load": f"{load:.2f}-{os.getloadavg()[0]:.2f}",
        "device": environment()["devices"]["cpu"],
        "torch": torch.__version__,
        "command": shlex.join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (%(default)s)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        subspace, rounds, folder = json.loads(options.case)
        dist.init_process_group("gloo")
        (Path(folder) / f"rank{dist.get_rank()}.json").write_text(json.dumps(seconds(subspace, rounds)))
        dist.destroy_process_group()
        return
    done = {(row["subspace"], int(row["ranks"])) for row in result_file.read(options.results)}
    for subspace in SUBSPACES:
        if (subspace, options.ranks) not in done:
            result_file.append(options.results, measure(subspace, options.ranks, options.rounds))


if __name__ == "__main__":
    main()
