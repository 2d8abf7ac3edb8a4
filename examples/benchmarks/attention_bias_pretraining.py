"""Perplexity, massive activations and 8-bit error of small GPT-2s with and without an attention bias or a sink token.

    export OMP_NUM_THREADS=1
    python examples/benchmarks/attention_bias_pretraining.py --text gutenberg --jobs 2
    python examples/benchmarks/attention_bias_pretraining.py --table

The experiment of "Massive Activations in Large Language Models" (arXiv 2402.17762, section 4), small: GPT-2-like
models are trained from random weights with GaLore on the same tokens, `plain`, with a trained `sink token` in front,
with the `attention bias` k', v' of every head, and with the `off by one` softmax. At the end each is looked at on
held-out text:

- the largest magnitudes of the residual stream after any block, beside its median there, and the massive ones;
- the share of heads that attend to the start of the sequence (sink score), the sink token being that start;
- ‖Q(x) − x‖ / ‖x‖ of rounding the inputs of all linear layers to 8 bits by their largest magnitude, one scale for each
  token (BitLinear's) and one for the whole tensor, as static int8 inference has: means over the layers, and the worst.

The paper finds an equal loss for all (3.04 nats, 50,000 steps of GPT-2 124M), massive activations in GPT-2 with and
without a sink token, and none with k', v'. Ours are smaller and trained a hundredth as long.
Every finished run adds a line to the CSV; runs that are in it already are skipped.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import result_file
import torch
import transformers
from ablation_run import ADAM, HELD_OUT_BLOCKS, Method, Study, load, train
from held_out import loss_of, tokens_of
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import hf_galore
from hf_galore import GaLoreAdamW, galore_param_groups
from hf_galore.attention.report import ActivationReport
from hf_galore.integrations.activations import massive_activations
from hf_galore.nn.functional import absmax_int8

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from corpus import Blocks

RESULTS = Path(__file__).parent / "results" / "attention_bias_pretraining.csv"
VARIANTS = ("plain", "sink token", "attention bias", "off by one")
MODEL = {"vocab_size": 8192, "max_position_embeddings": 256, "n_embd": 320, "n_layer": 6, "n_head": 5}
STUDY = Study(MODEL, steps=500, rank=80, gap=50, batch=4, methods=VARIANTS)
# For `plain`, after 100 steps: 1.25e-3 for the matrices is better than 4e-4 and 4e-3, and 3e-3 for all else better
# than 1e-3 and 1e-2.
LR, SCALE = 3e-3, 1.25 / 3
WATCHED = 16  # held-out sequences for the activations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="(all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights and order (%(default)s)")
    parser.add_argument("--steps", type=int, default=STUDY.steps, help="of 1,024 tokens (%(default)s)")
    parser.add_argument("--text", type=Path, help="a folder of text files (default: Python's standard library)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/attention_bias"), help="of tokens (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV")
    parser.add_argument("--table", action="store_true", help="print what the CSV has as tables")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    study = STUDY._replace(steps=options.steps)
    if options.run is not None:
        torch.set_num_threads(1)
        print(json.dumps(measure(study, *json.loads(options.run), options)))
        return
    rows = result_file.read(options.results)
    if not options.table:
        load(study, options.folder, options.text)  # once, before the runs start side by side
        text = options.text.resolve().name if options.text else "standard library"
        done = {(row["variant"], row["seed"], row["text"], row["steps"]) for row in rows}
        wanted = [(variant, seed) for seed in options.seeds for variant in options.variants]
        runs = [run for run in wanted if (run[0], str(run[1]), text, str(study.steps)) not in done]
        print(f"{len(runs)} runs to do", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            for (variant, seed), result in zip(runs, pool.map(measure_in_child, runs), strict=True):
                result_file.append(options.results, {"variant": variant, "seed": seed, "text": text, **result})
        rows = result_file.read(options.results)
    print(tables(rows))


def measure_in_child(run: tuple[str, int]) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, *sys.argv, "--run", json.dumps(run)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure(study: Study, variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one model and looks at it."""
    hf_galore.register()
    blocks, held_out = load(study, options.folder, options.text)
    model = model_of(variant, study, seed)
    groups = galore_param_groups(model, ["attn", "mlp"], rank=study.rank, update_proj_gap=study.gap, scale=SCALE)
    optimizer = GaLoreAdamW(groups, lr=LR, seed=seed, **ADAM)
    losses = train(model, optimizer, blocks, study, Method("galore", {}), seed)
    model.eval()
    sample = Blocks(held_out.rows[:: math.ceil(len(held_out) / HELD_OUT_BLOCKS)])
    batches = [{"input_ids": tokens_of(sample, [index])} for index in range(min(WATCHED, len(sample)))]
    report = massive_activations(model, batches)
    return {
        "perplexity": f"{math.exp(loss_of(model, sample)):.3f}",
        "train_loss": f"{mean(losses[-max(1, study.steps // 10) :]):.4f}",
        **of_activations(report),
        **of_rounding(model, batches),
        "parameters": sum(param.numel() for param in model.parameters()),
        "steps": study.steps,
        "tokens": study.steps * study.batch * study.model["max_position_embeddings"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": shlex.join(["python", *sys.argv[: sys.argv.index("--run")]]),
    }


def model_of(variant: str, study: Study, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 without dropout, with random weights; it has a position for a sink token besides."""
    torch.manual_seed(seed)
    shape = {**study.model, "max_position_embeddings": study.model["max_position_embeddings"] + 1}
    config = GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = GPT2LMHeadModel(config)
    if variant == "sink token":
        hf_galore.add_register_tokens(model, 1)
    elif variant != "plain":
        kind = "off_by_one" if variant == "off by one" else "key_value"
        hf_galore.add_attention_bias(model, start="random", kind=kind)
    return model


def of_activations(report: ActivationReport) -> dict[str, Any]:
    """The block with the largest magnitude, for its median."""
    block = max(report.blocks, key=lambda one: one.top[0] / one.median)
    return {
        **{f"top {number + 1}": f"{value:.2f}" for number, value in enumerate(block.top)},
        "median": f"{block.median:.4f}",
        "top 1 / median": f"{block.top[0] / block.median:.1f}",
        "massive": sum(one.massive for one in report.blocks),
        "sink score": f"{report.sink_score:.3f}",
    }


@torch.no_grad()
def of_rounding(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, str]:
    """Relative errors of 8-bit inputs of all linear layers."""
    found: dict[str, list[Errors]] = {}
    with inputs_of_layers(model, found):
        for batch in batches:
            model(**batch)
    layers = [Errors(*map(mean, zip(*errors, strict=True))) for errors in found.values()]
    result = {}
    for scales, errors in Errors(*zip(*layers, strict=True))._asdict().items():
        result |= {f"int8 by {scales}": f"{mean(errors):.5f}", f"int8 by {scales}, worst": f"{max(errors):.5f}"}
    return result


class Errors(NamedTuple):
    """‖Q(x) − x‖ / ‖x‖ of an input x."""

    token: float
    tensor: float


@contextmanager
def inputs_of_layers(model: nn.Module, found: dict[str, list[Errors]]) -> Iterator[None]:
    """Inside, each input of a linear layer but the head adds its errors."""
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D) and name != "lm_head":

            def watch(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                by_tensor = absmax_int8(x.reshape(1, -1))
                rounded = Errors(decoded(absmax_int8(x)), decoded(by_tensor).view_as(x))
                found.setdefault(name, []).append(Errors(*(float((y - x).norm() / x.norm()) for y in rounded)))

            handles.append(module.register_forward_pre_hook(watch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decoded(codes: Any) -> Tensor:
    """What 8-bit codes stand for."""
    return codes.codes / codes.scale


COLUMNS = ("perplexity", "top 1", "median", "top 1 / median", "massive", "sink score")
ROUNDING = ("int8 by token", "int8 by token, worst", "int8 by tensor", "int8 by tensor, worst")


def tables(rows: list[dict[str, str]]) -> str:
    """Means and standard deviations over the seeds in Markdown, one table for each text and number of steps."""
    lines = []
    for text, steps in dict.fromkeys((row["text"], row["steps"]) for row in rows):
        columns = (*COLUMNS, *ROUNDING)
        lines += [f"{text}, {steps} steps", "", f"| variant | n | {' | '.join(columns)} |"]
        lines.append(f"|{'---|' * (len(columns) + 2)}")
        for variant in VARIANTS:
            same = [row for row in rows if (row["variant"], row["text"], row["steps"]) == (variant, text, steps)]
            if same:
                cells = [_cell([float(row[column]) for row in same]) for column in columns]
                lines.append(f"| {variant} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
