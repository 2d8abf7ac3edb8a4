"""What it does to the loss to train all weights of a model in 8 and in 4 bits.

    OMP_NUM_THREADS=1 python examples/benchmarks/quantized_base.py      # about 10 minutes

A small Llama is pretrained in float32 with GaLore's projected backward, at a constant rate. Then the same training
goes on, with the rate decaying to zero, from that model with its matrices in another format. Embeddings and norms are
float32 and train in every run, also in the one whose matrices are frozen. Every finished run adds a line to the CSV;
runs that are in it already are skipped.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import bitsandbytes
import result_file
import torch
import transformers
from held_out import loss_of, tokens_of
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import hf_galore
from hf_galore import GaLoreAdamW
from hf_galore.lowrank_backward import enable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from corpus import Blocks, load_corpus

MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "use_cache": False,
}
SEQUENCES, HELD_OUT_BLOCKS = 2, 96  # of 256 tokens: in a step, and for the held-out loss
LR, SCALE, RANK, GAP = 4e-2, 1 / 32, 64, 50
RESULTS = Path(__file__).with_name("results") / "quantized_base.csv"


class Run(NamedTuple):
    """The format of the matrices, how folds round, and the learning rate to begin with, as a part of LR."""

    matrices: str
    rounding: str
    rate: float


LOW = 1 / 8
RUNS = [
    Run("float32", "none", 1.0),
    Run("bfloat16", "stochastic", 1.0),
    Run("int8", "stochastic", 1.0),
    Run("nf4", "stochastic", 1.0),
    Run("nf4", "nearest", 1.0),
    Run("nf4", "frozen", 1.0),
    Run("float32", "none", LOW),
    Run("nf4", "stochastic", LOW),
    Run("nf4", "frozen", LOW),
]
FORMATS = sorted({run.matrices for run in RUNS})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of weights, split and order of the data")
    parser.add_argument("--pretrain_steps", type=int, default=300, help="in float32")
    parser.add_argument("--steps", type=int, default=100, help="that each run goes on for")
    parser.add_argument("--matrices", nargs="+", choices=FORMATS, default=FORMATS, help="the formats to run")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, LOW], help="the first rates, as parts of LR")
    parser.add_argument("--folder", type=Path, default=Path("runs/quantized_base"), help="of the pretrained models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV")
    options = parser.parse_args()

    hf_galore.register()
    for seed in options.seeds:
        done = finished(options, seed)
        for run in RUNS:
            if run.matrices in options.matrices and run.rate in options.rates and run not in done:
                append(options, run, seed, go_on(options, run, seed))


def go_on(options: argparse.Namespace, run: Run, seed: int) -> dict:
    """The figures of one run."""
    train_blocks, held_out = load_corpus(options.folder / "corpus", [], MODEL["vocab_size"], 256, seed)
    held_out = Blocks(held_out.rows[:: max(1, len(held_out) // HELD_OUT_BLOCKS)])
    start = options.folder / f"seed{seed}_{options.pretrain_steps}_steps"
    if not start.exists():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**MODEL))
        optimizer = projected(model, "none", seed)
        train(model, optimizer, train_blocks, range(options.pretrain_steps), seed, lambda done: min(1.0, 10 * done))
        model.save_pretrained(start)
    model = load(start, run.matrices)
    optimizer = projected(model, run.rounding, seed)
    before = loss_of(model, held_out)
    steps = range(options.pretrain_steps, options.pretrain_steps + options.steps)
    began = time.perf_counter()
    train(model, optimizer, train_blocks, steps, seed, lambda done: run.rate * (1 - done))
    seconds = time.perf_counter() - began
    return {
        "loss_before": round(before, 4),
        "loss_after": round(loss_of(model, held_out), 4),
        "matrices_mib": round(matrix_bytes(model) / 2**20, 2),
        "seconds": round(seconds, 1),
    }


def load(folder: Path, matrices: str) -> LlamaForCausalLM:
    """The pretrained model with its matrices in this format, all else in float32."""
    quantization = {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }.get(matrices)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    if matrices == "bfloat16":
        for layer in linears(model):
            layer.weight.data = layer.weight.data.bfloat16()
    return model


def linears(model: nn.Module) -> list[nn.Linear]:
    """The layers with the matrices that GaLore projects."""
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


def matrix_bytes(model: nn.Module) -> int:
    """Bytes of the projected matrices, scales included."""
    state = {name: value for name, value in model.model.layers.state_dict().items() if "norm" not in name}
    return sum(value.nbytes for value in state.values())


def projected(model: nn.Module, rounding: str, seed: int) -> GaLoreAdamW:
    """The optimizer, after the model's matrices have been frozen or given the projected backward."""
    if rounding == "frozen":
        for layer in linears(model):
            layer.requires_grad_(False)
        return GaLoreAdamW([param for param in model.parameters() if param.requires_grad], betas=(0.9, 0.95))
    options = {"rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "seed": seed}
    engine = enable(model, ["self_attn", "mlp"], stochastic_rounding=rounding != "nearest", **options)
    optimizer = GaLoreAdamW(engine.param_groups(model), betas=(0.9, 0.95))
    engine.attach(optimizer)
    return optimizer


def train(model: nn.Module, optimizer: GaLoreAdamW, blocks: Blocks, steps: range, seed: int, rate: Callable) -> None:
    """Takes the steps with the learning rate LR·rate(share of the steps done)."""
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = LR * rate((step - steps.start + 0.5) / len(steps))
        picked = order[step * SEQUENCES : (step + 1) * SEQUENCES].tolist()
        optimizer.zero_grad()
        tokens = tokens_of(blocks, picked)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()


def finished(options: argparse.Namespace, seed: int) -> set[Run]:
    """The runs of `seed` and of this length that the CSV holds."""
    wanted = (seed, options.pretrain_steps, options.steps)
    rows = [row for row in result_file.read(options.results) if tuple(int(row[n]) for n in _LENGTHS) == wanted]
    return {Run(row["matrices"], row["rounding"], float(row["rate"])) for row in rows}


_LENGTHS = ("seed", "pretrain_steps", "steps")


def append(options: argparse.Namespace, run: Run, seed: int, result: dict) -> None:
    """Adds one finished run to the CSV."""
    row = {
        **run._asdict(),
        "seed": seed,
        **result,
        "pretrain_steps": options.pretrain_steps,
        "steps": options.steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "hf_galore": hf_galore.__version__,
        "command": shlex.join(["python", *sys.argv]),
    }
    result_file.append(options.results, row)


if __name__ == "__main__":
    main()
