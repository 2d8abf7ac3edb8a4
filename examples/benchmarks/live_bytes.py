"""Counts the bytes of all live tensors and their peak, on any device: what a run needs whatever the allocator does."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within the block every operation's outputs count from when they appear until their storage is freed.

    `now` and `peak` are in bytes; tensors that were there before count if they are given to `add`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts the storages of these tensors, each once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._counted:
                self._counted.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_iter(out) if isinstance(leaf, torch.Tensor))
        return out
