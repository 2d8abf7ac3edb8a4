"""GaLore under DDP and FSDP2: real processes (gloo), the real Trainer, compared with one that has the whole batch.

The file is its own script: torchrun starts it on two ranks, and on four for what two have saved. On CPUs the Trainer
would take fsdp=True for DDP, so the ranks claim GPUs.
"""

import gc
import itertools
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import trainer_cases
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch import Tensor, nn
from torchrun import leave_together, results_of
from trainer_cases import (
    NamesRecorder,
    Run,
    assert_same,
    build,
    distance,
    llama,
    logged,
    state_of,
    tokens,
    weights,
    with_columns_and_registers,
)
from transformers import LlamaForCausalLM

import hf_galore
from hf_galore.lowrank_parameters import UPDATE
from hf_galore.shards import whole

RANKS, MORE, BATCH, STEPS = 2, 4, 12, 5  # T = 2: bases are refreshed in steps 1, 3 and 5
METHODS = ("galore_adamw", "galore_adamw_8bit", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise")
LR = 1e-3
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Cell:
    """One way of training: the dtype of the weights, changes to the arguments, and to those of FSDP2."""

    dtype: str = "float64"
    changes: dict[str, Any] = field(default_factory=dict)
    fsdp: dict[str, Any] = field(default_factory=dict)
    optim_args: str = ", moments=keep"
    family: str = "llama"


CELLS = {
    "train": Cell(),
    "rotate": Cell(optim_args=", moments=rotate"),
    "randomized": Cell(optim_args=", subspace=randomized, basis_dtype=int8, moments=rotate"),
    "float32": Cell("float32"),
    "bfloat16": Cell("bfloat16"),
    "accumulate": Cell(changes={"gradient_accumulation_steps": 3}),
    "clip": Cell(changes={"max_grad_norm": 0.05}),
    "bf16": Cell("float32", {"bf16": True}),
    "checkpointing": Cell(changes={"activation_checkpointing": True}),
    "gpt2": Cell(family="gpt2"),  # its weights are transposed
    "weight_decay": Cell(changes={"weight_decay": 0.1}),
    "columns and registers": Cell(family="attention"),
    "ternary": Cell(family="ternary"),
    "ternary, checkpointing": Cell(changes={"activation_checkpointing": True}, family="ternary"),
    "ternary, bf16": Cell("float32", {"bf16": True}, family="ternary"),
    "ternary, peft": Cell(family="peft"),
}
OF_FSDP2 = {
    "checkpointing of FSDP2": Cell(fsdp={"activation_checkpointing": True}),
    "loaded on one rank": Cell(fsdp={"cpu_ram_efficient_loading": True}),
    "kept whole": Cell(fsdp={"reshard_after_forward": False}),
}
ENGINES = {"ddp": CELLS, "fsdp2": CELLS | OF_FSDP2}
# With 8-bit states: where their blocks, the rows of a rank, or the dtypes are others. The rest they have in common.
EIGHT_BITS = ("train", "randomized", "float32", "bfloat16", "gpt2", "columns and registers", "ternary", "kept whole")
CHECKPOINTS = {"ddp": ("whole",), "fsdp2": ("FULL_STATE_DICT", "SHARDED_STATE_DICT")}


def cells_of(engine: str, method: str) -> dict[str, Cell]:
    """What a method trains under an engine."""
    return {name: cell for name, cell in ENGINES[engine].items() if "8bit" not in method or name in EIGHT_BITS}


def model(cell: Cell) -> nn.Module:
    if cell.family == "gpt2":
        return build(transformers.GPT2Config, DTYPES[cell.dtype], attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    dense = llama(DTYPES[cell.dtype], attention_bias=False)  # the gradient of a key's bias is nothing but rounding
    if cell.family == "attention":
        return with_columns_and_registers(dense)
    # Codes of activations are made of float32 norms, where a last bit of a product can tip one of them: a CPU may
    # multiply two rows otherwise than four. In float64 only weights are rounded, in the bf16 cell both.
    rounding = {"quantize_activations": cell.dtype != "float64"}
    if cell.family == "peft":
        return get_peft_model(dense, hf_galore.BitLinearConfig(task_type="CAUSAL_LM", **rounding))
    return hf_galore.replace_linear(dense, **rounding) if cell.family == "ternary" else dense


def arguments(method: str, cell: Cell, ranks: int, **changes: Any) -> dict[str, Any]:
    """Of `Run.trainer`: the same batches in the same order on any number of ranks."""
    micro = cell.changes.get("gradient_accumulation_steps", 1)
    settings = {"per_device_train_batch_size": BATCH // ranks // micro, "max_steps": STEPS, "learning_rate": LR}
    # By the rows that are stored, which FSDP2 spreads: `left` for transposed weights, but for the projected backward.
    side = "left" if cell.family == "gpt2" and "layerwise" not in method else "right"
    args = f", proj_type={side}{cell.optim_args}"
    return {"optim_args": args, **settings, **cell.changes, **changes}


def prepared(
    engine: str, method: str, cell: Cell, folder: Path, kind: str = CHECKPOINTS["fsdp2"][0], **changes: Any
) -> transformers.Trainer:
    """What trains on this rank and the others; `kind` is that of checkpoints."""
    if engine == "fsdp2":
        config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": kind, **cell.fsdp}
        changes |= {"fsdp": True, "fsdp_config": config}
    PartialState._reset_state()
    AcceleratorState._reset_state()
    args = Run(method, folder).arguments(**arguments(method, cell, int(os.environ["WORLD_SIZE"]), **changes))
    assert args.device.type == "cpu"
    if engine == "fsdp2":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = trainer_cases.Trainer(model=model(cell), args=args, train_dataset=tokens())
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def together(
    engine: str, method: str, cell: Cell, folder: Path, resume: str | None = None, **changes: Any
) -> transformers.Trainer:
    """The run of this rank and the others."""
    trainer = prepared(engine, method, cell, folder, **changes)
    trainer.train(resume_from_checkpoint=resume)
    wrapped = type(trainer.model_wrapped).__name__
    assert wrapped == "DistributedDataParallel" if engine == "ddp" else wrapped.startswith("FSDP")
    return trainer


def names_in_training(engine: str, folder: Path) -> list[list[str]]:
    """What callbacks see on this rank."""
    trainer, recorder = prepared(engine, "galore_adamw_layerwise", CELLS["train"], folder), NamesRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.seen


def outcome(trainer: transformers.Trainer) -> dict[str, Any]:
    """The weights and states, put together from the ranks, the losses, and the bases that this rank has."""
    named = {name.replace("._checkpoint_wrapped_module", ""): p for name, p in trainer.model.named_parameters()}
    state = {name.replace("._checkpoint_wrapped_module", ""): kept for name, kept in state_of(trainer).items()}
    return {
        "weights": {name: whole(param.detach()).clone() for name, param in named.items() if UPDATE not in name},
        "state": {f"{name}/{key}": whole(v).clone() for name, kept in state.items() for key, v in kept.items()},
        "losses": logged(trainer, "loss"),
        "bases": {name: kept["basis"] for name, kept in state.items() if "basis" in kept},
    }


def refusals(folder: Path) -> dict[str, str]:
    """What training says that FSDP cannot have."""
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "left": ("galore_adamw", {"optim_args": ", proj_type=left"}),
        "full": ("galore_adamw", {"optim_args": ", proj_type=full"}),
        "left, layerwise": ("galore_adamw_layerwise", {"optim_args": ", proj_type=left"}),
        "exact": ("galore_adamw_layerwise", {"optim_args": ", refresh=exact"}),
        "adafactor": ("galore_adafactor", {}),
        "adafactor, layerwise": ("galore_adafactor_layerwise", {}),
        "codes": ("galore_adamw_layerwise", {}),
        "fsdp1": ("galore_adamw", {}),
        "fsdp1, layerwise": ("galore_adamw_layerwise", {}),
    }
    found = {}
    for name, (method, changes) in asked.items():
        trainer = prepared("fsdp2", method, CELLS["train"], folder, **changes)
        if name.startswith("fsdp1"):  # on CPUs accelerate itself stops before that
            trainer.accelerator.state.fsdp_plugin.fsdp_version = 1
        if name == "codes":
            trainer.model.lm_head = bitsandbytes.nn.LinearNF4(32, 128).to("cpu")  # quantized as it moves
        before = weights(trainer.model)
        with pytest.raises(ValueError, match=r"galore|proj_type|refresh|target_modules") as caught:
            trainer.train()
        assert_same(weights(trainer.model), before)
        found[name] = str(caught.value)
    return found


def on_two_ranks(output: Path) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for engine, method in itertools.product(ENGINES, METHODS):
        for name, cell in cells_of(engine, method).items():
            results[engine, method, name] = outcome(together(engine, method, cell, output))
        for kind in CHECKPOINTS[engine]:
            folder, cell = output / engine / method / kind, CELLS["float32"]
            together(engine, method, cell, folder, kind=kind, save_strategy="steps", save_steps=3)
            resumed = together(engine, method, cell, folder, str(folder / "checkpoint-3"), kind=kind)
            results[engine, method, kind] = outcome(resumed)
        if engine == "fsdp2":
            resumed.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        resumed.save_model(str(output / engine / method / "saved"))
    results["std"] = outcome(together("fsdp2", METHODS[0], CELLS["train"], output, optim_args=", moments=keep"))
    results["names"] = {engine: names_in_training(engine, output) for engine in ENGINES}
    results["refused"] = refusals(output)
    return results


def on_four_ranks(output: Path) -> dict[Any, Any]:
    """Goes on from what two ranks have saved."""
    results: dict[Any, Any] = {}
    for engine, method in itertools.product(ENGINES, METHODS):
        for kind in CHECKPOINTS[engine]:
            checkpoint = str(output / engine / method / kind / "checkpoint-3")
            resumed = together(engine, method, CELLS["float32"], output, checkpoint, kind=kind)
            results[engine, method, kind] = outcome(resumed)
    return results


def main(output: Path) -> None:
    hf_galore.register()
    gc.freeze()  # as _quick_collections of conftest.py
    ranks = int(os.environ["WORLD_SIZE"])
    results = on_two_ranks(output) if ranks == RANKS else on_four_ranks(output)
    torch.save(results, output / f"rank{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    """What two ranks wrote."""
    return results_of(__file__, folder, RANKS)


@pytest.fixture(scope="module")
def said(folder, two):
    """What two ranks said, before four say more."""
    return (folder / "stderr.txt").read_text()


@pytest.fixture(scope="module")
def four(folder, said):
    """What four ranks wrote that went on from where two were."""
    return results_of(__file__, folder, MORE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function for (weights, losses) of a single process, which runs once for all cells that it is the same for."""
    known: dict[tuple[str, str], tuple] = {}

    def run(method: str, cell: Cell) -> tuple[dict[str, Tensor], list[float]]:
        key = method, repr(replace(cell, fsdp={}))
        if key not in known:
            trainer = Run(method, tmp_path_factory.mktemp("alone")).train(model(cell), **arguments(method, cell, 1))
            known[key] = weights(trainer.model), logged(trainer, "loss")
        return known[key]

    return run


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


# A gradient of nothing but rounding, some eps, moves an element by lr·eps/(eps + 1e-8) in a step; elsewhere steps of
# Adam differ by some eps. Rotating moments right after the first step divides rounding by rounding (the variance
# v̂ − m̂² of one gradient is zero), which leaves √eps of a step.
EPS = torch.finfo(torch.float64).eps
BOUNDS = {"keep": 10 * STEPS * LR * EPS / 1e-8, "rotate": 100 * STEPS * LR * EPS**0.5}
each_method = pytest.mark.parametrize("method", METHODS)
each_cell = pytest.mark.parametrize(
    ("engine", "method", "cell"),
    [(*case, name) for case in itertools.product(ENGINES, METHODS) for name in cells_of(*case)],
)
each_checkpoint = pytest.mark.parametrize(
    ("engine", "kind"), [(engine, kind) for engine, kinds in CHECKPOINTS.items() for kind in kinds]
)


@each_cell
def test_is_a_single_process(two, alone, engine, method, cell, ours):
    """In float64 weights after five steps with three refreshes, and every loss (which are float32).

    In lower precisions as far from a single process in float64 as a single process in the same precision is, or half
    as far again: the norm of all weights averages over the elements whose gradients are nothing but rounding, which
    move by a whole step in any direction. The losses of bf16 computation come in steps of 1/64 (4.83 in bfloat16).
    """
    setting, found = ENGINES[engine][cell], two[0][engine, method, cell]
    usual, losses = alone(method, setting)
    if setting.dtype == "float64":
        bound = BOUNDS["rotate" if "rotate" in setting.optim_args else "keep"]
        assert furthest(found["weights"], usual) < bound
        assert found["losses"] == pytest.approx(losses, rel=1e-6)
    else:
        true, _ = alone(method, replace(setting, dtype="float64"))
        assert distance(found["weights"], true) <= 1.5 * distance(usual, true)
        assert found["losses"] == pytest.approx(losses, abs=1 / 64 if "bf16" in cell else 1e-3)


@each_cell
def test_ranks_have_the_same_bases(two, engine, method, cell):
    """Bit for bit, and so have they all that is put together from their rows."""
    one, other = (rank[engine, method, cell] for rank in two)
    assert len(one["bases"]) == (8 if cell == "gpt2" else 14)
    for part in ("bases", "weights", "state"):
        assert_same(one[part], other[part])


@each_method
@each_checkpoint
def test_resumes_to_the_bit(two, engine, method, kind):
    """From step 3 of 5, which refreshed bases; as do step 5 and the states."""
    straight, resumed = two[0][engine, method, "float32"], two[0][engine, method, kind]
    assert_same(resumed["weights"], straight["weights"])
    assert_same(resumed["state"], straight["state"])
    assert resumed["losses"][-2:] == straight["losses"][-2:]


@each_method
@each_checkpoint
def test_resumes_on_four_ranks(two, four, engine, method, kind):
    """What two ranks saved; the batches are the same. In 8 bits, too, because no block crosses a row under FSDP2."""
    straight, resumed = two[0][engine, method, "float32"], four[0][engine, method, kind]
    start = weights(model(CELLS["float32"]))
    assert distance(resumed["weights"], straight["weights"]) <= 0.01 * distance(straight["weights"], start)
    assert resumed["losses"][-2:] == pytest.approx(straight["losses"][-2:], rel=1e-6)
    assert_same(resumed["bases"], four[MORE - 1][engine, method, kind]["bases"])


@each_method
@pytest.mark.parametrize("engine", ENGINES)
def test_saved_model_is_a_plain_one(two, folder, engine, method):
    """Its keys and weights, without what the projected backward adds, as plain transformers loads it."""
    found = LlamaForCausalLM.from_pretrained(folder / engine / method / "saved", dtype=torch.float32)
    assert_same(weights(found), two[0][engine, method, CHECKPOINTS[engine][-1]]["weights"])


@pytest.mark.parametrize("engine", ENGINES)
def test_callbacks_see_the_parameters_of_the_plain_model(two, engine):
    plain = [name for name, _ in model(CELLS["train"]).named_parameters()]
    for rank in two:
        assert rank["names"][engine] == [plain] * (1 + 2 * STEPS)


def test_std_is_right_and_says_so_once(two, said):
    assert_same(two[0]["std"]["weights"], two[0]["fsdp2", "galore_adamw", "train"]["weights"])
    assert len(re.findall("proj_type='std' is taken as 'right'", said)) == RANKS  # each process once


def test_what_fsdp_cannot_have_is_refused(two):
    refused = two[1]["refused"]
    for name in ("left", "full", "left, layerwise"):
        assert re.search("proj_type='(left|full)' does not go with.*use 'right'", refused[name])
    assert "use refresh=streaming" in refused["exact"]
    assert "'lm_head' is quantized" in refused["codes"]
    for name in ("adafactor", "adafactor, layerwise"):
        assert "does not run under FSDP2" in refused[name]
        assert "use galore_adamw or galore_adamw_8bit" in refused[name]
    for name in ("fsdp1", "fsdp1, layerwise"):
        assert "does not run under FSDP1" in refused[name]
        assert "fsdp_version: 2" in refused[name]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_together()
