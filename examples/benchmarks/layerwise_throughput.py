"""Tokens per second of full AdamW, LoRA, galore-torch and hf_galore under the Trainer, side by side on the same model.

    python examples/benchmarks/layerwise_throughput.py      # writes results/layerwise_throughput.csv, resumable
    python examples/benchmarks/layerwise_throughput.py --out examples/benchmarks/results/layerwise_native.csv \\
        --rows 60m/32/float32/trained 60m/128/float32/trained \\
        --methods galore_adamw_layerwise "galore_adamw_layerwise, references"      # what native ops are worth

A row is a shape, a rank, a dtype of the weights and what becomes of embeddings, head and norms: `frozen` in all
methods, or `trained` in all but LoRA, which then has less to do than the others. It is measured in a process of its
own. There the methods take turns: each trains a fresh model for a few steps on random tokens, several rounds of that.
What else a shared machine does can only add to a time, so the figure of a run is the lower quartile of its steps, and
that of a method its best run. A run has a first step, which does not count, plain steps, and one refresh:

    time of 200 steps = 200 * plain step + what all the steps that pay for the refresh take beyond plain ones

All that the Trainer does for a step is in its time: fetching the batch, clipping, the schedule, zero_grad.
"""

import argparse
import csv
import gc
import math
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from layerwise_memory import SHAPES, build
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import hf_galore
from hf_galore import native
from hf_galore.cli.env import environment

RESULTS = Path(__file__).parent / "results" / "layerwise_throughput.csv"
VOCABULARY = 8192  # of `build`
BATCH, LENGTH = 4, 256
STEPS, GAP = 9, 7  # of a run here; steps count from 0
REAL_GAP = 200  # update_proj_gap of the run that the figures are for
TARGETS = r".*_proj"


class Row(NamedTuple):
    """What the methods are compared on."""

    shape: str
    rank: int
    dtype: str
    others: str  # what becomes of embeddings, head and norms


@dataclass(frozen=True)
class Method:
    """How one method is asked for, and which steps of a run pay for the refresh after the first."""

    optim: str
    refresh_steps: tuple[int, ...] = ()
    registered: bool = False  # hf_galore stands behind the optimizer's name
    lora: bool = False
    more: str = ""  # optim_args beside rank and update_proj_gap
    native: bool = True  # with the compiled ops, or else with their references in Python


# A refresh from the gradient is all in one step. A streaming one starts at the end of the step before, where the
# optimizer's step aims the sketch; then the backward pass gathers it and the optimizer's step makes the basis of it.
# By default that is staggered; here all layers refresh together, so that it can be told from a plain step.
IN_ONE_STEP, STREAMING = (GAP,), (GAP - 1, GAP)
METHODS = {
    "adamw_torch_fused": Method("adamw_torch_fused"),
    "LoRA": Method("adamw_torch_fused", lora=True),
    "galore-torch": Method("galore_adamw", IN_ONE_STEP),
    "galore_adamw_layerwise": Method("galore_adamw_layerwise", STREAMING, registered=True, more=", stagger=false"),
    "galore_adamw_layerwise, share_inputs": Method(
        "galore_adamw_layerwise", STREAMING, registered=True, more=", stagger=false, share_inputs=true"
    ),
    "galore_adamw_layerwise, references": Method(
        "galore_adamw_layerwise", STREAMING, registered=True, more=", stagger=false", native=False
    ),
    "galore_adamw, randomized": Method(
        "galore_adamw", IN_ONE_STEP, registered=True, more=", subspace=randomized, moments=keep"
    ),
}
Runs = dict[str, list[dict[str, float]]]  # what `train` finds, by method, once for each round
BASELINES = {"ratio_adamw": "adamw_torch_fused", "ratio_lora": "LoRA", "ratio_galore_torch": "galore-torch"}
TIMES = ["t_plain_ms", "t_refresh_ms", "forward_ms", "backward_ms", "step_ms"]
COLUMNS = [
    *(*Row._fields, "method", *TIMES, "tokens_per_second"),
    *(column + end for column in BASELINES for end in ("", "_min", "_max")),
    *("ideal_ratio", "rounds", "threads", "device", "torch", "versions", "command"),
]


# One run.


class RandomTokens(Dataset):
    """Enough sequences of seeded random tokens for one run, each its own label."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(VOCABULARY, (STEPS * BATCH, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class StepEnds(TrainerCallback):
    """Notes when each step ends: the optimizer and the schedule have stepped, the gradients are gone."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


