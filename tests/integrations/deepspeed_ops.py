"""DeepSpeed's compiled operators on the CPU: built once, for all tests and for later runs."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

EXTENSIONS = Path.home() / ".cache" / "hf_galore" / "torch_extensions"
LIMIT = 1800  # seconds of a launch, on two slow cores that other tests are using as well
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja
}
_BUILD = """
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
for builder in (CPUAdamBuilder, ShareMemCommBuilder):
    builder().load()
"""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system gives it back when that is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def python(*arguments: str, **environment: str) -> str:
    """What a Python process wrote to stderr; neither it nor its children are left when it takes too long."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=LIMIT)
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-6000:]
    return errors


def remember_processor() -> None:
    """DeepSpeed asks py-cpuinfo for each CPUAdam that it makes, which takes a process and a second each time."""
    import cpuinfo

    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)


@cache
def build_operators() -> None:
    """Compiles what is not there. A build that was killed leaves a lock that all later ones would wait for."""
    with locked(EXTENSIONS / "hf_galore.lock"):
        for left in EXTENSIONS.glob("*/lock"):
            left.unlink()
        python("-c", _BUILD)
