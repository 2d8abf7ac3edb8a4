"""Perplexity of a small model over a long text: dense, a window with and without sinks, and recomputation.

    python examples/benchmarks/sink_perplexity.py --text gutenberg    # results/sink_perplexity.csv and .png; resumable
    python examples/benchmarks/sink_perplexity.py --table

The model is the demo of examples/pretrain.py (8.7 M parameters, context 256), trained here with galore_adamw on the
text. All methods then read the same held-out tokens as one stream and keep at most as many as the context:

- `S + W`: SinkCache with S sinks and the last W tokens; S = 0 is a plain window, whose first keys leave.
- `recomputation`: every token anew from the W before it, without a cache; for one token in --stride of them, the only
  ones that `at_recomputed` counts, of all methods.
- `dense`: everything that came before, beyond the context it was trained on; up to --dense_tokens.

What StreamingLLM (arXiv 2309.17453) reports, Llama-2-7B, sinks 0/1/2/4/8: 3360, 11.88, 10.51, 9.59, 9.54; Pythia-12B:
21.6, 11.95, 12.09, 12.09, 12.02. A model as small as ours need not have learned to use sinks.
"""

import argparse
import json
import math
import shlex
import sys
from functools import partial
from pathlib import Path

import result_file
import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretrain
from corpus import load_corpus
from transformers import DynamicCache, LlamaForCausalLM

from hf_galore import SinkCache
from hf_galore.cli.env import environment

RESULTS = Path(__file__).parent / "results"
SINKS = (0, 1, 2, 4, 8)
_BINS = 50  # points of a curve in the plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files or folders (Python's own library)")
    parser.add_argument("--config", default="demo", help="preset of examples/pretrain.py (%(default)s)")
    parser.add_argument("--max_steps", type=int, help="of training (the preset's)")
    parser.add_argument("--seed", type=int, default=0, help="of training (%(default)s)")
    parser.add_argument("--tokens", type=int, default=50_000, help="of the held-out stream (%(default)s)")
    parser.add_argument("--dense_tokens", type=int, default=16_384, help="that `dense` reads (%(default)s)")
    parser.add_argument("--stride", type=int, default=16, help="of recomputation (%(default)s)")
    parser.add_argument("--sinks", type=int, nargs="+", default=SINKS, help="numbers of sinks (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/sink_perplexity"), help="folder of the model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of table and plot (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table of the CSV and draw it, measure nothing")
    options = parser.parse_args()
    if not options.table:
        measure_all(options)
    print(table(result_file.read(options.results / "sink_perplexity.csv")))
    draw(options)


def measure_all(options: argparse.Namespace) -> None:
    """Trains the model unless it is there, and adds a line to the CSV for each method that has none."""
    settings, folder = trained(options)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    context = settings.seq_len
    _, held_out = load_corpus(
        Path(settings.output_dir) / "corpus", options.text, settings.vocab_size, context, settings.seed
    )
    ids = torch.from_numpy(held_out.rows.reshape(1, -1)[:, : options.tokens].astype("int64"))
    methods = {f"{count} + {context - count}": partial(with_sinks, n_sink=count) for count in options.sinks}
    chosen = torch.arange(context, ids.shape[1], options.stride)
    methods |= {"recomputation": partial(recomputed, positions=chosen)}
    methods |= {"dense": partial(dense, limit=options.dense_tokens)}
    path = options.results / "sink_perplexity.csv"
    done = {(row["method"], row["seed"], row["read"]) for row in result_file.read(path)}
    for name, losses_of in methods.items():
        if (name, str(options.seed), str(ids.shape[1])) in done:
            continue
        positions, losses = losses_of(model, ids, context)
        inside = positions < context
        edges = positions.float().div(ids.shape[1] / _BINS).long()
        curve = {int(edge): round(float(losses[edges == edge].mean()), 4) for edge in edges.unique()}
        row = {
            "method": name,
            "seed": options.seed,
            "read": ids.shape[1],
            "tokens": len(losses),
            "perplexity": perplexity(losses),
            "within_context": perplexity(losses[inside]),
            "beyond_context": perplexity(losses[~inside]),
            "at_recomputed": perplexity(losses[torch.isin(positions, chosen)]),
            "curve": json.dumps(curve),
            "parameters": model.num_parameters(),
            "steps": settings.max_steps,
            "device": environment()["devices"]["cpu"],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": shlex.join(["python", *sys.argv]),
        }
        result_file.append(path, row)


