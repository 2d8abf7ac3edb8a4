"""The compiled library of native ops, and how an op is defined.

Every op is a schema, a fake kernel for tracing, and a reference in Python that runs on every device and says what the
op computes. The library (`csrc/`, built by setup.py) adds kernels by dispatch key; where it is missing the references
run, and `python -m hf_galore env` says so. With HF_GALORE_REQUIRE_NATIVE=1 a missing library is an ImportError.
HF_GALORE_CPU_KERNELS chooses among what runs on this CPU, for tests and bug reports: python (no library), generic,
avx2 or avx512.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

OPS_VERSION = 1  # of the schemas, and in the library's name: one that was built for others is not found
REQUIRE = "HF_GALORE_REQUIRE_NATIVE"
_CHOICE = "HF_GALORE_CPU_KERNELS"
_FOLDER = Path(__file__).parent
_REBUILD = (
    "install hf_galore again where torch 2.10 or newer and a C++17 compiler are (`pip install -v .` shows the build)"
)

_schemas = torch.library.Library("hf_galore", "DEF")
_references_only = False


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the op hf_galore::<schema>, and returns what calls it."""
    name = schema.partition("(")[0]
    _schemas.define(schema)
    _schemas.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_galore::{name}", fake, lib=_schemas)
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


def reason_for_none() -> str | None:
    """Why there is no library; None if there is one."""
    return _reason


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if os.environ.get(_CHOICE) == "python":
        return None, f"{_CHOICE}=python asks for the references"
    found = sorted(_FOLDER.glob(f"_native_v{OPS_VERSION}.*"))
    if not found:
        note = _FOLDER / "_native_build.txt"
        built = note.read_text("utf-8").strip() if note.exists() else "it was not built"
        return None, f"{built}; {_REBUILD}"
    try:
        library = ctypes.CDLL(str(found[-1]))
    except OSError as error:
        return None, f"{found[-1].name} cannot be loaded: {error}; {_REBUILD}"
    library.hf_galore_cpu_kernels.restype = ctypes.c_char_p
    return library, None


def _is_required() -> bool:
    return os.environ.get(REQUIRE, "0") not in ("", "0")


_library, _reason = _load()
if _reason is not None and _is_required():
    raise ImportError(f"{REQUIRE} is set and the native ops of hf_galore are missing: {_reason}")