class TimedTrainer(Trainer):
    """A Trainer that notes when the parts of each step begin and end."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.begins: list[float] = []
        self.losses: list[float] = []
        self.gradients: list[float] = []
        self.ends = StepEnds()
        self.add_callback(self.ends)

    def training_step(self, *args, **kwargs):
        self.begins.append(time.perf_counter())
        loss = super().training_step(*args, **kwargs)
        self.gradients.append(time.perf_counter())
        return loss

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(time.perf_counter())
        return loss

    def milliseconds(self) -> dict[str, list[float]]:
        """Of each step, which begins where the one before ends (nan for the first), and of its parts."""
        ends = self.ends.times
        return {
            "whole": differences([math.nan, *ends[:-1]], ends),
            "forward": differences(self.begins, self.losses),
            "backward": differences(self.losses, self.gradients),
            "step": differences(self.gradients, ends),
        }


def differences(begins: list[float], ends: list[float]) -> list[float]:
    """The milliseconds between times in seconds."""
    return [1000 * (end - begin) for begin, end in zip(begins, ends, strict=True)]


def train(row: Row, method: Method) -> dict[str, float]:
    """Trains a fresh model once with the method and returns the `figures` of the run."""
    gc.collect()  # of the run before
    model = build(row.shape, row.others, False).to(getattr(torch, row.dtype))
    if method.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=row.rank, target_modules=TARGETS, lora_dropout=0.0)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    with ExitStack() as stack:
        if method.registered:
            hf_galore.register()
            stack.callback(hf_galore.unregister)
        if not method.native:
            stack.enter_context(native.references_only())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        trainer = TimedTrainer(model, arguments(row, method, folder), train_dataset=RandomTokens())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return figures(trainer.milliseconds(), method.refresh_steps)


def arguments(row: Row, method: Method, folder: str) -> TrainingArguments:
    """The same for all methods, but for the optimizer."""
    galore = {
        "optim_target_modules": TARGETS,
        "optim_args": f"rank={row.rank}, update_proj_gap={GAP}{method.more}",
    }
    return TrainingArguments(
        folder,
        optim=method.optim,
        **(galore if method.optim.startswith("galore") else {}),
        label_names=["labels"],
        learning_rate=1e-3,
        max_grad_norm=1.0,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        dataloader_pin_memory=False,
        prediction_loss_only=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def figures(milliseconds: dict[str, list[float]], refresh_steps: Collection[int]) -> dict[str, float]:
    """Of a plain step and its parts the lower quartile, and what all steps that pay for a refresh take beyond one.

    The first step is left out: it has the run's warm-up and a refresh in it.
    """
    plain = [step for step in range(1, STEPS) if step not in refresh_steps]
    typical = {part: quartile(times[step] for step in plain) for part, times in milliseconds.items()}
    whole = typical.pop("whole")
    refresh = sum(milliseconds["whole"][step] - whole for step in refresh_steps)
    return {"t_plain_ms": whole, "t_refresh_ms": refresh, **{f"{part}_ms": ms for part, ms in typical.items()}}


def quartile(values: Iterable[float]) -> float:
    """The lower quartile."""
    return quantiles(values, n=4, method="inclusive")[0]


# One row.


def measure(row: Row, methods: Collection[str], rounds: int, threads: int) -> Runs:
    """The runs of a row."""
    torch.set_num_threads(threads)
    found: Runs = {name: [] for name in methods}
    for number in range(rounds):
        for name in methods:
            found[name].append(train(row, METHODS[name]))
            print(
                *row, f"round {number}", name, {key: round(ms, 1) for key, ms in found[name][-1].items()}, flush=True
            )
    return found


def measure_in_child(row: Row, methods: Collection[str], rounds: int, threads: int) -> Runs:
    """`measure` in a process of its own.

    It is forked, which spares it the imports; nothing has been computed before, so it inherits no threads.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("fork")) as child:
        return child.submit(measure, row, methods, rounds, threads).result()


# What it comes to.


def tokens_per_second(t_plain_ms: float, t_refresh_ms: float, **_: float) -> float:
    """Tokens per second of a long run with a refresh every REAL_GAP steps."""
    return 1000 * REAL_GAP * BATCH * LENGTH / (REAL_GAP * t_plain_ms + t_refresh_ms)


def flops(row: Row, rank: int | None = None) -> float:
    """Flops per token of the matrix products in a forward and a backward pass, with full gradients or with `rank`.

    A multiplication and an addition are 2 flops. Counted are, for every token:

        a target, W (m, n)   y, the gradient of x and that of W: 6·m·n; projected, x Q and gyᵀ(x Q) instead of the
                             last: 2·(2·m·n + r·(m + n)). Nobody asks for the gradient of the first q, k and v's x
                             where the embeddings are frozen
        the head             6·hidden·VOCABULARY in both cases, 4·hidden·VOCABULARY where it is frozen
        the attention        q kᵀ and the weighted sum of v, over the (LENGTH + 1) / 2 tokens that one sees on average,
                             and twice that in the backward pass

    Not counted are the refresh, the optimizer's step with its fold, and all that goes element by element.
    """
    hidden, intermediate, _, layers = SHAPES[row.shape]
    frozen = row.others == "frozen"
    matrices = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    targets = sum(6 * m * n if rank is None else 2 * (2 * m * n + rank * (m + n)) for m, n in matrices)
    attention = 3 * 2 * 2 * hidden * (LENGTH + 1) / 2
    head = (4 if frozen else 6) * hidden * VOCABULARY
    return layers * (targets + attention) + head - (3 * 2 * hidden**2 if frozen else 0)


