"""GaLore under DeepSpeed ZeRO 1, 2, 3, with and without offload: real processes (gloo), the real Trainer.

The file is its own script: torchrun starts it twice, with two ranks that run all cells and with one that meets their
checkpoints. Ranks write what they have; the tests compare with a single process that has twice the batch.
"""

import gc
import itertools
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from deepspeed_ops import ENVIRONMENT, LIMIT, build_operators, locked, python, remember_processor
from torch.utils.data import DataLoader
from torchrun import leave_together, torchrun
from trainer_cases import (
    RANK,
    NamesRecorder,
    Run,
    Trainer,
    assert_same,
    build,
    distance,
    llama,
    logged,
    tokens,
    weights,
    with_columns_and_registers,
)
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.models.utils import add_hooks, remove_hooks

import hf_galore
from hf_galore import GaLoreAdamW, galore_param_groups
from hf_galore.lowrank_backward import enable, engine_of

pytestmark = pytest.mark.timeout(2 * LIMIT)  # DeepSpeed's CPU Adam is compiled once, in 90 CPU-seconds or more

RANKS = 2
STEPS, SAVED = 5, 3  # T = 2: bases are refreshed in every step
RATE = 1e-3
CONFIGURATIONS = Path(__file__).resolve().parents[2] / "examples" / "accelerate"

ZERO = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0},
}
ZERO["zero3_offload"] = ZERO["zero3"] | {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
AUTO = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")

OPTIONS = ", share_inputs=true, lazy=true, equal_state=true, subspace=randomized, stagger=false, fold_every=1"

# What a cell changes, and what a single process needs to do the same.
CHANGES = {
    "train": ({}, {}),
    "accumulate": ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, {}),
    "clip": ({"max_grad_norm": 0.1}, {"max_grad_norm": 0.1}),
    "checkpointing": ({"activation_checkpointing": True}, {}),
    "schedule": ({"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "linear"}),
    "std": ({"optim_args": ", proj_type=std"}, {}),
    "options": ({"optim_args": OPTIONS}, {"optim_args": OPTIONS}),
    "columns and registers": ({}, {}),
    "bf16": ({"bf16": True}, {}),
    "ternary": ({}, {}),
    "ternary, bf16": ({"bf16": True}, {}),
}
FLOAT32 = [
    *itertools.product(ZERO, ["galore_adamw"], ["train", "accumulate"]),
    *itertools.product(("zero2", "zero3_offload"), ["galore_adamw"], ["clip", "checkpointing"]),
    *itertools.product(("zero2", "zero3"), ["galore_adamw_layerwise"], ["train"]),  # the same engine by its own name
    *((engine, "galore_adamw", "schedule") for engine in ("zero2_offload", "zero3")),
    *((engine, "galore_adamw_layerwise", "options") for engine in ("zero2", "zero3")),
    ("zero1", "galore_adamw", "std"),
    *itertools.product(("zero2", "zero3"), ("galore_adamw", "galore_adamw_layerwise"), ("columns and registers",)),
    *((engine, "galore_adamw", "ternary") for engine in ("zero1", "zero2", "zero3")),
]
TERNARY_OFFLOAD = [("zero2_offload", "galore_adamw", "ternary"), ("zero3_offload", "galore_adamw", "ternary")]
EIGHT_BITS = [
    *itertools.product(ZERO, ["galore_adamw_8bit"], ["train"]),
    *itertools.product(("zero2", "zero3_offload"), ["galore_adamw_8bit"], ["accumulate"]),
    ("zero2", "galore_adamw_8bit_layerwise", "train"),
]
BFLOAT16 = [
    *itertools.product(ZERO, ["galore_adamw"], ["bf16"]),
    *itertools.product(("zero2", "zero3_offload"), ["galore_adamw_8bit"], ["bf16"]),
    *((engine, "galore_adamw", "ternary, bf16") for engine in ("zero2", "zero3")),
]
RESUMED = [
    *itertools.product(ZERO, ["galore_adamw"], ["train"]),
    *itertools.product(("zero1", "zero2_offload", "zero3"), ["galore_adamw_8bit"], ["train"]),
    ("zero2", "galore_adamw_8bit_layerwise", "train"),
    ("zero3", "galore_adamw_layerwise", "options"),
    ("zero1", "galore_adamw", "bf16"),
    ("zero3", "galore_adamw", "bf16"),
    ("zero3", "galore_adamw", "ternary"),
]

# What is refused: optim, optim_args, what the DeepSpeed configuration has, and what the error must name and offer.
NVME = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "."}}
REFUSED = {
    "moments": ("galore_adamw", "moments=reset", {}, "moments='reset' .*under DeepSpeed; what does: rotate, keep"),
    "source": ("galore_adamw", "source=moment", {}, "source='moment' .*under DeepSpeed; what does: gradient"),
    "full": ("galore_adamw", "proj_type=full", {}, "proj_type='full' .*under DeepSpeed; what does: right"),
    "reverse_std": ("galore_adamw", "proj_type=reverse_std", {}, "proj_type='reverse_std' .*what does: right"),
    "left": ("galore_adamw_layerwise", "proj_type=left", {}, "proj_type='left' .*under DeepSpeed; what does: right"),
    "exact": ("galore_adamw_layerwise", "refresh=exact", {}, "refresh='exact'.*streaming"),
    "adafactor": ("galore_adafactor", "lazy=false", {}, "optim='galore_adafactor' does not.*galore_adamw_8bit"),
    "adafactor_layerwise": ("galore_adafactor_layerwise", "lazy=false", {}, "optim='galore_adafactor_layerwise' does"),
    "optimizer": (
        "galore_adamw",
        "lazy=false",
        {"optimizer": {"type": "AdamW"}},
        "'galore_adamw'.*'optimizer' section",
    ),
    "zero0": ("galore_adamw", "lazy=false", {"zero_optimization": {"stage": 0}}, "zero_stage=0.*without ZeRO use DDP"),
    "nvme": ("galore_adamw", "lazy=false", {"zero_optimization": NVME}, "offload_param.device='nvme'.*what does: cpu"),
}


