"""What a figure was measured on: the last columns of a benchmark's CSV."""

import os
import shlex
import sys

import torch

from hf_galore.cli.env import environment


def conditions(load: float) -> dict[str, object]:
    """Load before (`load`, of one minute) and now, processor, threads, torch and the command line."""
    return {
        "load": f"{load:.2f}-{os.getloadavg()[0]:.2f}",
        "device": environment()["devices"]["cpu"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": shlex.join(["python", *sys.argv]),
    }
