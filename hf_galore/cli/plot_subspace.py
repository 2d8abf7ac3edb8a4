"""python -m hf_galore plot-subspace RUN_DIR: how low-rank the gradients of a run were, and how its bases turned."""

import argparse
import importlib.util
import json
from pathlib import Path
from statistics import median

PREFIX = "subspace/"
PANELS = {
    "captured_energy": "energy of the gradient in the basis",
    "overlap": "overlap with the basis before",
    "stable_rank": "stable rank of the gradient",
}

# {measure: {parameter: [(step, value), …]}}
Curves = dict[str, dict[str, list[tuple[int, float]]]]


def kind(parameter: str) -> str:
    """What a parameter is in its layer, such as `q_proj`."""
    return parameter.removesuffix(".weight").rpartition(".")[2]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `plot-subspace` to the command line."""
    text = 'draw the statistics that a Trainer logged with optim_args="statistics=true"'
    parser = subparsers.add_parser("plot-subspace", help=text, description=text)
    parser.add_argument("run_dir", type=Path, help="the Trainer's output_dir, or one of its checkpoints")
    parser.add_argument("--out", type=Path, help="the picture (default: RUN_DIR/subspace.png)")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> None:
    """Print a table of medians and draw the curves of all matrices."""
    curves = read(args.run_dir)
    print(table(curves))
    out = args.out or args.run_dir / "subspace.png"
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("plot-subspace needs matplotlib: pip install matplotlib")
    from hf_galore.integrations.matplotlib import draw

    draw(curves, PANELS, out)
    print(f"picture: {out}")


def read(run_dir: Path) -> Curves:
    """The curves in the latest trainer_state.json under `run_dir`.

    Raises:
        SystemExit: there is none, or it has no statistics.
    """
    files = [file for file in (run_dir, *run_dir.glob("checkpoint-*")) if (file / "trainer_state.json").exists()]
    states = [json.loads((file / "trainer_state.json").read_text()) for file in files]
    if not states:
        raise SystemExit(f"{run_dir} has no trainer_state.json: save a checkpoint, or call trainer.save_state()")
    curves: Curves = {measure: {} for measure in PANELS}
    for log in max(states, key=lambda state: state["global_step"])["log_history"]:
        for key, value in log.items():
            parameter, _, measure = key.removeprefix(PREFIX).rpartition("/")
            if key.startswith(PREFIX) and measure in curves:
                curves[measure].setdefault(parameter, []).append((log["step"], value))
    if not any(curves.values()):
        raise SystemExit(f'{run_dir} has no statistics of bases: train with optim_args="statistics=true"')
    return curves


def table(curves: Curves) -> str:
    """Medians over the matrices of a kind, at the first and the last refresh, in Markdown."""
    kinds = sorted({kind(parameter) for lines in curves.values() for parameter in lines})
    rows = [["matrices", *(f"{measure}, first → last" for measure in PANELS)]]
    rows.append(["---"] * len(rows[0]))
    for name in kinds:
        cells = []
        for measure in PANELS:
            lines = [line for parameter, line in curves[measure].items() if kind(parameter) == name]
            ends = [f"{median(line[end][1] for line in lines):.3g}" for end in (0, -1)] if lines else ["-"]
            cells.append(" → ".join(ends))
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
