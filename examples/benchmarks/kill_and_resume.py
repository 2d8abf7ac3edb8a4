"""Kills training runs at random steps, resumes each from its last checkpoint, compares with a run without a kill.

    OMP_NUM_THREADS=1 python examples/benchmarks/kill_and_resume.py --kills 20

The signal is SIGKILL: no handler runs, nothing is flushed. A tiny Llama in bfloat16 is trained through the Trainer by
`galore_adamw_layerwise`, with gradient accumulation, weight decay, clipping, a schedule and dropout. For every kill a
fresh run is killed once, at a step and a moment in that step that are drawn from the seed, and a new process trains on
from the newest checkpoint, or from the beginning if there is none. Its last checkpoint must hold, bit for bit, the
weights and the optimizer state of a run that nobody killed.
"""

import argparse
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import hf_galore

MOMENTS = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_save"]
RESULTS = Path(__file__).with_name("results") / "kill_and_resume.json"
STEPS, SAVE_STEPS, GAP = 16, 3, 4


class Kill(TrainerCallback):
    """Kills its own process, without a word to anyone, at one moment of one step (counted from 1)."""

    def __init__(self, step: int, moment: str) -> None:
        def kill(args, state, control, **kwargs):
            over = moment in ("on_step_end", "on_save")  # the moments at which the step is counted already
            if state.global_step + (not over) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, moment, kill)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the steps and moments; of the runs: seed + number")
    parser.add_argument("--optim", default="galore_adamw_layerwise", help="the Trainer's optim")
    parser.add_argument("--refresh", default="streaming", choices=["streaming", "exact"], help="of the bases")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file")
    options = parser.parse_args()

    draw = random.Random(options.seed)
    rows = []
    for number in range(options.kills):
        moment = draw.choice(MOMENTS)
        step = draw.randrange(SAVE_STEPS, STEPS, SAVE_STEPS) if moment == "on_save" else draw.randint(1, STEPS)
        row = kill_once(options, options.seed + number, step, moment)
        rows.append(row)
        print(json.dumps(row), flush=True)
    same = all(row["same_weights"] and row["same_state"] for row in rows)
    result = {
        "verdict": "every resumed run equals the run without a kill, bit for bit" if same else "runs differ",
        "kills": len(rows),
        "optim": options.optim,
        "refresh": options.refresh,
        "steps": STEPS,
        "save_steps": SAVE_STEPS,
        "update_proj_gap": GAP,
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_galore": hf_galore.__version__,
        "python": sys.version.split()[0],
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "runs": rows,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n")
    print(result["verdict"])
    sys.exit(not same)


def kill_once(options: argparse.Namespace, seed: int, step: int, moment: str) -> dict:
    """One run to its end, one that is killed and resumed, and whether they end in the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        ended = in_child(options, whole, seed)
        killed = in_child(options, cut, seed, Kill(step, moment))
        resumed_from = get_last_checkpoint(str(cut)) if cut.exists() else None
        resumed_from = resumed_from and int(Path(resumed_from).name.rpartition("-")[2])
        if resumed_from is None:
            shutil.rmtree(cut, ignore_errors=True)
        resumed = in_child(options, cut, seed)
        if (ended, killed, resumed) != (0, -signal.SIGKILL, 0):
            raise SystemExit(f"exit codes {ended}, {killed}, {resumed} (step {step}, {moment}, seed {seed})")
        ends = [run / f"checkpoint-{STEPS}" for run in (whole, cut)]
        return {
            "seed": seed,
            "killed_in_step": step,
            "moment": moment,
            "resumed_from_step": resumed_from,
            "same_weights": same_bits(*(load_file(end / "model.safetensors") for end in ends)),
            "same_state": same_bits(*(state_of(end / "optimizer.pt") for end in ends)),
        }


def in_child(options: argparse.Namespace, folder: Path, seed: int, callback: TrainerCallback | None = None) -> int:
    """The exit code of a process that trains in the folder, from its last checkpoint if it has one.

    The process is forked, which spares it the imports; nothing has been computed before, so it inherits no threads.
    """
    child = multiprocessing.get_context("fork").Process(target=train, args=(options, folder, seed, callback))
    child.start()
    child.join()
    return child.exitcode


def train(options: argparse.Namespace, folder: Path, seed: int, callback: TrainerCallback | None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    hf_galore.register()
    torch.manual_seed(seed)
    ids = torch.randint(0, 128, (64, 16))
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=128, attention_dropout=0.1, use_cache=False, **sizes)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").to(torch.bfloat16)
    layerwise = f", refresh={options.refresh}" if options.optim.endswith("_layerwise") else ""
    args = TrainingArguments(
        str(folder),
        optim=options.optim,
        optim_target_modules="all-linear",
        optim_args=f"rank=8, update_proj_gap={GAP}, scale=1.0{layerwise}",
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=SAVE_STEPS,
        seed=seed,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[callback] if callback else [],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=folder.exists() and get_last_checkpoint(str(folder)) is not None)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """A saved optimizer's state by parameter and name."""
    states = torch.load(path, weights_only=True)["state"]
    return {f"{n}.{name}": torch.as_tensor(value) for n, state in states.items() for name, value in state.items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


if __name__ == "__main__":
    main()
