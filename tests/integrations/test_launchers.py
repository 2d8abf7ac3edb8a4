"""One unchanged script under every launcher and every configuration of examples/accelerate: real processes (gloo)."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from deepspeed_ops import ENVIRONMENT, build_operators
from trainer_cases import llama

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("launched.py")
CONFIGS = {path.stem: path for path in sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))}
OPTIMS = ("galore_adamw", "galore_adamw_8bit", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise")
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"} | {name: "DEEPSPEED" for name in CONFIGS if name.startswith("zero")}
OPTIONS = [
    "--optim_target_modules=all-linear",
    "--optim_args=rank=8, update_proj_gap=2, scale=1.0, proj_type=right, moments=keep",
    "--learning_rate=1e-3",
    "--lr_scheduler_type=constant",
    "--max_grad_norm=1.0",
    "--max_steps=4",
    "--logging_steps=1",
    "--save_strategy=no",
    "--report_to=none",
    "--train_sampling_strategy=sequential",
    "--use_cpu",
]
RUN = ["-m", "hf_galore", "run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(command: list[Any], model: Path, folder: Path, optims: Sequence[str] = OPTIMS) -> dict[str, dict[str, Any]]:
    """What the script found that trained the model with each optimizer, started by the command."""
    result = folder / "result.json"
    env = {**os.environ, **ENVIRONMENT}
    env["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), env.get("PYTHONPATH", "")])
    options = ["--optims", *optims, *OPTIONS, f"--model={model}", f"--output_dir={folder}", f"--result={result}"]
    process = subprocess.run([*map(str, command), *options], env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-6000:]
    found = json.loads(result.read_text())
    assert list(found) == list(optims)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the model: ZeRO-3 would draw other weights. DeepSpeed's operators are there as well."""
    build_operators()
    folder = tmp_path_factory.mktemp("model")
    llama(attention_bias=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    return launch([sys.executable, *RUN, SCRIPT], model, tmp_path_factory.mktemp("alone"))


def assert_like(found: dict[str, dict[str, Any]], alone: dict[str, dict[str, Any]], zero: bool = False) -> None:
    """Losses and gradient norms of a single process, in float32; under ZeRO those of the layerwise names.

    Losses of 4.8 and the rounding of steps of 1e-3: 1e-5, norms of the gradients of these losses: 1e-4. The 8-bit
    states of an engine may have other blocks: ten times that.
    """
    for optim, one in found.items():
        expected = alone[f"{optim.removesuffix('_layerwise')}_layerwise" if zero else optim]
        more = 10.0 if "8bit" in optim else 1.0
        assert one["ranks"] == 2
        assert one["losses"] == pytest.approx(expected["losses"], rel=more * 1e-5), optim
        assert one["norms"] == pytest.approx(expected["norms"], rel=more * 1e-4), optim


def test_alone_it_trains(alone):
    for one in alone.values():
        assert one["ranks"] == 1
        assert len(set(one["losses"])) == 4


@pytest.mark.parametrize("config", CONFIGS)
def test_accelerate_launch(config, model, alone, tmp_path):
    """Both ranks, the engine of the configuration, and the training of a single process."""
    command = [*LAUNCH, "--config_file", CONFIGS[config], "--mixed_precision=no", *RUN, SCRIPT]
    zero = config.startswith("zero")  # where the other names are the same training
    found = launch(command, model, tmp_path, OPTIMS[:2] if zero else OPTIMS)
    assert {one["engine"] for one in found.values()} == {ENGINES[config]}
    assert_like(found, alone, zero)


def test_torchrun(model, alone, tmp_path):
    assert_like(launch([*TORCHRUN, *RUN, SCRIPT], model, tmp_path, OPTIMS[::2]), alone)


def test_a_script_that_registers_itself(model, alone, tmp_path):
    """Plain `accelerate launch train.py`."""
    script = tmp_path / "train.py"
    script.write_text(f"import hf_galore\nhf_galore.register()\n{SCRIPT.read_text()}")
    command = [*LAUNCH, "--config_file", CONFIGS["ddp"], "--mixed_precision=no", script]
    assert_like(launch(command, model, tmp_path, OPTIMS[::2]), alone)
