"""python -m hf_galore run: any training script, with hf_galore registered and nothing else changed."""

import argparse
import importlib
import importlib.util
import os
import runpy
import shutil
import sys
import sysconfig
import types

import hf_galore

DESCRIPTION = """\
Call hf_galore.register(), then run SCRIPT or MODULE as `python SCRIPT ARGS` or `python -m MODULE ARGS` would.
SCRIPT is a file or the name of an installed Python command, such as trl. Scripts that start `accelerate launch`
(trl does) get the same in the processes they launch. To launch several processes yourself:

  accelerate launch -m hf_galore run SCRIPT ARGS
  torchrun --nproc_per_node 2 -m hf_galore run SCRIPT ARGS
"""

_LAUNCHERS = {"torchrun": "-m", "deepspeed": "--module"}  # and their option for a module in place of a script


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `run` to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="run a training script with hf_galore registered",
        description=DESCRIPTION,
        usage="python -m hf_galore run [-h] (SCRIPT | -m MODULE) ARGS...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-m", dest="is_module", action="store_true", help="the target is a module")
    parser.add_argument("target", metavar="SCRIPT | MODULE", help="what to run")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments, passed on as they are")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> None:
    """Register hf_galore, then become the script or the module."""
    find, run = (_find_module, _run_module) if args.is_module else (_find_script, _run_script)
    target = find(args.target)  # before register(): a wrong name should not wait for its imports
    hf_galore.register()
    importlib.import_module("hf_galore.integrations.accelerate").wrap_launch_command()
    sys.argv = [target, *args.args]
    run(target)


def _run_module(name: str) -> None:
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_script(path: str) -> None:
    """As Python runs a file; runpy.run_path differs from that in sys.argv[0] or in __file__, and in __package__."""
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):  # with these, Python adds no such entry
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    module = types.ModuleType("__main__")
    module.__file__ = os.path.abspath(path)
    sys.modules["__main__"] = module
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    exec(code, vars(module))


def _find_script(name: str) -> str:
    """The path of a script: a file, else an installed command, of this Python's environment if it has it."""
    if os.path.isfile(name):
        return name
    if name in _LAUNCHERS:
        command = f"{name} OPTIONS {_LAUNCHERS[name]} hf_galore run SCRIPT ARGS"
        sys.exit(f"hf_galore run: {name} starts new processes, which would not be registered; use: {command}")
    commands = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    path = None if os.path.dirname(name) else shutil.which(name, path=commands)
    if path is None:
        sys.exit(f"hf_galore run: {name!r} is neither a file nor an installed command")
    with open(path, "rb") as file:
        head = file.readline(512) + file.readline(512)  # pip writes long interpreter paths in the second line
    if not (head.startswith(b"#!") and b"python" in head):
        sys.exit(f"hf_galore run: {path} is not a Python script")
    return path


def _find_module(name: str) -> str:
    """The name of a module, once it is known to exist; imports its parent packages, as `python -m` does."""
    try:
        exists = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        exists = False
    if not exists:
        sys.exit(f"hf_galore run: no module named {name!r}")
    return name
