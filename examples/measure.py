"""What a training run costs: seconds, peak memory, bytes of optimizer state, seconds in basis refreshes."""

import re
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback


class Meter(TrainerCallback):
    """Measures a Trainer's run from its first step to its last; the figures are its attributes afterwards."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.steps = state.global_step - self.first_step
        self.peak_bytes = peak_bytes()
        while hasattr(optimizer, "optimizer"):  # accelerate and DeepSpeed wrap it
            optimizer = optimizer.optimizer
        self.state_bytes = state_bytes(optimizer)
        holder = getattr(optimizer, "lowrank_backward", optimizer)  # the _layerwise names refresh there
        self.refresh_seconds = getattr(holder, "refresh_seconds", 0.0)


class LossBar(ProgressCallback):
    """The Trainer's progress bar with the last logged loss beside it, instead of a line of log per interval."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state; what several parameters share counts once."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def peak_bytes() -> int:
    """On a GPU the peak of what torch allocated; else the peak resident memory of this process, libraries included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count the parent's memory from before this process was started
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
