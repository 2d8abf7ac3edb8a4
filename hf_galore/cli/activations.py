"""python -m hf_galore activations MODEL --text FILE: where a model has massive activations, and what they do."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from hf_galore.attention.activations import landscape
from hf_galore.attention.criterion import Criterion
from hf_galore.attention.interventions import CHANGES, intervention_perplexity
from hf_galore.attention.perplexity import evaluation
from hf_galore.attention.report import ActivationReport, markdown_table

_PANELS, _TOKENS = 6, 24  # at most so many landscapes, of so many tokens


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `activations` to the command line."""
    text = "report the massive activations and attention sinks of a causal language model"
    parser = subparsers.add_parser("activations", help=text, description=text)
    parser.add_argument("model", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a text in UTF-8")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write report.md, report.json and pictures there")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (default: 512)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences at a time (default: 1)")
    parser.add_argument("--sequences", type=int, help="how many at most (default: the whole text)")
    parser.add_argument("--top", type=int, default=3, help="how many largest magnitudes to report (default: 3)")
    parser.add_argument("--magnitude", type=float, default=100.0, help="a massive one is above this (default: 100)")
    parser.add_argument("--ratio", type=float, default=1000.0, help="... and above so many medians (default: 1000)")
    parser.add_argument("--no-attention", dest="attention", action="store_false", help="leave the sinks out")
    parser.add_argument(
        "--interventions",
        nargs="*",
        metavar="CHANGE",
        help=f"perplexity with massive activations changed: zero, mean, or a factor (default: {' '.join(CHANGES)})",
    )
    parser.add_argument("--blocks", type=int, nargs="+", help="... after these blocks (default: where they are born)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--dtype", default="auto", help="of the model (default: that of the checkpoint)")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> None:
    """Print the tables; with --output, write them, all numbers and the pictures."""
    if not args.text.is_file():
        raise SystemExit(f"activations: {args.text} is not a file")
    if args.output is not None and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("activations --output needs matplotlib: pip install matplotlib")
    try:
        _report(args)
    except (ValueError, TypeError, OSError) as error:  # of the arguments, the model or the text; each names its cause
        raise SystemExit(f"activations: {error}") from error


def _report(args: argparse.Namespace) -> None:
    criterion = Criterion(args.magnitude, args.ratio)
    changes = None if args.interventions is None else [_change(one) for one in args.interventions or CHANGES]
    from hf_galore.integrations.activations import TextBatches, delimiter_ids, load, massive_activations

    model, tokenizer = load(args.model, dtype=args.dtype, device=args.device, length=args.length)
    batches = TextBatches(tokenizer, args.text, args.length, args.batch_size, args.sequences, args.device)
    report = massive_activations(
        model,
        batches,
        top=args.top,
        delimiters=delimiter_ids(tokenizer),
        criterion=criterion,
        attention=args.attention,
    )
    seen = {one.token for block in report.blocks for one in block.strongest}
    seen |= {site.strongest.token for site in report.sites}
    names = {token: repr(tokenizer.decode([token])) for token in seen if token is not None}
    text, numbers = report.to_markdown(names), report.to_dict()
    if changes is not None and not report.sites:
        text += "\n\nThere is nothing to change, and no perplexity of it."
    elif changes is not None:
        found = intervention_perplexity(model, batches, report, changes, blocks=args.blocks)
        rows = [[change, f"{value:.4g}"] for change, value in found.items()]
        text += "\n\n" + markdown_table(["massive activations", "perplexity"], rows)
        numbers["perplexity"] = found
    print(text)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "report.md").write_text(text + "\n", encoding="utf-8")
        (args.output / "report.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        _draw(report, model, next(iter(batches)), args.output)
        print(f"\nreport.md, report.json and pictures: {args.output}")


def _change(text: str) -> str | float:
    """zero, mean or a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _draw(report: ActivationReport, model: Any, batch: dict[str, Any], folder: Path) -> None:
    """Write the three pictures, of a sequence's beginning and of the report."""
    from hf_galore.integrations.activation_plots import landscapes, sink_map, top_curves

    first = batch | {"input_ids": batch["input_ids"][:1, :_TOKENS]}
    with evaluation(model):
        found = landscape(model, first, _interesting(report))
    figures = {"magnitudes": landscapes(found), "top": top_curves(report)}
    if report.sink_score is not None:
        figures["sinks"] = sink_map(report)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)


def _interesting(report: ActivationReport) -> list[int]:
    """Blocks worth a picture: births and deaths, then the ends and the middle."""
    last = len(report.blocks) - 1
    wanted = [block for site in report.sites for block in (site.born, site.died) if block is not None]
    return sorted(list(dict.fromkeys([*wanted, 0, last, last // 2]))[:_PANELS])
