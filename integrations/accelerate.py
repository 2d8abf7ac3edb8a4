"""Registers hf_galore also in the processes that a script starts through `accelerate launch` in its own process.

`trl sft`, for one, calls accelerate.commands.launch.launch_command, which starts a fresh Python for each process.
There `SCRIPT ARGS` becomes `-m hf_galore run SCRIPT ARGS`. Used by `python -m hf_galore run` and by nothing else.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

logger = logging.getLogger(__name__)

_LAUNCH = "accelerate.commands.launch"
Launch = Callable[[Namespace], None]


def wrap_launch_command() -> None:
    """Make `launch_command` start its scripts through `hf_galore run`, from the moment the launcher is imported.

    It imports nothing itself: accelerate may be absent, and its launcher changes the root logger. Idempotent.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if _LAUNCH in sys.modules:
        _wrap(sys.modules[_LAUNCH])


def unwrap_launch_command() -> None:
    """Undo `wrap_launch_command`; copies of the wrapper that others have taken pass their arguments on as they are."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    original = getattr(getattr(sys.modules.get(_LAUNCH), "launch_command", None), "hf_galore_original", None)
    if original is not None:
        sys.modules[_LAUNCH].launch_command = original  # type: ignore[attr-defined]


def through_run(args: Namespace) -> Namespace:
    """A copy of the arguments of `accelerate launch` that starts the same script under `-m hf_galore run`."""
    if args.module and args.training_script == "hf_galore":
        return args
    if args.no_python:
        logger.warning("accelerate launch --no_python: hf_galore is not registered in %s", args.training_script)
        return args
    command = ["run", *(["-m"] if args.module else []), args.training_script, *args.training_script_args]
    return Namespace(**vars(args) | {"module": True, "training_script": "hf_galore", "training_script_args": command})


def _wrap(launcher: ModuleType) -> None:
    original: Launch = launcher.launch_command
    if hasattr(original, "hf_galore_original"):
        return

    @wraps(original)
    def launch_command(args: Namespace) -> None:
        original(through_run(args) if _FINDER in sys.meta_path else args)

    launch_command.hf_galore_original = original  # type: ignore[attr-defined]
    launcher.launch_command = launch_command  # type: ignore[attr-defined]


class _LaunchFinder(MetaPathFinder):
    """Finds accelerate's launcher as Python would, and wraps it as soon as it has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LAUNCH:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_wrap(module: ModuleType) -> None:
                execute(module)
                _wrap(module)

            spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


_FINDER = _LaunchFinder()
