"""The compiled library of native ops, and how an op is defined.

Every op is a schema, a fake kernel for tracing, and a reference in Python that runs on every device and says what the
op computes. Two libraries (`csrc/`, built by setup.py) add kernels by dispatch key, for CPU and for CUDA; where one is
missing the references run, and `python -m hf_galore env` says so. With HF_GALORE_REQUIRE_NATIVE=1 a missing library is
an ImportError. HF_GALORE_CPU_KERNELS chooses among what runs on this CPU, for tests and bug reports: python (no
library), generic, avx2 or avx512. The CUDA kernels are used with HF_GALORE_CUDA_KERNELS=native alone, for as long as
they have been run by an emulation only and never on a GPU.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

OPS_VERSION = 5  # of the schemas, and in the library's name: one that was built for others is not found
REQUIRE = "HF_GALORE_REQUIRE_NATIVE"
_CPU_CHOICE, _CUDA_CHOICE = "HF_GALORE_CPU_KERNELS", "HF_GALORE_CUDA_KERNELS"
_FOLDER = Path(__file__).parent
_REBUILD = (
    "install hf_galore again where torch 2.10 or newer and a C++17 compiler are (`pip install -v .` shows the build)"
)

_references_only = False


def _defined() -> dict[str, Any]:
    """What is in the namespace of the ops, with the library that has put it there.

    Both stay where modules are imported anew, since torch takes a definition once.
    """
    found = vars(torch.ops.hf_galore)
    if "_library" not in found:
        found["_library"] = torch.library.Library("hf_galore", "DEF")
    return found


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the op hf_galore::<schema>, and returns what calls it."""
    name, defined = schema.partition("(")[0], _defined()
    if name not in defined:
        library = defined["_library"]
        library.define(schema)
        library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hf_galore::{name}", fake, lib=library)
    op = getattr(torch.ops.hf_galore, name).default

    def call(*args: Any) -> Any:
        return reference(*args) if _references_only else op(*args)

    return call


@contextmanager
def references_only() -> Iterator[None]:
    """Inside, every op is its reference in Python: what it is compared with, in tests and benchmarks."""
    global _references_only
    before, _references_only = _references_only, True
    try:
        yield
    finally:
        _references_only = before


def cpu_kernels() -> str | None:
    """The instruction set whose kernels run on this CPU; None without the library."""
    return None if _library is None else _library.hf_galore_cpu_kernels().decode()


def has_cuda_kernels() -> bool:
    """Whether the CUDA library is loaded."""
    return _cuda is not None


def reasons_for_none() -> dict[str, str]:
    """Why there is no library, by device."""
    reasons = {"cpu": _reason, "cuda": _cuda_reason}
    return {device: reason for device, reason in reasons.items() if reason is not None}


def _load(name: str) -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    found = sorted(_FOLDER.glob(f"{name}_v{OPS_VERSION}.*"))
    if not found:
        note = _FOLDER / f"{name}_build.txt"
        built = note.read_text("utf-8").strip() if note.exists() else "it was not built"
        return None, f"{built}; {_REBUILD}"
    try:
        return ctypes.CDLL(str(found[-1])), None
    except OSError as error:
        return None, f"{found[-1].name} cannot be loaded: {error}; {_REBUILD}"


def _load_cpu() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get(_CPU_CHOICE) == "python":
        return None, f"{_CPU_CHOICE}=python asks for the references"
    library, reason = _load("_native")
    if library is not None:
        library.hf_galore_cpu_kernels.restype = ctypes.c_char_p
    return library, reason


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    if torch.version.cuda is None:
        return None, "torch is built without CUDA"
    if os.environ.get(_CUDA_CHOICE) != "native":
        return None, f"{_CUDA_CHOICE}=native asks for the kernels, which have not been run on a GPU yet"
    return _load("_native_cuda")


def _check_required() -> None:
    """Raises ImportError if a library is required and missing."""
    if os.environ.get(REQUIRE, "0") in ("", "0"):
        return
    missing = reasons_for_none()
    if os.environ.get(_CUDA_CHOICE) != "native" or torch.version.cuda is None:
        missing.pop("cuda", None)
    for device, reason in missing.items():
        raise ImportError(f"{REQUIRE} is set and the native ops of hf_galore for {device} are missing: {reason}")


_library, _reason = _load_cpu()
_cuda, _cuda_reason = _load_cuda()
_check_required()
