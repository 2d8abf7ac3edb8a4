"""A rank that is killed (SIGKILL) in a step or while it saves: real processes, and what a restart makes of it.

The file is its own script: torchrun starts it on two ranks. Its FOLDER gets the checkpoints and the result.
"""

import argparse
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from deepspeed_ops import ENVIRONMENT, build_operators
from torchrun import leave_together, torchrun
from trainer_cases import Run, assert_same, llama, tokens

import hf_galore
from hf_galore.lowrank_layer import UPDATE
from hf_galore.shards import whole

STEPS, SAVE, KILLED = 6, 2, 5  # T = 2; checkpoints 2, 4 and 6
KILLED_IN_A_STEP = [("galore_adamw", "ddp"), ("galore_adamw_layerwise", "zero2")]
KILLED_WHILE_SAVING = [("galore_adamw_8bit_layerwise", "fsdp2")]


class Killer(transformers.TrainerCallback):
    """Kills one of the ranks, as a machine that dies would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_while_saving(trainer: transformers.Trainer, output: str) -> None:
    """Stands in for the Trainer's `_save_rng_state`: weights and optimizer are there, the rest is not."""
    if trainer.state.global_step == 2 * SAVE:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("engine", choices=["ddp", "fsdp2", "zero2"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", choices=["step", "save"])
    parser.add_argument("--resume", help="a checkpoint, or `last`")
    options = parser.parse_args()
    hf_galore.register()
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": SAVE, "max_steps": STEPS}
    if options.engine == "fsdp2":
        changes |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    if options.engine == "zero2":
        PartialState(backend="gloo")
        sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size"), "auto")
        changes["deepspeed"] = {**sizes, "zero_optimization": {"stage": 2}}
        changes["accelerator_config"] = {"use_configured_state": True}
    args = Run(options.method, options.folder).arguments(**changes)
    if options.engine == "fsdp2":
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if options.kill == "save":
        transformers.Trainer._save_rng_state = killed_while_saving
    callbacks = [Killer()] if options.kill == "step" else []
    trainer = transformers.Trainer(model=llama(), args=args, train_dataset=tokens(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=True if options.resume == "last" else options.resume)
    found = {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters() if UPDATE not in name}
    if args.process_index == 0:
        torch.save(found, options.folder / "weights.pt")
    leave_together()


def run(method: str, engine: str, *arguments: Any) -> subprocess.CompletedProcess:
    variables = {**ENVIRONMENT, "ACCELERATE_USE_DEEPSPEED": "true"} if engine == "zero2" else {}
    return torchrun(__file__, method, engine, *arguments, ranks=2, **variables)


def finished(method: str, engine: str, folder: Path, *options: Any) -> dict[str, torch.Tensor]:
    """The weights at the end of a run that is not killed."""
    result = run(method, engine, folder, *options)
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize(("method", "engine"), KILLED_IN_A_STEP)
def test_a_rank_is_killed_in_a_step(method, engine, tmp_path):
    """A restart from the last checkpoint ends with the bits of a run that nothing happens to."""
    if engine == "zero2":
        build_operators()
    assert run(method, engine, tmp_path, "--kill=step").returncode != 0
    assert not (tmp_path / "weights.pt").exists()
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    resumed = finished(method, engine, tmp_path, "--resume=last")
    assert_same(resumed, finished(method, engine, tmp_path / "undisturbed"))


@pytest.mark.parametrize(("method", "engine"), KILLED_WHILE_SAVING)
def test_all_are_killed_while_they_save(method, engine, tmp_path):
    """Nothing goes on from half a checkpoint; from the one before it training ends with the same bits."""
    assert run(method, engine, tmp_path, "--kill=save").returncode != 0
    assert (tmp_path / "checkpoint-4").exists()
    refused = run(method, engine, tmp_path, "--resume=last")
    assert refused.returncode != 0
    assert "trainer_state.json" in refused.stderr
    resumed = finished(method, engine, tmp_path, f"--resume={tmp_path / 'checkpoint-2'}")
    assert_same(resumed, finished(method, engine, tmp_path / "undisturbed"))


if __name__ == "__main__":
    main()
