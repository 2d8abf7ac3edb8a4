"""Settings of all tests: offline, seeded, and against the installed package where one is installed."""

import os
import random
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import numpy
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parent.parent
_elsewhere = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
if PathFinder.find_spec("hf_galore", _elsewhere) is not None:  # a wheel, not a checkout or an editable install
    sys.path[:] = _elsewhere
else:
    sys.path[:] = [str(ROOT), *_elsewhere]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
