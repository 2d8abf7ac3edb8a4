"""Held-out perplexity of GaLore's variants (basis, moments, side, refresh) beside AdamW, LoRA and ReLoRA.

    export OMP_NUM_THREADS=1
    python examples/benchmarks/subspace_ablation.py --study wide --grid --jobs 2 \\
        --methods AdamW "randomized + rotate"
    python examples/benchmarks/subspace_ablation.py --study wide --jobs 2
    python examples/benchmarks/subspace_ablation.py --study wide --table

A small Llama is trained from random weights. Every method has two rates: `lr_matrices` is that of the matrices of
attention and MLP (GaLore's lr·scale; that of the adapters in LoRA), `lr_rest` that of embeddings and norms, which
train in all methods. --grid tries rates with seed 0; without it each method runs with its best ones, or, where it has
no grid of its own, with those of the method that it is tuned like. The study `wide` has all variants, on 4 M
parameters; `final` a few, on 10 M and half as many tokens, with grids of its own. Every finished run adds a line to
the CSV; runs that are in it already are skipped. --lr_matrices and --lr_rest take a part of the grid or extend it.
"""

import argparse
import itertools
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import peft
import result_file
import torch
import transformers
from ablation_run import Method, Run, Study, load, measure

import hf_galore

RESULTS = Path(__file__).with_name("results") / "subspace_ablation.csv"


def galore(subspace: str, moments: str, **options: Any) -> Method:
    return Method("galore", {"subspace": subspace, "moments": moments, **options}, "randomized + rotate")


def streaming(moments: str, **options: Any) -> Method:
    return Method("layerwise", {"refresh": "streaming", "moments": moments, **options}, "randomized + rotate")


METHODS = {
    "AdamW": Method("adamw", {}),
    "svd + keep (the paper)": galore("svd", "keep"),
    "svd + align": galore("svd", "align"),
    "svd + rotate": galore("svd", "rotate"),
    "svd + reset": galore("svd", "reset"),
    "randomized + keep": galore("randomized", "keep"),
    "randomized + align": galore("randomized", "align"),
    "randomized + rotate": galore("randomized", "rotate"),
    "gram + rotate": galore("gram", "rotate"),
    "random + keep": galore("random", "keep"),
    "random + rotate": galore("random", "rotate"),
    "late_random + rotate": galore("late_random", "rotate", random_from=350),
    "right, randomized + rotate": galore("randomized", "rotate", proj_type="right"),
    "right, equal state, randomized + rotate": galore("randomized", "rotate", proj_type="right", equal_state=True),
    "right, svd + keep": galore("svd", "keep", proj_type="right"),
    "randomized + rotate, source=moment": galore("randomized", "rotate", source="moment"),
    "randomized + rotate, stagger": galore("randomized", "rotate", stagger=True),
    "randomized + rotate, lazy": galore("randomized", "rotate", lazy=True),
    "randomized + rotate, bfloat16 basis": galore("randomized", "rotate", basis_dtype="bfloat16"),
    "randomized + rotate, int8 basis": galore("randomized", "rotate", basis_dtype="int8"),
    "randomized + rotate, int4 basis": galore("randomized", "rotate", basis_dtype="int4"),
    "streaming + rotate": streaming("rotate"),
    "streaming + align": streaming("align"),
    "streaming + keep": streaming("keep"),
    "streaming + rotate, source=moment": streaming("rotate", source="moment"),
    "streaming + rotate, all at once": streaming("rotate", stagger=False),
    "streaming + rotate, share_inputs": streaming("rotate", share_inputs=True),
    "streaming + rotate, equal state": streaming("rotate", equal_state=True),
    "streaming + rotate, basis of the inputs": Method(
        "inputs", {"refresh": "streaming", "moments": "rotate"}, "randomized + rotate"
    ),
    "exact, randomized + rotate": Method(
        "layerwise", {"refresh": "exact", "subspace": "randomized", "moments": "rotate"}, "randomized + rotate"
    ),
    "LoRA": Method("lora", {}),
    "ReLoRA": Method("relora", {}),
}
OF_GALORE, OF_ADAPTERS = [1.25e-3, 2.5e-3, 5e-3], [2e-3, 4e-3, 8e-3]
LR_MATRICES = {
    "adamw": [2.5e-4, 5e-4, 1e-3],
    "galore": OF_GALORE,
    "layerwise": OF_GALORE,
    "inputs": OF_GALORE,
    "lora": OF_ADAPTERS,
    "relora": OF_ADAPTERS,
}
LR_REST = [4e-2, 8e-2, 1.6e-1]


