"""Bytes that each rank sends in a step, and the peak of its memory: full AdamW, LoRA and GaLore on every engine.

    OMP_NUM_THREADS=1 python examples/benchmarks/communication.py       # resumable

The Trainer trains two layers of the 60m shape in float32 on gloo processes, 2 samples of 32 tokens each, clipping at
1. LoRA has adapters on all linear layers but the head, of the rank that GaLore has, and everything else frozen; the
other methods train embeddings, head and norms, too. T = 4, without staggering: the steps are

    normal   the third
    before   the fourth, after which the projected backward prepares its refresh, and folds if it folds every T steps
    refresh  the fifth, which refreshes all bases

so that T steps cost (T − 2)·normal + before + refresh. The columns with the names of collectives hold the bytes they
are given, as collectives.py counts them, `calls` their number, `sent` what a ring sends for them per rank. Live tensor
bytes are those of the rank that has most: `kept` before the step, `gradients` more when the backward pass is over (not
for ZeRO, which takes its steps inside of it), `peak` at their highest. Logging and saving are not in it.

ZeRO's buckets have 2²⁰ elements; the usual 5·10⁸ are more than the model. ZeRO-3 is told to keep no parameter whole,
and none from the forward to the backward pass: what it does by itself in models that are larger than its limits.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import result_file
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from collectives import KINDS, Collectives
from live_bytes import LiveBytes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import hf_galore

RESULTS = Path(__file__).parent / "results" / "communication.csv"
SHAPES = {  # hidden, intermediate, heads, layers, vocabulary, rank
    "60m x 2 layers": (512, 1376, 8, 2, 1024, 128),
    "tiny": (32, 64, 2, 1, 64, 8),
}
METHODS = ("AdamW", "LoRA", "galore_adamw", "galore_adamw_layerwise")
BUCKETS = {"reduce_bucket_size": 2**20, "allgather_bucket_size": 2**20}
WHOLE = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
ZERO = {
    "ZeRO-1": {"stage": 1, **BUCKETS},
    "ZeRO-2": {"stage": 2, **BUCKETS},
    "ZeRO-3": {"stage": 3, **BUCKETS, **{f"stage3_{name}": 0 for name in WHOLE}},
}
ENGINES = ("DDP", "FSDP2", *ZERO)
CASE = ("shape", "ranks", "engine", "method")
GAP = 4
LIVE = ("kept", "gradients", "peak")
STEPS = {2: "normal", 3: "before", 4: "refresh"}
BATCH, LENGTH = 2, 32


def build(shape: str) -> LlamaForCausalLM:
    """The model, with an untied head."""
    hidden, intermediate, heads, layers, vocabulary, _ = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def adapted(model: nn.Module, rank: int) -> nn.Module:
    """The model with LoRA adapters."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))


def arguments(shape: str, engine: str, method: str, folder: str) -> TrainingArguments:
    """How the Trainer trains."""
    settings: dict[str, Any] = {
        "output_dir": folder,
        "optim": method if method.startswith("galore") else "adamw_torch",
        "per_device_train_batch_size": BATCH,
        "max_steps": len(STEPS) + min(STEPS),
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if method.startswith("galore"):
        settings["optim_target_modules"] = "all-linear"
        settings["optim_args"] = f"rank={SHAPES[shape][-1]}, update_proj_gap={GAP}, stagger=false"
    if engine == "FSDP2":
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    if engine in ZERO:
        automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
        settings["deepspeed"] = {"zero_optimization": ZERO[engine], **dict.fromkeys(automatic, "auto")}
        settings["accelerator_config"] = {"use_configured_state": True}
    return TrainingArguments(**settings)


class Recorder(TrainerCallback):
    """What each of the steps communicated, and its peak of live bytes."""

    def __init__(self, collectives: Collectives, live: LiveBytes) -> None:
        self.collectives, self.live = collectives, live
        self.steps: dict[str, dict[str, Any]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()
        self.collectives.reset()
        self.kept = self.live.peak = self.live.now

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = "" if args.deepspeed else self.live.now - self.kept

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step - 1
        if step in STEPS:
            sizes = {kind: self.collectives.sizes[kind] for kind in KINDS}
            calls = self.collectives.calls.total()
            sent = round(self.collectives.sent(args.world_size))
            live = dict(zip(LIVE, (self.kept, self.gradients, self.live.peak), strict=True))
            self.steps[STEPS[step]] = {**sizes, "calls": calls, "sent": sent, **live}


def train(shape: str, engine: str, method: str, folder: str) -> dict[str, dict[str, Any]]:
    """What this rank finds: the figures of the three steps."""
    warnings.simplefilter("ignore")
    if engine in ZERO:
        PartialState(backend="gloo")
    hf_galore.register()
    collectives, live = Collectives(), LiveBytes()
    args = arguments(shape, engine, method, folder)
    recorder = Recorder(collectives, live)
    tokens = torch.randint(0, SHAPES[shape][4], (args.max_steps * BATCH * args.world_size, LENGTH))
    samples = [{"input_ids": one, "labels": one} for one in tokens]
    if engine == "FSDP2":  # on CPUs the Trainer would take DDP
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    with live, collectives:
        model = build(shape)
        model = adapted(model, SHAPES[shape][-1]) if method == "LoRA" else model
        trainer = Trainer(model=model, args=args, train_dataset=samples, callbacks=[recorder])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return recorder.steps


def measure(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The case's rows, measured by as many processes as it has ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if case["engine"] in ZERO:
        environment |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case['ranks']}"]
        asked = json.dumps([case["shape"], case["engine"], case["method"], folder])
        command = [sys.executable, *torchrun, __file__, "--case", asked]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode != 0:
            raise RuntimeError(process.stderr)
        found = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(case["ranks"])]
    return [{**case, "step": step, **joined([rank[step] for rank in found])} for step in STEPS.values()]


def joined(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a step: the bytes that all ranks counted, and those of the rank that has most live ones.

    Raises:
        RuntimeError: they did not count the same bytes.
    """
    counted = [{name: value for name, value in rank.items() if name not in LIVE} for rank in ranks]
    if any(other != counted[0] for other in counted):
        raise RuntimeError(f"the ranks counted different bytes: {counted}")
    return counted[0] | {name: max(rank[name] for rank in ranks) for name in LIVE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default=next(iter(SHAPES)), help="(%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="(%(default)s)")
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=ENGINES, help="(all)")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS, help="(all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (%(default)s)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        *case, folder = json.loads(options.case)
        (Path(folder) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(train(*case, folder)))
        return
    done = {tuple(row[name] for name in CASE) for row in result_file.read(options.results)}
    names = [name for name in ("accelerate", "deepspeed", "peft", "transformers") if importlib.util.find_spec(name)]
    versions = " ".join(f"{name} {metadata.version(name)}" for name in names) + f" hf_galore {hf_galore.__version__}"
    about = {"torch": torch.__version__, "versions": versions, "command": shlex.join(["python", *sys.argv])}
    for case in itertools.product([options.shape], options.ranks, options.engines, options.methods):
        if tuple(map(str, case)) not in done:
            for row in measure(dict(zip(CASE, case, strict=True))):
                result_file.append(options.results, {**row, **about})


if __name__ == "__main__":
    main()
