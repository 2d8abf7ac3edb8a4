"""examples/accelerate_loop.py as a user runs it: alone, on two ranks, and sharded; the same losses everywhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPT = EXAMPLES / "accelerate_loop.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision=no"]
# On CPUs accelerate would take FSDP for DDP, so the ranks claim GPUs.
CLAIMS_GPUS = """
import runpy, sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def losses(*command) -> list[float]:
    """What the script prints, run by this command."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*map(str, command), "--cpu"], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [float(number) for number in re.findall(r"(?:loss|end:) (\d+\.\d+)", result.stdout)]


def test_it_learns_the_same_on_two_ranks():
    check_alone(alone := losses(sys.executable, SCRIPT, "--steps=20"))
    assert losses(*TORCHRUN, SCRIPT, "--steps=20") == pytest.approx(alone, abs=2e-3)


def test_it_learns_the_same_sharded(tmp_path):
    options = ["--steps=20", "--layerwise"]
    check_alone(alone := losses(sys.executable, SCRIPT, *options))
    claims = tmp_path / "claims_gpus.py"
    claims.write_text(CLAIMS_GPUS)
    fsdp2 = EXAMPLES / "accelerate" / "fsdp2.yaml"
    assert losses(*LAUNCH, "--config_file", fsdp2, claims, SCRIPT, *options) == pytest.approx(alone, abs=2e-3)


def check_alone(found: list[float]) -> None:
    """A single process learns."""
    assert found[0] > 3.4
    assert found[-1] < 2.0
