"""Finds the best learning rates of AdamW and of GaLore for the demo of examples/pretrain.py.

    OMP_NUM_THREADS=1 python examples/benchmarks/learning_rate_grid.py --jobs 2

Both have two rates to tune: that of the matrices which GaLore projects, and that of everything else. GaLore's are
lr·scale and lr. Every finished run adds a line to the CSV; runs that are in it already are skipped. --optim,
--lr_matrices and --lr_rest take a part of the grid or extend it; --seed repeats it.
"""

import argparse
import itertools
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import result_file
import torch
import transformers

import hf_galore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretrain

OPTIMIZERS = [pretrain.ADAMW, "galore_adamw"]
LR_MATRICES = {pretrain.ADAMW: [2.5e-4, 5e-4, 1e-3], "galore_adamw": [6.25e-4, 1.25e-3, 2.5e-3]}
LR_REST = [4e-2, 8e-2, 1.6e-1]
STEPS = 480
RESULTS = Path(__file__).with_name("results") / "learning_rate_grid.csv"

Run = tuple[str, float, float]  # optimizer, lr of the matrices, lr of the rest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--optim", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS, help="whose grid to run")
    parser.add_argument("--lr_matrices", nargs="+", type=float, help=f"default: {LR_MATRICES}")
    parser.add_argument("--lr_rest", nargs="+", type=float, default=LR_REST, help="of everything else")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the split and the order of the data")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV")
    options = parser.parse_args()

    grid = [
        (optim, *rates)
        for optim in options.optim
        for rates in itertools.product(options.lr_matrices or LR_MATRICES[optim], options.lr_rest)
    ]
    done = finished(options.results, options.seed)
    runs = [run for run in grid if run not in done]
    print(f"{len(runs)} runs to do, {len(grid) - len(runs)} in {options.results}", flush=True)
    if not runs:
        return
    pretrain.load_data(settings_of(runs[0], options.seed))  # once, before the runs start side by side
    with ThreadPoolExecutor(options.jobs) as pool:
        results = {pool.submit(pretrain.train_in_child, settings_of(run, options.seed), run[0]): run for run in runs}
        for future in as_completed(results):
            append(options.results, results[future], future.result())


def settings_of(run: Run, seed: int) -> argparse.Namespace:
    """The demo's settings with the run's learning rates, at the grid's length."""
    optim, lr_matrices, lr_rest = run
    settings = pretrain.parse(["--optim", optim, "--seed", str(seed), "--output_dir", "runs/learning_rate_grid"])
    settings.max_steps = STEPS
    if optim == pretrain.ADAMW:
        settings.adamw_lr_matrices, settings.adamw_lr_rest = lr_matrices, lr_rest
    else:
        settings.galore_lr, settings.scale = lr_rest, lr_matrices / lr_rest
    return settings


def finished(path: Path, seed: int) -> set[Run]:
    """The runs of `seed` that the CSV holds."""
    rows = [row for row in result_file.read(path) if int(row["seed"]) == seed]
    return {(row["optimizer"], float(row["lr_matrices"]), float(row["lr_rest"])) for row in rows}


def append(path: Path, run: Run, result: dict) -> None:
    """Adds one finished run to the CSV."""
    settings = result["settings"]
    is_galore = run[0] != pretrain.ADAMW
    row = {
        "optimizer": run[0],
        "lr_matrices": run[1],
        "lr_rest": run[2],
        "rank": settings["rank"] if is_galore else "",
        "gap": settings["update_proj_gap"] if is_galore else "",
        "scale": settings["scale"] if is_galore else "",
        "steps": settings["max_steps"],
        "tokens": settings["max_steps"] * settings["batch_size"] * settings["seq_len"],
        "seed": settings["seed"],
        "perplexity": round(result["perplexity"], 3),
        "tokens_per_second": round(result["tokens_per_second"]),
        **origin(result),
    }
    result_file.append(path, row)


def origin(result: dict) -> dict[str, object]:
    """The last columns of a run of `pretrain.train`: what it ran on, and how it is repeated."""
    return {
        "device": result["device"],
        "threads": result["threads"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_galore": hf_galore.__version__,
        "command": shlex.join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()
