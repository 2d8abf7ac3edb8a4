"""Held-out perplexity of a ternary model beside the same model with full-precision weights, by AdamW and by GaLore.

    OMP_NUM_THREADS=1 python examples/benchmarks/bitnet_perplexity.py --grid --jobs 2
    OMP_NUM_THREADS=1 python examples/benchmarks/bitnet_perplexity.py --jobs 2
    OMP_NUM_THREADS=1 python examples/benchmarks/bitnet_perplexity.py --text gutenberg --jobs 2
    python examples/benchmarks/bitnet_perplexity.py --table

The demo of examples/pretrain.py (8.7 M parameters), from random weights, on the same tokens in the same order.
Full-precision models have the demo's rates, which are the best of learning_rate_grid.csv; --grid tries the rate of the
matrices for the ternary ones, with seed 0 on the standard library, and without it every method runs with its best one.
Every finished run adds a line to the CSV; runs that are in it already are skipped.
"""

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import result_file
from learning_rate_grid import origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretrain

RESULTS = Path(__file__).with_name("results") / "bitnet_perplexity.csv"
STANDARD = "standard library"
GALORE = "galore_adamw"
FACTORS = [0.5, 1.0, 2.0, 4.0]  # times the demo's rate of the matrices


class Method(NamedTuple):
    """An optimizer, on ternary or on full-precision matrices."""

    optim: str
    bitlinear: bool


METHODS = {
    "full precision, AdamW": Method(pretrain.ADAMW, False),
    "full precision, GaLore": Method(GALORE, False),
    "ternary, AdamW": Method(pretrain.ADAMW, True),
    "ternary, GaLore": Method(GALORE, True),
}


class Run(NamedTuple):
    """What makes a line of the CSV."""

    method: str
    factor: float
    text: str
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--grid", action="store_true", help="try rates of the ternary models")
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, help="of the grid (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights and order (%(default)s)")
    parser.add_argument("--text", type=Path, help="a folder of text files (default: Python's standard library)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print what the CSV has as a table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (%(default)s)")
    options = parser.parse_args()
    lines = [line_of(row) for row in result_file.read(options.results)]
    if options.table:
        print(table(lines))
        return
    wanted = grid(options) if options.grid else at_best_rates(options, lines)
    done = {run for run, _ in lines}
    runs = [run for run in wanted if run not in done]
    print(f"{len(runs)} runs to do, {len(wanted) - len(runs)} in {options.results}", flush=True)
    if runs:
        measure(runs, options)


def line_of(row: dict[str, str]) -> tuple[Run, float]:
    run = Run(row["method"], float(row["factor"]), row["text"], int(row["seed"]))
    return run, float(row["perplexity"])


def grid(options: argparse.Namespace) -> list[Run]:
    """The runs that try rates."""
    ternary = [name for name, method in METHODS.items() if method.bitlinear]
    return [Run(name, factor, STANDARD, 0) for name in ternary for factor in options.factors]


def at_best_rates(options: argparse.Namespace, lines: Iterable[tuple[Run, float]]) -> list[Run]:
    """The runs of all methods and seeds."""
    text = options.text.resolve().name if options.text else STANDARD
    return [Run(name, best_factor(name, lines), text, seed) for seed in options.seeds for name in METHODS]


def best_factor(name: str, lines: Iterable[tuple[Run, float]]) -> float:
    """The factor of the method's best line on the standard library with seed 0; 1 for full-precision models."""
    if not METHODS[name].bitlinear:
        return 1.0
    tried = {run.factor: value for run, value in lines if (run.method, run.text, run.seed) == (name, STANDARD, 0)}
    if not tried:
        raise SystemExit(f"there is no grid of {name}; run --grid first")
    best = min(tried, key=tried.__getitem__)
    if best in (min(tried), max(tried)):
        print(f"{name}: the best factor, {best:g}, is at the edge of the grid")
    return best


def measure(runs: list[Run], options: argparse.Namespace) -> None:
    """Adds a line to the CSV for each run."""
    pretrain.load_data(settings_of(runs[0], options.text))  # once, before the runs start side by side
    with ThreadPoolExecutor(options.jobs) as pool:
        started = {
            pool.submit(pretrain.train_in_child, settings_of(run, options.text), METHODS[run.method].optim): run
            for run in runs
        }
        for future in as_completed(started):
            run, result = started[future], future.result()
            settings = result["settings"]
            row = {
                **run._asdict(),
                "perplexity": round(result["perplexity"], 3),
                "lr_matrices": matrix_rate(METHODS[run.method].optim, settings),
                "steps": settings["max_steps"],
                "tokens": settings["max_steps"] * settings["batch_size"] * settings["seq_len"],
                "parameters": result["parameters"],
                "tokens_per_second": round(result["tokens_per_second"]),
                **origin(result),
            }
            result_file.append(options.results, row)


def settings_of(run: Run, text: Path | None) -> argparse.Namespace:
    """The demo's settings with the run's rate of the matrices."""
    method = METHODS[run.method]
    folder = f"runs/bitnet_perplexity/{run.text.replace(' ', '_')}"
    arguments = ["--optim", method.optim, "--seed", str(run.seed), "--output_dir", folder]
    settings = pretrain.parse([*arguments, *(["--text", str(text)] if run.text != STANDARD else [])])
    settings.bitlinear = method.bitlinear
    if method.optim == GALORE:
        settings.scale *= run.factor
    else:
        settings.adamw_lr_matrices *= run.factor
    return settings


def matrix_rate(optim: str, settings: dict) -> float:
    """The learning rate of the matrices; GaLore's is lr·scale."""
    return settings["galore_lr"] * settings["scale"] if optim == GALORE else settings["adamw_lr_matrices"]


def table(lines: list[tuple[Run, float]]) -> str:
    """Means over the seeds in Markdown, by text, and of each seed's gap to full precision by the same optimizer."""
    rows = ["| text | method | perplexity | n | to full precision |", "|---|---|---|---|---|"]
    for text in dict.fromkeys(run.text for run, _ in lines):
        found: dict[str, dict[int, float]] = {}  # by method and seed
        for name, method in METHODS.items():
            factor = best_factor(name, lines)
            found[name] = {run.seed: value for run, value in lines if run[:3] == (name, factor, text)}
            if found[name]:
                cells = [text, name, with_spread(list(found[name].values()), ".2f"), str(len(found[name]))]
                dense = next(found[one] for one, other in METHODS.items() if other == (method.optim, False))
                gaps = [100 * (value / dense[seed] - 1) for seed, value in found[name].items() if seed in dense]
                cells.append(f"{with_spread(gaps, '+.1f')} %" if gaps and method.bitlinear else "")
                rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def with_spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


if __name__ == "__main__":
    main()