def llama(hidden: int, intermediate: int, heads: int, layers: int, vocabulary: int, length: int = 256) -> dict:
    """The arguments of LlamaConfig."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }


WIDE = [name for name in METHODS if name not in ("LoRA", "ReLoRA")]
FINAL = ["AdamW", "svd + keep (the paper)", "randomized + rotate", "streaming + rotate", "LoRA", "ReLoRA"]
STUDIES = {
    "wide": Study(llama(256, 704, 4, 4, 4096), steps=500, rank=64, gap=50, batch=4, methods=WIDE),
    "final": Study(llama(320, 864, 5, 6, 8192), steps=500, rank=80, gap=50, batch=2, methods=FINAL),
}


# Which runs.


def perplexity(line: dict[str, str]) -> float:
    """The line's perplexity; infinite if the run diverged."""
    value = float(line["perplexity"])
    return value if math.isfinite(value) else math.inf


def run_of(line: dict[str, str]) -> Run:
    return Run(line["method"], float(line["lr_matrices"]), float(line["lr_rest"]), int(line["seed"]))


def best(lines: list[dict[str, str]], name: str) -> tuple[Run, str] | None:
    """(the best run of the method's grid, the method whose grid that is); None if there is no grid."""
    for whose in (name, METHODS[name].tuned_like):
        tried = [line for line in lines if line["method"] == whose and line["seed"] == "0"]
        if any(line["rates_from"] == "grid" for line in tried):
            return run_of(min(tried, key=perplexity))._replace(method=name), whose
    return None


def edges(lines: list[dict[str, str]], run: Run, whose: str) -> str:
    """Says which of the run's rates are the least or the greatest of the grid, which should go further then."""
    tried = [run_of(line) for line in lines if line["method"] == whose and line["seed"] == "0"]
    columns = {name: [getattr(other, name) for other in tried] for name in ("lr_matrices", "lr_rest")}
    ends = [name for name, values in columns.items() if getattr(run, name) in (min(values), max(values))]
    return f" ({' and '.join(ends)} at its edge)" if ends else ""


def grid(options: argparse.Namespace) -> dict[Run, str]:
    """The runs that try rates, with where these are from."""
    return {
        Run(name, *rates, seed=0): "grid"
        for name in options.methods
        for rates in itertools.product(options.lr_matrices or LR_MATRICES[METHODS[name].kind], options.lr_rest)
    }


def at_best_rates(options: argparse.Namespace, lines: list[dict[str, str]]) -> dict[Run, str]:
    """The runs of all seeds at the best rates, with the method whose grid these are from."""
    found = {name: best(lines, name) for name in options.methods}
    untuned = dict.fromkeys(METHODS[name].tuned_like or name for name, rates in found.items() if rates is None)
    if untuned:
        first = shlex.join(["--study", options.study, "--grid", "--methods", *untuned])
        raise SystemExit(
            f"{options.results} has no grid of {', '.join(untuned)} for these steps and text; run {first}"
        )
    for run, whose in found.values():
        rates = f"lr_matrices {run.lr_matrices:g}, lr_rest {run.lr_rest:g}"
        print(f"{run.method}: {rates}, from the grid of {whose}{edges(lines, run, whose)}")
    return {run._replace(seed=seed): whose for seed in options.seeds for run, whose in found.values()}


