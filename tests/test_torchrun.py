"""tests/torchrun.py: its ranks are what a real torchrun makes of them, and none is left, whatever ends.

The file is its own script: its first argument says what the ranks do.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torchrun import HERE, results_of, torchrun

REAL = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SCRIPT = HERE / "test_ranks.py"
WAITING = f"""
import torchrun
torchrun.LIBRARIES[:] = ["torch", "pytest"]
torchrun.torchrun({__file__!r}, "wait", {{!r}}, ranks=2)
"""


@pytest.fixture
def environment():
    """Of scripts that import from tests/."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def main(what: str, folder: Path) -> None:
    rank = os.environ["RANK"]
    lock = (folder / rank).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # until the rank ends
    if what == "look":
        found = {"environment": dict(os.environ), "arguments": sys.argv, "path": sys.path[0]}
        found |= {"threads": psutil.Process().num_threads(), "of torch": torch.get_num_threads()}
        found |= {"modules": [name for name in ("deepspeed", "hf_galore") if name in sys.modules]}
        torch.save(found, folder / f"rank{rank}.pt")
        return
    (folder / f"started{rank}").touch()
    while not (folder / "started0").exists() or not (folder / "started1").exists():
        time.sleep(0.01)
    if what == "raise" and rank == "1":
        raise RuntimeError("rank 1 has had enough")
    if what == "die" and rank == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def assert_none_is_left(folder: Path) -> None:
    for rank in "01":
        with (folder / rank).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits


@pytest.mark.slow
def test_ranks_are_those_of_torchrun(environment, tmp_path):
    """Bit for bit: DDP and FSDP2 by the script of another file. There strings are hashed otherwise on each rank."""
    real, forked = tmp_path / "real", tmp_path / "forked"
    real.mkdir()
    forked.mkdir()
    process = subprocess.run([*REAL, SCRIPT, real], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-6000:]
    for rank, found in enumerate(results_of(str(SCRIPT), forked, 2)):
        expected = torch.load(real / f"rank{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for cell, parts in expected.items():
            for part, tensors in parts.items():
                forked_too = found[cell][part]
                assert forked_too.keys() == tensors.keys()
                assert not [name for name in tensors if not torch.equal(forked_too[name], tensors[name])], (cell, part)


def test_ranks_find_a_fresh_process(environment, tmp_path, monkeypatch):
    """With the variables of now, not of when the libraries were imported."""
    monkeypatch.setenv("OURS", "now")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    del environment["PYTEST_CURRENT_TEST"]
    assert torchrun(__file__, "look", tmp_path, ranks=2, MARK="here").returncode == 0
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        variables = found.pop("environment")
        for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
            assert variables.pop(name)
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        assert variables == environment | of_rank | {"OURS": "now", "MARK": "here"}
        assert found.pop("arguments") == [__file__, "look", str(tmp_path)]
        assert found.pop("path") == str(HERE)
        assert found.pop("threads") == 2  # its own, and the one that sees the end of pytest
        assert found == {"of torch": 1, "modules": []}


@pytest.mark.parametrize(("what", "code"), [("raise", 1), ("die", -signal.SIGKILL)])
def test_a_rank_that_fails_ends_the_others(what, code, tmp_path):
    process = torchrun(__file__, what, tmp_path, ranks=2)
    assert process.returncode == code
    assert what == "die" or process.stderr.endswith("RuntimeError: rank 1 has had enough\n")
    assert_none_is_left(tmp_path)


def test_ranks_end_with_the_process_that_launched_them(environment, tmp_path):
    """Killed, it can tell nobody."""
    process = subprocess.Popen([sys.executable, "-c", WAITING.format(str(tmp_path))], env=environment)
    while not all((tmp_path / f"started{rank}").exists() for rank in "01"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert_none_is_left(tmp_path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
