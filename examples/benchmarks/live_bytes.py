"""Counts the bytes of all live tensors and their peak, on any device: what a run needs whatever the allocator does."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_resize = torch.UntypedStorage.resize_


class LiveBytes(TorchDispatchMode):
    """Within the block every operation's outputs count from when they appear until their storage is freed.

    `now` and `peak` are in bytes; tensors that were there before count if they are given to `add`. A storage that is
    resized, as FSDP2 does with whole parameters, counts with its new size from then on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts the storages of these tensors, each once; those on the meta device have no memory."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes and storage.device.type != "meta":
                self._resized(key, storage.nbytes())
                weakref.finalize(storage, self._freed, key)

    def _resized(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __enter__(self) -> Any:
        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            _resize(storage, size)
            if storage._cdata in self._sizes:
                self._resized(storage._cdata, storage.nbytes())
            return storage

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        del torch.UntypedStorage.resize_  # its base class has it
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it comes again as operations of its local tensors
        out = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_iter(out) if isinstance(leaf, torch.Tensor))
        return out
