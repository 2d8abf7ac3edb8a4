"""Starts a test file as its own script on several ranks (gloo): real processes, in what torchrun would give them.

A server forks them (multiprocessing's forkserver, one per process of pytest). It imports the libraries once, which
takes longer than most of what ranks do, and does nothing else: no threads, no tensors, no process groups. DeepSpeed is
left to the ranks: it reads variables as it is imported that few launches have, and a server of its own, with all the
other libraries, would cost more than the imports of the three or four ranks that it would serve.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from functools import cache
from multiprocessing import connection, forkserver, parent_process
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
LIMIT = 1800  # seconds of a launch, on two slow cores that other tests are using as well
LIBRARIES = ["torch.distributed.fsdp", "torch.distributed.tensor", "accelerate", "transformers.trainer", "peft"]
LIBRARIES += ["bitsandbytes", "trl.models.utils", "pytest"]


@cache
def _server() -> ForkServerContext:
    """Runs from the first launch until this process ends, however it ends."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LIBRARIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("JE_ARROW_MALLOC_CONF", "background_thread:false")  # pyarrow's allocator would start a thread
        forkserver.ensure_running()
    return server


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _rank(script: str, arguments: list[str], environment: dict[str, str], errors: str) -> None:
    """What a rank does: it runs the script, and does not outlive pytest."""
    Thread(target=_end_with, args=[parent_process()], daemon=True).start()
    for stream, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    sys.path[:0] = [str(Path(script).parent), str(HERE)]
    runpy.run_path(script, run_name="__main__")


def torchrun(script: str, *arguments: Any, ranks: int, **variables: str) -> subprocess.CompletedProcess:
    """The finished launch of the script, one thread for each rank, with these environment variables besides.

    When a rank fails, the others are killed; its exit code is that of the launch, and its stderr comes last.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "tests"}
    command, processes, end = [script, *map(str, arguments)], [], time.monotonic() + LIMIT
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(ranks)]
        try:
            for rank, file in enumerate(files):
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = _server().Process(target=_rank, args=(script, command[1:], environment, str(file)))
                process.start()
                processes.append(process)
            while (codes := [process.exitcode for process in processes]).count(None) and not any(codes):
                running = [process.sentinel for process in processes if process.exitcode is None]
                if not connection.wait(running, timeout=end - time.monotonic()):
                    raise subprocess.TimeoutExpired(command, LIMIT)
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = "".join(files[rank].read_text() for rank in sorted(range(ranks), key=lambda rank: bool(codes[rank])))
    return subprocess.CompletedProcess(command, next(filter(None, codes), 0), stderr=errors)


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
