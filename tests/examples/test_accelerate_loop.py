"""examples/accelerate_loop.py as a user runs it: alone, on two ranks, and sharded; the same losses everywhere."""

import os
import re
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState, PartialState
from example_scripts import EXAMPLES, call

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


def launched(*command) -> list[float]:
    """What the script prints, run by this command."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*map(str, command), "--cpu"], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return losses(result.stdout)


def losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?:loss|end:) (\d+\.\d+)", output)]


@pytest.fixture
def alone(tmp_path):
    """What the script prints in this process, which had no other Accelerator."""

    def run(*options):
        for state in (AcceleratorState, PartialState):
            state._reset_state()
        return losses(call("accelerate_loop", *options, "--cpu", cwd=tmp_path))

    return run


@pytest.mark.slow
def test_it_learns_the_same_on_two_ranks(alone):
    check_alone(expected := alone("--steps=20"))
    assert launched(*TORCHRUN, SCRIPT, "--steps=20") == pytest.approx(expected, abs=2e-3)


def test_it_learns_the_same_sharded(alone, tmp_path):
    options = ["--steps=20", "--layerwise"]
    check_alone(expected := alone(*options))
    claims = tmp_path / "claims_gpus.py"
    claims.write_text(CLAIMS_GPUS)
    fsdp2 = EXAMPLES / "accelerate" / "fsdp2.yaml"
    assert launched(*LAUNCH, "--config_file", fsdp2, claims, SCRIPT, *options) == pytest.approx(expected, abs=2e-3)


def test_it_learns_by_the_plain_optimizer(alone):
    check_alone(alone("--steps=20"))


def check_alone(found: list[float]) -> None:
    """A single process learns."""
    assert found[0] > 3.4
    assert found[-1] < 2.0
