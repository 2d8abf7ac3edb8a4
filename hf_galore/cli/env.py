"""python -m hf_galore env: what a bug report needs."""

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_galore import __version__, native

LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "galore_torch",
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `env` to the command line."""
    text = "print the versions, devices and integrations that a bug report needs"
    parser = subparsers.add_parser("env", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> None:
    """Print the environment as text or as JSON."""
    report = environment()
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for title, section in report.items():
        print(f"{title}:")
        for name, value in section.items():
            print(f"  {name}: {value}")


def environment() -> dict[str, dict[str, Any]]:
    """Versions, devices, native ops and integrations, by section."""
    return {
        "versions": {"python": platform.python_version(), "platform": platform.platform(), "hf_galore": __version__}
        | {name: _version(name) for name in LIBRARIES},
        "devices": _devices(),
        "native ops": native_ops(),
        "integrations": _integrations(),
    }


def native_ops() -> dict[str, str]:
    """Which kernels are loaded, by device, and why there are none."""
    compiled = {"cpu": f"compiled, instruction set {native.cpu_kernels()}", "cuda": "compiled"}
    missing = {device: f"the Python references run: {why}" for device, why in native.reasons_for_none().items()}
    return compiled | missing


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {capability}, {torch.get_num_threads()} torch threads"}
    for index in range(torch.cuda.device_count()):
        cuda = torch.cuda.get_device_properties(index)
        memory = cuda.total_memory / 2**30
        devices[f"cuda:{index}"] = f"{cuda.name}, compute capability {cuda.major}.{cuda.minor}, {memory:.1f} GiB"
    if torch.version.cuda is not None:
        devices["cuda"] = f"torch is built for CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return devices


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _integrations() -> dict[str, str]:
    """Whether each module of hf_galore.integrations can be imported, or why not."""
    package = importlib.util.find_spec("hf_galore.integrations")
    folders = package.submodule_search_locations if package is not None else None
    found = {}
    for module in pkgutil.iter_modules(folders or []):
        try:
            importlib.import_module(f"hf_galore.integrations.{module.name}")
        except Exception as error:  # a broken library may raise anything, and a bug report wants to show it
            found[module.name] = f"{type(error).__name__}: {error}"
        else:
            found[module.name] = "importable"
    return found