def ideal_ratio(row: Row) -> float:
    """How many times as fast as AdamW the projected backward is if time goes with `flops`."""
    return flops(row) / flops(row, row.rank)


def lines_of(row: Row, found: Runs) -> Iterator[dict[str, Any]]:
    """The figures of each method's best run, their ratios, and the range of the ratios within a round."""
    best = {name: {column: min(run[column] for run in runs) for column in TIMES} for name, runs in found.items()}
    speeds = {name: [tokens_per_second(**run) for run in runs] for name, runs in found.items()}
    for name in found:
        line = {**row._asdict(), "method": name, **{column: f"{ms:.2f}" for column, ms in best[name].items()}}
        line["tokens_per_second"] = f"{tokens_per_second(**best[name]):.1f}"
        for column, baseline in BASELINES.items():
            ratios = [ours / theirs for ours, theirs in zip(speeds[name], speeds[baseline], strict=True)]
            of_best = tokens_per_second(**best[name]) / tokens_per_second(**best[baseline])
            for end, ratio in {"": of_best, "_min": min(ratios), "_max": max(ratios)}.items():
                line[f"{column}{end}"] = f"{ratio:.3f}"
        if name.startswith("galore_adamw_layerwise"):
            line["ideal_ratio"] = f"{ideal_ratio(row):.3f}"
        yield line


def setting(rounds: int, threads: int) -> dict[str, Any]:
    """What the figures were measured with."""
    libraries = ("peft", "transformers", "galore-torch")
    versions = [f"{name} {metadata.version(name)}" for name in libraries] + [f"hf_galore {hf_galore.__version__}"]
    return {
        "rounds": rounds,
        "threads": threads,
        "device": environment()["devices"]["cpu"].rpartition(", ")[0],  # without the threads of this process
        "torch": torch.__version__,
        "versions": " ".join(versions),
        "command": shlex.join(["python", *sys.argv]),
    }


# The file.


def read(path: Path) -> dict[Row, list[dict[str, Any]]]:
    """The lines of the file by row."""
    rows: dict[Row, list[dict[str, Any]]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                row = Row(line["shape"], int(line["rank"]), line["dtype"], line["others"])
                rows.setdefault(row, []).append(line)
    return rows


def write(path: Path, rows: dict[Row, list[dict[str, Any]]]) -> None:
    """Writes the file anew, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(line for lines in rows.values() for line in lines)
    draft.replace(path)


def complete(lines: list[dict[str, Any]], methods: Collection[str]) -> bool:
    """Whether these lines of a row have all of the methods."""
    return {line["method"] for line in lines}.issuperset(methods)


def table(lines: list[dict[str, Any]]) -> str:
    """The lines in Markdown, without what they were measured with; ratios with their range over the rounds."""
    columns = [name for name in COLUMNS[: COLUMNS.index("rounds")] if not name.endswith(("_min", "_max"))]
    cells = [columns, ["---"] * len(columns)]
    for line in lines:
        ratios = {name: f"{line[name]} ({line[f'{name}_min']} to {line[f'{name}_max']})" for name in BASELINES}
        cells.append([str({**line, **ratios}.get(name, "")) for name in columns])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def grid() -> dict[str, Row]:
    """All rows by name."""
    rows = [
        Row(shape, sizes[0] // part, dtype, others)
        for others, (shape, sizes), part, dtype in product(
            ("frozen", "trained"), SHAPES.items(), (16, 4), ("bfloat16", "float32")
        )
    ]
    return {"/".join(map(str, row)): row for row in rows}


def main() -> None:
    rows = grid()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), metavar="ROW", help=f"of {list(rows)}")
    more = [name for name in METHODS if name not in BASELINES.values()]
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=more,
        default=[name for name in more if METHODS[name].native],
        metavar="METHOD",
        help=f"beside the baselines: of {more} (all with native ops)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method in a row (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV; rows that it has are not measured again")
    options = parser.parse_args()
    methods = [*BASELINES.values(), *options.methods]
    done = read(options.out)
    for name in options.rows:
        row = rows[name]
        if not complete(done.get(row, []), methods):
            found = measure_in_child(row, methods, options.rounds, options.threads)
            about = setting(options.rounds, options.threads)
            done[row] = [{**line, **about} for line in lines_of(row, found)]
            write(options.out, done)
    print(table([line for name in options.rows for line in done[rows[name]]]))


if __name__ == "__main__":
    main()
