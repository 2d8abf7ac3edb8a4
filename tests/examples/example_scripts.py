"""The scripts of examples/, called in this process: a child process would import all libraries again."""

import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_galore

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def call(name: str, *arguments: Any, cwd: Path, **instead: Any) -> str:
    """What `python examples/<name>.py` prints with the arguments in the folder `cwd`; nothing of it stays behind.

    `name` may begin with a folder of examples/.

    `instead` has what stands in for objects of the script, by name.
    """
    printed, threads = io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        path = EXAMPLES / f"{name}.py"
        patch.syspath_prepend(path.parent)
        script = importlib.import_module(path.stem)
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [path.name, *map(str, arguments)])
        with contextlib.suppress(ImportError):
            patch.setattr("datasets.config.HF_DATASETS_CACHE", str(cwd / "cache"))
        for key, value in instead.items():
            patch.setattr(script, key, value)
        try:
            script.main()
        finally:
            hf_galore.unregister()
            torch.set_num_threads(threads)
    return printed.getvalue()
