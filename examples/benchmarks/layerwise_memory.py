"""Peak memory of full AdamW, LoRA, galore-torch and hf_galore on the same model and batch.

    OMP_NUM_THREADS=1 python examples/benchmarks/layerwise_memory.py --jobs 2       # resumable

Two steps of forward, backward and optimizer on random tokens, bfloat16 weights. `live_mib` is the peak of the second,
by live tensor bytes (the same on every device), `refresh_mib` that of the first, in which galore-torch refreshes every
basis; the projected backward refreshes a sixteenth in each of the first 16 steps. `resident_mib` is the peak resident
size of the process, libraries included. `frozen`: embeddings, head and norms are frozen in all methods; `trained`:
they train in all (in LoRA through modules_to_save). galore-torch layerwise is what transformers 5.23 makes of it: one
optimizer per parameter, stepped in a hook.
"""

import argparse
import gc
import itertools
import json
import platform
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import result_file
import torch
from live_bytes import LiveBytes
from transformers import LlamaConfig, LlamaForCausalLM

import hf_galore
from hf_galore.lowrank_backward import enable
from hf_galore.param_groups import galore_param_groups

RESULTS = Path(__file__).parent / "results" / "layerwise_memory.csv"
SHAPES = {"60m": (512, 1376, 8, 8), "350m x 4 layers": (1024, 2736, 16, 4)}  # hidden, intermediate, heads, layers
METHODS = (
    "AdamW",
    "LoRA",
    "galore-torch",
    "galore-torch layerwise",
    "layerwise float32",
    "layerwise bfloat16",
    "layerwise bfloat16 shared",
    "layerwise 8bit",
)
CASE = ("shape", "rank", "others", "checkpointing", "method")


def build(shape: str, others: str, checkpointing: bool) -> LlamaForCausalLM:
    """The model: an untied head, a vocabulary of 8192, in bfloat16."""
    hidden, intermediate, heads, layers = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        vocab_size=8192,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, param in model.named_parameters():
        param.requires_grad_(others == "trained" or "_proj" in name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model


def prepare(method: str, model: torch.nn.Module, rank: int, others: str) -> tuple[torch.nn.Module, list]:
    """The model as the method trains it, and what steps after the backward pass."""
    trained = [param for param in model.parameters() if param.requires_grad]
    if method == "AdamW":
        return model, [torch.optim.AdamW(trained, fused=True)]
    if method == "LoRA":
        from peft import LoraConfig, get_peft_model

        saved = ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"]
        config = LoraConfig(
            r=rank, target_modules=r".*_proj", modules_to_save=saved if others == "trained" else None, lora_dropout=0.0
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        return model, [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)]
    if method.startswith("galore-torch"):
        import galore_torch

        groups = galore_param_groups(model, r".*_proj", rank=rank)
        if method == "galore-torch":
            return model, [galore_torch.GaLoreAdamW(groups, no_deprecation_warning=True)]
        for group in groups:
            for param in group["params"]:
                own = galore_torch.GaLoreAdamW([{**group, "params": [param]}], no_deprecation_warning=True)
                param.register_post_accumulate_grad_hook(partial(step_at_once, own))
        return model, []
    kind = method.split()[1]
    dtype = torch.bfloat16 if kind != "float32" else None
    engine = enable(model, r".*_proj", rank=rank, state_dtype=dtype, share_inputs=method.endswith("shared"))
    optimizer_class = hf_galore.GaLoreAdamW8bit if kind == "8bit" else hf_galore.GaLoreAdamW
    optimizer = optimizer_class(engine.param_groups(model), state_dtype=dtype)
    engine.attach(optimizer)
    return model, [optimizer]


def step_at_once(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> None:
    """What transformers' layerwise mode does when a parameter's gradient is there."""
    optimizer.step()
    optimizer.zero_grad()


def measure(shape: str, rank: int, others: str, checkpointing: bool, method: str) -> dict[str, float]:
    """Peak live MiB of the second step and of the first, and the process's peak resident MiB."""
    warnings.simplefilter("ignore")
    live, peaks = LiveBytes(), []
    with live:
        model = build(shape, others, checkpointing)
        model, optimizers = prepare(method, model, rank, others)
        tokens = torch.randint(0, 8192, (4, 256))
        for _ in range(2):
            gc.collect()
            live.peak = live.now
            model(input_ids=tokens, labels=tokens).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            peaks.append(live.peak / 2**20)
    status = Path("/proc/self/status").read_text()
    resident = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    return {"live_mib": peaks[1], "refresh_mib": peaks[0], "resident_mib": resident}


def measure_in_child(case: dict[str, Any]) -> dict[str, Any]:
    """The case's row, measured in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(list(case.values()))]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {**case, **{key: f"{value:.1f}" for key, value in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="cases measured at the same time (%(default)s)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(*json.loads(options.case))))
        return
    done = {tuple(row[name] for name in CASE) for row in result_file.read(RESULTS)}
    settings = itertools.product(SHAPES, ("frozen", "trained"), (False, True), (16, 4), METHODS)
    cases = [
        dict(zip(CASE, (shape, SHAPES[shape][0] // part, others, checkpointing, method), strict=True))
        for shape, others, checkpointing, part, method in settings
    ]
    missing = [case for case in cases if tuple(map(str, case.values())) not in done]
    names = ("peft", "transformers", "galore-torch")
    versions = " ".join(f"{name} {metadata.version(name)}" for name in names) + f" hf_galore {hf_galore.__version__}"
    about = {"device": platform.machine(), "torch": torch.__version__, "versions": versions}
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(measure_in_child, missing):
            result_file.append(RESULTS, {**row, **about})


if __name__ == "__main__":
    main()