def measure_in_child(*case: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--run", json.dumps(case, default=str)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure_all(options: argparse.Namespace, study: Study, runs: dict[Run, str]) -> int:
    """Adds a line for each run to the CSV and returns how many failed."""
    folder, failed = options.folder / options.study, 0
    load(study, folder, options.text)  # once, before the runs start side by side
    with ThreadPoolExecutor(options.jobs) as pool:
        results = {
            pool.submit(measure_in_child, study, METHODS[run.method], run, folder, options.text): run for run in runs
        }
        for future in as_completed(results):
            run = results[future]
            try:
                append(options, study, run, runs[run], future.result())
            except subprocess.CalledProcessError as error:
                failed += 1
                print(f"failed: {run}\n{error.stderr}", file=sys.stderr, flush=True)
    return failed


# The file.


def read(options: argparse.Namespace, name: str, steps: int) -> list[dict[str, str]]:
    """The lines of the study with this name, text and number of steps."""
    wanted = (name, text_name(options), str(steps))
    return [
        line for line in result_file.read(options.results) if (line["study"], line["text"], line["steps"]) == wanted
    ]


def text_name(options: argparse.Namespace) -> str:
    return options.text.resolve().name if options.text else "standard library"


def append(options: argparse.Namespace, study: Study, run: Run, rates_from: str, result: dict[str, Any]) -> None:
    """Adds one finished run to the CSV."""
    row = {
        "study": options.study,
        **run._asdict(),
        "rates_from": rates_from,
        **result,
        "text": text_name(options),
        "steps": study.steps,
        "tokens": study.steps * study.batch * study.model["max_position_embeddings"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "hf_galore": hf_galore.__version__,
        "command": shlex.join(["python", *sys.argv]),
    }
    result_file.append(options.results, row)


def table(lines: list[dict[str, str]], methods: Sequence[str]) -> str:
    """The methods at their best rates in Markdown, over all seeds, the best first."""
    found = {}
    for name in methods:
        chosen, _ = best(lines, name) or (None, "")
        same = [line for line in lines if chosen and run_of(line)._replace(seed=0) == chosen]
        if same:
            found[name] = same
    means = {name: mean(map(perplexity, same)) for name, same in found.items()}
    columns = ["method", "lr_matrices", "lr_rest", "perplexity", "n", "to AdamW", "refresh s", "state MiB"]
    cells = [columns, ["---"] * len(columns)]
    for name in sorted(found, key=means.__getitem__):
        same = found[name]
        spread = f" ± {stdev(map(perplexity, same)):.2f}" if len(same) > 1 and math.isfinite(means[name]) else ""
        difference = f"{100 * (means[name] / means['AdamW'] - 1):+.1f} %" if "AdamW" in means else ""
        seconds = mean(float(line["refresh_seconds"]) for line in same)
        rates = [f"{float(same[0][column]):g}" for column in ("lr_matrices", "lr_rest")]
        figures = [f"{means[name]:.2f}{spread}", str(len(same)), difference, f"{seconds:.1f}", same[0]["state_mib"]]
        cells.append([name, *rates, *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=STUDIES, default="wide", help="model and length (%(default)s)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all of the study")
    parser.add_argument("--grid", action="store_true", help="try learning rates, with seed 0")
    parser.add_argument("--lr_matrices", nargs="+", type=float, help=f"of the grid (by kind: {LR_MATRICES})")
    parser.add_argument("--lr_rest", nargs="+", type=float, default=LR_REST, help="of the grid (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights and order (%(default)s)")
    parser.add_argument("--steps", type=int, help="default: the study's")
    parser.add_argument("--text", type=Path, help="a folder of text files (default: Python's standard library)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print what the CSV has as a table")
    parser.add_argument("--folder", type=Path, default=Path("runs/subspace_ablation"), help="of tokens (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.methods = options.methods or STUDIES[options.study].methods
    unknown = set(options.methods).difference(METHODS)
    if unknown:
        parser.error(f"argument --methods: no {', '.join(sorted(unknown))} among {', '.join(METHODS)}")
    return options


def main() -> None:
    options = parse()
    if options.run is not None:
        torch.set_num_threads(1)
        study, method, run, folder, text = json.loads(options.run)
        print(json.dumps(measure(Study(*study), Method(*method), Run(*run), Path(folder), text and Path(text))))
        return
    study = STUDIES[options.study]
    study = study._replace(steps=options.steps or study.steps)
    lines = read(options, options.study, study.steps)
    if options.table:
        print(table(lines, options.methods))
        return
    wanted = grid(options) if options.grid else at_best_rates(options, lines)
    done = set(map(run_of, lines))
    runs = {run: rates_from for run, rates_from in wanted.items() if run not in done}
    print(f"{len(runs)} runs to do, {len(wanted) - len(runs)} in {options.results}", flush=True)
    failed = measure_all(options, study, runs) if runs else 0
    if failed:
        raise SystemExit(f"{failed} of {len(runs)} runs failed")


if __name__ == "__main__":
    main()
