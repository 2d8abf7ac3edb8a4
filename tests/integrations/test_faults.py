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
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from deepspeed_ops import ENVIRONMENT, build_operators, remember_processor
from torchrun import leave_together, torchrun
from trainer_cases import Run, assert_same, llama, tokens

import hf_galore
from hf_galore.lowrank_parameters import UPDATE
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


def trained(method: str, engine: str, folder: Path, resume: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after a run of this rank and the others, put together."""
    AcceleratorState._reset_state()
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": SAVE, "max_steps": STEPS}
    if engine == "fsdp2":
        changes |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    if engine == "zero2":
        PartialState(backend="gloo")
        sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size"), "auto")
        changes["deepspeed"] = {**sizes, "zero_optimization": {"stage": 2}}
        changes["accelerator_config"] = {"use_configured_state": True}
    args = Run(method, folder).arguments(**changes)
    if engine == "fsdp2":
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = transformers.Trainer(model=llama(), args=args, train_dataset=tokens(), **options)
    trainer.train(resume_from_checkpoint=resume)
    return {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters() if UPDATE not in name}


def main() -> None:
    """A run that is killed; or what a restart meets, and a run that nothing happens to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("engine", choices=["ddp", "fsdp2", "zero2"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", choices=["step", "save"])
    parser.add_argument("--resume", help="the name of a checkpoint: the last one must then be refused")
    options = parser.parse_args()
    hf_galore.register()
    remember_processor()
    run = options.method, options.engine
    if options.kill == "save":
        transformers.Trainer._save_rng_state = killed_while_saving
    if options.kill:
        trained(*run, options.folder, callbacks=[Killer()] if options.kill == "step" else [])
        return
    checkpoint = True
    if options.resume:
        with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
            trained(*run, options.folder, True)
        checkpoint = str(options.folder / options.resume)
    found = {"resumed": trained(*run, options.folder, checkpoint)}
    found["undisturbed"] = trained(*run, options.folder / "undisturbed")
    if os.environ["RANK"] == "0":
        torch.save(found, options.folder / "weights.pt")
    leave_together()


def launch(method: str, engine: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    variables = {**ENVIRONMENT, "ACCELERATE_USE_DEEPSPEED": "true"} if engine == "zero2" else {}
    return torchrun(__file__, method, engine, folder, *options, ranks=2, **variables)


def assert_it_goes_on(method: str, engine: str, folder: Path, *options: str) -> None:
    """To the bits of a run that nothing happens to."""
    result = launch(method, engine, folder, *options)
    assert result.returncode == 0, result.stderr[-4000:]
    found = torch.load(folder / "weights.pt", weights_only=True)
    assert_same(found["resumed"], found["undisturbed"])


@pytest.mark.parametrize(("method", "engine"), KILLED_IN_A_STEP)
def test_a_rank_is_killed_in_a_step(method, engine, tmp_path):
    """A restart goes on from the last checkpoint."""
    if engine == "zero2":
        build_operators()
    assert launch(method, engine, tmp_path, "--kill=step").returncode != 0
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    assert not (tmp_path / "checkpoint-6").exists()
    assert_it_goes_on(method, engine, tmp_path)


@pytest.mark.parametrize(("method", "engine"), KILLED_WHILE_SAVING)
def test_all_are_killed_while_they_save(method, engine, tmp_path):
    """Nothing goes on from half a checkpoint; from the one before it training does."""
    assert launch(method, engine, tmp_path, "--kill=save").returncode != 0
    assert (tmp_path / "checkpoint-4").exists()
    assert not (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    assert_it_goes_on(method, engine, tmp_path, "--resume=checkpoint-2")


if __name__ == "__main__":
    main()
