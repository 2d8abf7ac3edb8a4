"""Starts a test file as its own script on several ranks (gloo): real processes, through torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent


def torchrun(script: str, *arguments: Any, ranks: int, **variables: str) -> subprocess.CompletedProcess:
    """The finished launch of the script, one thread for each rank, with these environment variables besides."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
    return subprocess.run([*command, *map(str, arguments)], env=env, capture_output=True, text=True)


def leave_together() -> None:
    """The end of a rank's script: gloo may abort a process that ends while another still talks to it."""
    dist.barrier()
    dist.destroy_process_group()


def results_of(script: str, output: Path, ranks: int) -> list[dict[Any, Any]]:
    """What the ranks of the script have saved as rank0.pt, rank1.pt, … in its only argument, a folder."""
    process = torchrun(script, output, ranks=ranks)
    assert process.returncode == 0, process.stderr[-6000:]
    (output / "stderr.txt").write_text(process.stderr)
    return [torch.load(output / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
