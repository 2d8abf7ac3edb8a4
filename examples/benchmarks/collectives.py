"""Counts the bytes that collectives are given, and what a ring of ranks sends for them.

S is the size of the whole thing: what each rank has after an all_reduce, a broadcast or an all_gather, what the one
rank has after a reduce or a gather, and what each rank has before a reduce_scatter. Of N ranks each sends, on average,

    all_reduce       2·(N−1)/N·S     a reduce_scatter and an all_gather
    reduce_scatter     (N−1)/N·S     N−1 times a share of S/N
    all_gather         (N−1)/N·S     as many
    broadcast          (N−1)/N·S     a chain: all ranks but the last send S
    reduce             (N−1)/N·S     a chain: all ranks but the last send S
    gather             (N−1)/N²·S    all ranks but one send their S/N

In total no algorithm sends less. A broadcast, reduce or gather may divide its bytes unevenly; their roots take turns.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

OPERATIONS = {
    "all_reduce": ("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_", "all_reduce_coalesced"),
    "reduce_scatter": (
        "_reduce_scatter_base_",
        "reduce_scatter_",
        "reduce_scatter_tensor_coalesced_",
        "reduce_scatter_tensor",
    ),
    "all_gather": ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_", "all_gather_into_tensor"),
    "broadcast": ("broadcast_", "broadcast"),
    "reduce": ("reduce_",),
    "gather": ("gather_",),
}
KINDS = tuple(OPERATIONS)
_KIND = {name: kind for kind, names in OPERATIONS.items() for name in names}
_SILENT = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")


class Collectives(TorchDispatchMode):
    """Within the block every collective of this thread counts: `calls` and `sizes`, the sum of S, by kind.

    It sees those of DDP's reducer as well, which on a CPU runs in the thread of the backward pass. All groups are
    taken for the group of all ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets what there was so far."""
        self.calls: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends, on average."""
        return sum(sent(kind, size, ranks) for kind, size in self.sizes.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again as operations of its local tensors
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._opname, (*args, out))
        return out

    def _count(self, name: str, given: tuple[Any, ...]) -> None:
        if name in _SILENT:
            return
        kind = _KIND[name]  # a KeyError: one that nobody has thought of yet
        size = dist.get_world_size() * _bytes(given[1]) if kind == "gather" else max(map(_bytes, given))
        self.calls[kind] += 1
        self.sizes[kind] += size


def sent(kind: str, size: float, ranks: int) -> float:
    """Bytes that each of the ranks sends on average for one collective with S = `size`."""
    factor = {"all_reduce": 2.0, "gather": 1.0 / ranks}.get(kind, 1.0)
    return factor * (ranks - 1) / ranks * size


def _bytes(given: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_iter(given) if isinstance(leaf, torch.Tensor))