def trained(options: argparse.Namespace) -> tuple[argparse.Namespace, Path]:
    """The settings of the model, and the folder it is in."""
    arguments = ["--config", options.config, "--seed", str(options.seed), "--output_dir", str(options.runs)]
    arguments += ["--max_steps", str(options.max_steps)] if options.max_steps else []
    arguments += ["--text", *map(str, options.text)] if options.text else []
    settings = pretrain.parse(arguments)
    folder = options.runs / f"model_{options.config}_{settings.max_steps}_{options.seed}"
    if not (folder / "config.json").exists():
        pretrain.train(settings, "galore_adamw", lambda trainer, _: trainer.save_model(folder))
    return settings, folder


def perplexity(losses: Tensor) -> str:
    """As the CSV has it: nothing for no tokens."""
    return f"{math.exp(losses.mean()):.2f}" if len(losses) else ""


Losses = tuple[Tensor, Tensor]  # positions of the tokens that were predicted (n,), and nats (n,)


def losses_in_pieces(model: LlamaForCausalLM, cache: object, ids: Tensor, size: int) -> Losses:
    """All tokens after the first, each predicted from what the cache had then."""
    losses = []
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, size):
            piece = ids[:, start : start + size]
            following = ids[0, start + 1 : start + size + 1]
            logits = model(piece, past_key_values=cache).logits[0, : len(following)]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), following, reduction="none"))
    return torch.arange(1, ids.shape[1]), torch.cat(losses)


def with_sinks(model: LlamaForCausalLM, ids: Tensor, context: int, n_sink: int) -> Losses:
    """A SinkCache as large as the context."""
    return losses_in_pieces(model, SinkCache(model, n_sink, context - n_sink), ids, context)


def dense(model: LlamaForCausalLM, ids: Tensor, context: int, limit: int) -> Losses:
    """Attention over everything."""
    return losses_in_pieces(model, DynamicCache(config=model.config), ids[:, :limit], context)


@torch.no_grad()
def recomputed(model: LlamaForCausalLM, ids: Tensor, context: int, positions: Tensor) -> Losses:
    """The tokens at these positions, each from the window before it, run anew."""
    losses = []
    for group in positions.split(8):
        windows = torch.stack([ids[0, last - context : last] for last in group.tolist()])
        logits = model(windows, use_cache=False, logits_to_keep=1).logits[:, -1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[0, group], reduction="none"))
    return positions, torch.cat(losses)


def table(rows: list[dict[str, str]]) -> str:
    """The CSV in Markdown."""
    columns = ("method", "seed", "tokens", "perplexity", "within_context", "beyond_context", "at_recomputed")
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(options: argparse.Namespace) -> None:
    """Perplexity against position, one curve for each line of the CSV."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in result_file.read(options.results / "sink_perplexity.csv"):
        width = int(row["read"]) / _BINS
        points = {(int(edge) + 0.5) * width: math.exp(loss) for edge, loss in json.loads(row["curve"]).items()}
        axis.plot(*zip(*points.items(), strict=True), label=f"{row['method']} (seed {row['seed']})", linewidth=1)
    axis.set(xlabel="position in the text, tokens", ylabel="perplexity", yscale="log")
    axis.legend(fontsize="small")
    figure.savefig(options.results / "sink_perplexity.png", dpi=120)


if __name__ == "__main__":
    main()