# Kinds of models, by how the names of changes begin.
KINDS = {"ternary": hf_galore.replace_linear, "columns and registers": with_columns_and_registers, "": lambda x: x}


def ids(cell: tuple[str, str, str]) -> str:
    return "-".join(cell)


def made(change: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model of a run."""
    return KINDS[kind_of(change)](llama(dtype))


def kind_of(change: str) -> str:
    return next((kind for kind in KINDS if change.startswith(kind)), "")


# In the ranks.


def config(engine: str, **changes) -> dict:
    return {"zero_optimization": ZERO[engine], **dict.fromkeys(AUTO, "auto"), "bf16": {"enabled": "auto"}, **changes}


def settings(engine: str, change: str = "train", **more) -> dict:
    """The arguments of a run under DeepSpeed."""
    shared = {"per_device_train_batch_size": 4 // dist.get_world_size(), "max_steps": STEPS, "weight_decay": 0.1}
    under = {"deepspeed": config(engine), "accelerator_config": {"use_configured_state": True}}
    return {**shared, **under, **CHANGES[change][0], **more}


def trained(name: str, folder: Path, model=None, resume=None, change: str = "train", **arguments) -> Trainer:
    """The Trainer after a run."""
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()  # that of an earlier run, which would partition the model as it is made
    trainer = Run(name, folder).trainer(made(change) if model is None else model, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def result(trainer: Trainer) -> dict:
    """What a run gave; the weights are on rank 0 alone in ZeRO-3."""
    engine = trainer.deepspeed
    state = trainer.accelerator.get_state_dict(engine) or {}
    return {
        "weights": {name: value.clone() for name, value in state.items()},
        "losses": logged(trainer, "loss"),
        "stage": engine.zero_optimization_stage(),
        "inner": type(engine.optimizer.optimizer).__name__,
    }


def save_and_resume(engine: str, name: str, change: str, folder: Path) -> dict:
    """A run that saves on its way, another one that goes on from there, and what that saves when it has ended."""
    saving = settings(engine, change, save_strategy="steps", save_steps=SAVED)
    trainer = trained(name, folder, change=change, **saving)
    undisturbed = result(trainer)
    checkpoint = folder / f"checkpoint-{SAVED}"
    trainer = trained(name, folder, resume=str(checkpoint), change=change, **settings(engine, change))
    trainer.save_model(str(folder / "model"))
    trainer.deepspeed.save_checkpoint(str(folder / "after"))
    return {"undisturbed": undisturbed, "resumed": result(trainer)}


def refusal(name: str, folder: Path, model=None, resume=None, error=ValueError, **arguments) -> str:
    with pytest.raises(error) as caught:
        trained(name, folder, model, resume, **arguments)
    return str(caught.value)


def refusal_of(optim: str, optim_args: str, changes: dict, folder: Path) -> str:
    deepspeed = config("zero2", **changes)
    return refusal(optim, folder, **settings("zero2", optim_args=f", {optim_args}", deepspeed=deepspeed))


def refusal_of_experts(folder: Path) -> str:
    """Fused experts are no nn.Linear: their gradients would be projected by the optimizer."""
    unset_hf_deepspeed_config()
    model = build(transformers.MixtralConfig, intermediate_size=64, num_local_experts=2, num_key_value_heads=2)
    with pytest.warns(UserWarning, match="keep their full gradients"):
        return refusal("galore_adamw", folder, model, **settings("zero2"))


def refusal_of_a_part(folder: Path, checkpoint: Path) -> str:
    """A checkpoint without its bases."""
    if dist.get_rank() == 0:
        shutil.copytree(checkpoint, folder / "part")
        for file in (folder / "part").rglob("hf_galore_bases.pt"):
            file.unlink()
    dist.barrier()
    return refusal("galore_adamw", folder, resume=str(folder / "part"), **settings("zero2"))


def partitioned_when_made(change: str, folder: Path) -> dict:
    """A run of a model whose parameters ZeRO-3 partitions as they are loaded."""
    AcceleratorState._reset_state()
    arguments = Run("galore_adamw", folder).arguments(**settings("zero3", change))  # alive, makes transformers do so
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", attn_implementation="eager")
    assert arguments.deepspeed
    assert all(param.numel() == 0 for param in model.parameters())
    return result(trained("galore_adamw", folder, model, **settings("zero3", change)))


def loop(model: torch.nn.Module, prepare, backward) -> None:
    """Training without the Trainer."""
    engine = enable(model, rank=RANK, update_proj_gap=2, scale=1.0, fold_every=2)
    optimizer = GaLoreAdamW(engine.param_groups(model), lr=RATE, eps=1e-8, weight_decay=0.1)
    engine.attach(optimizer)
    model, optimizer, loader = prepare(model, optimizer, DataLoader(tokens(), batch_size=4 // world_size()))
    for _, batch in zip(range(STEPS), loader, strict=False):
        backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def transposed() -> torch.nn.Module:
    """A model whose layers store their weights transposed (Conv1D)."""
    return build(transformers.GPT2Config, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def kept_for_the_backward_pass(folder: Path) -> list[tuple[int, int]]:
    """The shapes of the weights that a forward pass has left with autograd, where ZeRO-3 is to keep none whole."""
    AcceleratorState._reset_state()
    zero = ZERO["zero3"] | {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    deepspeed = config("zero3", zero_optimization=zero | {"stage3_prefetch_bucket_size": 0}, bf16={"enabled": False})
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed))
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", attn_implementation="eager").train()
    optimizer = GaLoreAdamW(enable(model, rank=RANK).param_groups(model))
    model, _, loader = accelerator.prepare(model, optimizer, DataLoader(tokens(), batch_size=2))
    loss = model(**next(iter(loader))).loss
    sizes = {tuple(module.weight.ds_shape) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    return [tuple(tensor.shape) for tensor in saved_by(loss) if tuple(tensor.shape) in sizes]


def saved_by(loss: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that autograd keeps for the backward pass of our layers."""
    seen, left = set(), [loss.grad_fn]
    while left:
        function = left.pop()
        if function is not None and function not in seen:
            seen.add(function)
            left += [following for following, _ in function.next_functions]
    ours = [function for function in seen if type(function).__name__ == "ProjectedLinearBackward"]
    assert len(ours) == 14
    return [tensor for function in ours for tensor in function.saved_tensors if tensor is not None]


def skipped(folder: Path) -> dict:
    """A run whose second step DeepSpeed skips, because its gradients are not finite."""
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    deepspeed = config("zero2", bf16={"enabled": True, "check_grad_overflow": True})
    trainer = Run("galore_adamw", folder).trainer(llama(), **settings("zero2", "bf16", deepspeed=deepspeed))
    compute_loss, engines = trainer.compute_loss, []

    def poisoned(*args, **kwargs):
        engines.append(engine_of(trainer.model))
        return compute_loss(*args, **kwargs) * (float("inf") if len(engines) == 2 else 1.0)

    trainer.compute_loss = poisoned
    trainer.train()
    steps = {int(basis.steps) for basis in engines[0].bases}
    finite = all(bool(param.isfinite().all()) for param in trainer.model.parameters())
    return {"skipped": trainer.deepspeed.skipped_steps, "steps": steps, "finite": finite}


def names_in_training(engine: str, folder: Path) -> list[list[str]]:
    """What callbacks see on this rank."""
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    trainer, recorder = Run("galore_adamw", folder).trainer(llama(), **settings(engine)), NamesRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.seen


class HooksRemoved(transformers.TrainerCallback):
    """Compares the logits between two folds, with ZeRO-3's hooks and without, as TRL's trainers generate."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        self.trainer = trainer

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine, ids = self.trainer.deepspeed, torch.arange(8)[None]
        if state.global_step == SAVED:
            with deepspeed.zero.GatheredParameters(engine.parameters()):
                remove_hooks(engine)
                self.pending = any(layer.pending for layer in engine_of(self.trainer.model).layers.values())
                logits = self.trainer.model(input_ids=ids).logits
                add_hooks(engine)
            self.difference = float((engine(input_ids=ids).logits - logits).abs().max())


def hooks_removed(folder: Path) -> dict:
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    rare = ", update_proj_gap=10, stagger=false"  # the one refresh, and fold, comes after the first step
    trainer = Run("galore_adamw", folder).trainer(llama(), **settings("zero3", optim_args=rare))
    trainer.add_callback(compared := HooksRemoved(trainer))
    trainer.train()
    return {"difference": compared.difference, "pending": compared.pending, "steps": trainer.state.global_step}


def accelerated(engine: str, folder: Path) -> dict:
    """The weights after `loop` under an Accelerator; in ZeRO-3 the model is partitioned as it is loaded."""
    AcceleratorState._reset_state()
    plugin = DeepSpeedPlugin(hf_ds_config=config(engine, gradient_clipping=0.0, bf16={"enabled": False}))
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", attn_implementation="eager").train()
    loop(model, accelerator.prepare, accelerator.backward)
    return {"weights": dict(accelerator.get_state_dict(accelerator._models[-1]) or {})}


def refusal_of_matrices() -> str:
    """GaLoreAdamW with its own projection, prepared for flat shards."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config("zero2", bf16={"enabled": False})))
    model = llama()
    with pytest.raises(ValueError, match="projects matrices") as caught:
        accelerator.prepare(model, GaLoreAdamW(galore_param_groups(model)), DataLoader(tokens(), batch_size=2))
    return str(caught.value)


def main(output: Path) -> None:
    remember_processor()
    PartialState(backend="gloo")
    hf_galore.register()
    gc.freeze()  # as _quick_collections of conftest.py
    if dist.get_world_size() == RANKS:
        results = {
            cell: result(trained(cell[1], output, change=cell[2], **settings(cell[0], cell[2])))
            for cell in FLOAT32 + EIGHT_BITS + BFLOAT16 + TERNARY_OFFLOAD
        }
        results |= {ids(cell): save_and_resume(*cell, output / ids(cell)) for cell in RESUMED}
        results |= {case: refusal_of(*REFUSED[case][:3], output) for case in REFUSED}
        results |= {("accelerator", engine): accelerated(engine, output) for engine in ("zero2", "zero3_offload")}
        unset_hf_deepspeed_config()
        results["transposed"] = result(trained("galore_adamw", output, transposed(), **settings("zero3")))
        results["kept"] = kept_for_the_backward_pass(output)
        results["skipped"] = skipped(output)
        results["names"] = {engine: names_in_training(engine, output) for engine in ("zero2", "zero3")}
        results["hooks removed"] = hooks_removed(output)
        results["experts"] = refusal_of_experts(output)
        results["matrices"] = refusal_of_matrices()
        results["part"] = refusal_of_a_part(output, output / "zero2-galore_adamw-train" / f"checkpoint-{SAVED}")
        results |= {("made", change): partitioned_when_made(change, output) for change in ("train", "bf16")}
    else:
        results = {
            engine: result(trained("galore_adamw", output, **settings(engine))) for engine in ("zero2", "zero3")
        }
        for engine in ZERO:
            resume = str(output / f"{engine}-galore_adamw-train" / f"checkpoint-{SAVED}")
            arguments = settings(engine) | {"error": RuntimeError, "resume": resume}
            results["resume", engine] = refusal("galore_adamw", output, **arguments)
    torch.save(results, output / f"rank{dist.get_rank()}of{dist.get_world_size()}.pt")


# In the tests.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder with what the ranks wrote; the workers of pytest-xdist share it."""
    base = tmp_path_factory.getbasetemp()
    output = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "deepspeed"
    with locked(output / "lock"):
        if not (output / "log").exists():
            build_operators()
            llama().save_pretrained(output / "llama")
            variables = {**ENVIRONMENT, "ACCELERATE_USE_DEEPSPEED": "true"}
            launches = [torchrun(__file__, output, ranks=ranks, **variables) for ranks in (RANKS, 1)]
            for process in launches:
                assert process.returncode == 0, process.stderr[-6000:]
            (output / "log").write_text(launches[0].stderr)
    return output


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    """What the two ranks wrote."""
    return [torch.load(folder / f"rank{rank}of{RANKS}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    """What the rank wrote that was alone."""
    return torch.load(folder / "rank0of1.pt", weights_only=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A function for (weights, losses) of one process without DeepSpeed, with all of the batch."""
    known: dict[tuple, tuple] = {}

    def run(name: str, change: str = "train", dtype: torch.dtype = torch.float32, steps: int = STEPS):
        key = (name, kind_of(change), str(CHANGES[change][1]), dtype, steps)
        if key not in known:
            hf_galore.register()
            model, run = made(change, dtype), Run(name, tmp_path_factory.mktemp("single"))
            trainer = run.train(model, max_steps=steps, weight_decay=0.1, **CHANGES[change][1])
            hf_galore.unregister()
            known[key] = weights(model), logged(trainer, "loss")
        return known[key]

    return run


def layerwise(name: str) -> str:
    return name if name.endswith("_layerwise") else f"{name}_layerwise"


def assert_close(actual: dict, expected: dict, steps: int = STEPS) -> None:
    """Float32 gradients that were summed in another order differ by some 1e-7 of the large ones.

    Adam moves every weight by about the rate, however small its gradient is: one that is 1e-4 of the large ones is
    known to a thousandth, and so is its step.
    """
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0.0, atol=steps * RATE * 1e-3, msg=name)


def error(actual: list[float], expected: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("cell", FLOAT32, ids=ids)
def test_float32_runs_are_those_of_a_single_process(ranks, single, cell):
    engine, name, change = cell
    expected, losses = single(layerwise(name), change)
    assert ranks[0][cell]["stage"] == ZERO[engine]["stage"]
    assert ranks[0][cell]["inner"] == ("DeepSpeedCPUAdam" if "offload" in engine else "GaLoreAdamW")
    assert_close(ranks[0][cell]["weights"], expected)
    assert ranks[0][cell]["losses"] == pytest.approx(losses, rel=1e-6)


def test_ternary_codes_flip_where_the_offloaded_adam_rounds_otherwise(ranks, single):
    """It does so by 1e-6 of a step: a code at its threshold flips, which moves its weight's gradient from then on."""
    expected, losses = single("galore_adamw_layerwise", "ternary")
    runs = [ranks[0][cell] for cell in TERNARY_OFFLOAD]
    assert_close(runs[0]["weights"], runs[1]["weights"])
    assert runs[0]["losses"] == pytest.approx(losses, rel=1e-5)
    start = made("ternary").state_dict()
    assert distance(runs[0]["weights"], expected) <= 0.01 * distance(start, expected)


@pytest.mark.parametrize("cell", EIGHT_BITS, ids=ids)
def test_8bit_runs_are_as_near_as_those_of_a_single_process(ranks, single, cell):
    """To the run in float32. Blocks lie elsewhere here and hold the small moments too: twice the distance.

    Codes are wrong by about a hundredth of a step: the losses by less than that of what the steps change in them.
    """
    plain, losses = single("galore_adamw_layerwise", cell[2])
    rounded, _ = single(layerwise(cell[1]), cell[2])
    found = ranks[0][cell]
    assert found["inner"] == "GaLoreAdamW8bit"
    assert 0.0 < distance(found["weights"], plain) <= 2.0 * distance(rounded, plain)
    assert error(found["losses"], losses) <= 0.01 * (max(losses) - min(losses))


@pytest.mark.parametrize("cell", BFLOAT16, ids=ids)
def test_bfloat16_runs_are_as_near_as_those_of_a_single_process(ranks, single, cell):
    """To the run in float32. A logit, below 1/2 here, is wrong by 2^-9 of itself, and a loss by twice that."""
    change = cell[2].removesuffix(", bf16")
    plain, losses = single("galore_adamw_layerwise", change)
    rounded, _ = single(layerwise(cell[1]), change, dtype=torch.bfloat16)
    found = ranks[0][cell]
    assert {value.dtype for value in found["weights"].values()} == {torch.bfloat16}
    assert 0.0 < distance(found["weights"], plain) <= distance(rounded, plain)
    assert error(found["losses"], losses) <= 2.0**-9


@pytest.mark.parametrize("cell", RESUMED, ids=ids)
def test_resume_is_bit_exact(ranks, cell):
    for rank in ranks:
        undisturbed, resumed = rank[ids(cell)]["undisturbed"], rank[ids(cell)]["resumed"]
        assert_same(resumed["weights"], undisturbed["weights"])
        assert resumed["losses"] == undisturbed["losses"]
    assert ranks[0][ids(cell)]["resumed"]["weights"]


@pytest.mark.parametrize("cell", RESUMED, ids=ids)
def test_checkpoints_are_those_of_the_plain_model(ranks, folder, single, cell):
    """Folded, under the names of the plain model: DeepSpeed's own, the Trainer's, and what is saved at the end."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    here = folder / ids(cell)
    plain = llama().state_dict().keys()
    dtype = torch.bfloat16 if cell[2] == "bf16" else torch.float32
    final = ranks[0][ids(cell)]["resumed"]["weights"]
    for path, weights_of in ((here / f"checkpoint-{SAVED}", None), (here / "after", final)):
        rebuilt = get_fp32_state_dict_from_zero_checkpoint(path)
        assert rebuilt.keys() == plain
        model = path if weights_of is None else here / "model"
        saved = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager").state_dict()
        assert_same({name: value.to(dtype) for name, value in rebuilt.items()}, dict(saved))
        if weights_of is not None:
            assert_same(dict(saved), weights_of)
    if cell[1:] == ("galore_adamw", "train"):
        saved = AutoModelForCausalLM.from_pretrained(here / f"checkpoint-{SAVED}", attn_implementation="eager")
        assert_close(dict(saved.state_dict()), single("galore_adamw_layerwise", steps=SAVED)[0])


@pytest.mark.parametrize("engine", ZERO)
def test_resume_on_another_number_of_ranks_is_refused(alone, engine):
    assert "was written by 2 ranks and this run has 1" in alone["resume", engine]
    assert "Resume with 2 ranks, or start from the checkpoint's weights" in alone["resume", engine]


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_one_rank_is_a_single_process(alone, single, engine):
    assert_close(alone[engine]["weights"], single("galore_adamw_layerwise")[0])


@pytest.mark.parametrize("engine", ["zero2", "zero3_offload"])
def test_an_accelerator_without_the_trainer(ranks, engine):
    model = llama()
    loop(model, lambda *args: args, lambda loss: loss.backward())
    assert_close(ranks[0]["accelerator", engine]["weights"], dict(model.state_dict()))


def test_a_model_that_was_partitioned_when_it_was_made(ranks, single):
    assert_close(ranks[0]["made", "train"]["weights"], single("galore_adamw_layerwise")[0])
    assert_same(ranks[0]["made", "bf16"]["weights"], ranks[0]["zero3", "galore_adamw", "bf16"]["weights"])


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(ranks, case):
    for rank in ranks:
        assert re.search(REFUSED[case][-1], rank[case])


def test_further_refusals(ranks):
    for rank in ranks:
        assert re.search("target_modules='.*experts.*' does not run under DeepSpeed", rank["experts"])
        assert "GaLoreAdamW projects matrices, and DeepSpeed shards them" in rank["matrices"]
        assert "has no hf_galore_bases.pt" in rank["part"]


def test_transposed_weights(ranks, ours, tmp_path):
    model = transposed()
    Run("galore_adamw_layerwise", tmp_path).train(model, max_steps=STEPS, weight_decay=0.1)
    assert_close(ranks[0]["transposed"]["weights"], dict(model.state_dict()))


def test_zero3_keeps_no_weight_whole_for_the_backward_pass(ranks):
    for rank in ranks:
        assert rank["kept"] == []


def test_a_skipped_step_is_no_step(ranks):
    for rank in ranks:
        assert rank["skipped"] == {"skipped": 1, "steps": {STEPS - 1}, "finite": True}


@pytest.mark.parametrize("engine", ZERO)
def test_the_configuration_of_accelerate_says_what_its_name_says(engine):
    found = load_config_from_file(str(CONFIGURATIONS / f"{engine}.yaml"))
    devices = {key: ZERO[engine].get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    assert found.distributed_type == DistributedType.DEEPSPEED
    assert found.deepspeed_config["zero_stage"] == ZERO[engine]["stage"]
    assert {key: found.deepspeed_config[f"{key}_device"] for key in devices} == devices
    assert set(CONFIGURATIONS.glob("zero*.yaml")) == {CONFIGURATIONS / f"{name}.yaml" for name in ZERO}


def test_register_does_not_need_deepspeed():
    python("-c", "import sys; sys.modules['deepspeed'] = None; import hf_galore; hf_galore.register()")


def test_one_line_of_the_log_says_what_was_chosen(folder, ranks):
    """By rank 0 alone, once in each run."""
    log = (folder / "log").read_text()
    assert log.count("proj_type=std runs as proj_type=right under DeepSpeed") == 1
    assert log.count("this runs as galore_adamw_8bit_layerwise") == sum(
        cell[1] == "galore_adamw_8bit" for cell in [*FLOAT32, *EIGHT_BITS, *BFLOAT16, *RESUMED, *RESUMED]
    )


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_callbacks_see_the_parameters_of_the_plain_model(ranks, engine):
    plain = [name for name, _ in llama().named_parameters()]
    for rank in ranks:
        assert rank["names"][engine] == [plain] * (1 + 2 * STEPS)


def test_it_generates_without_the_hooks_of_zero3(ranks):
    """Whoever gathers the parameters of DeepSpeed's engine, and takes its hooks off, has what is pending as well."""
    for rank in ranks:
        assert rank["hooks removed"] == {"difference": 0, "pending": True, "steps": STEPS}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_together()
