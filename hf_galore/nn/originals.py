"""The values that parameters had before they were trained in place: one copy, in a temporary file.

    file = TensorFile()
    original = file.original(weight)        # written here, now; nothing of it stays in memory
    ...                                     # weight is trained
    original.of(weight)                     # what weight was, in its dtype of then, on the device of now

The file has no name: it is gone with the last object that reads it, however the process ends. It is in the folder that
`tempfile` chooses (TMPDIR); where that is a file system in memory, so is the copy.

A weight on the meta device has no values to keep; nor is anything kept of an `UnkeptOriginal`. Both can say what the
weight was for as long as it has not changed.
"""

import ctypes
import math
import mmap
import tempfile
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

_ALIGNMENT = 64  # what torch aligns its own tensors to


class Original(Protocol):
    """What a parameter was."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype of then."""

    def of(self, now: Tensor) -> Tensor:
        """Its values of then, given the parameter as it is now: read them, do not write to them.

        Raises:
            ValueError: they were not kept, and the parameter has changed.
        """


class TensorFile:
    """Tensors in an unlinked temporary file.

    Deep copies share the file, which is never written to twice. Pickles carry what it holds, and are read into a file
    of their own.

    Raises:
        OSError: the file system is full.
        TypeError: a tensor of a subclass, such as a DTensor.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as this object
        weakref.finalize(self, self._file.close)
        self._size = 0
        self._mapping: mmap.mmap | None = None

    def original(self, tensor: Tensor) -> Original:
        """The values of the tensor, written to the file; if it is on the meta device, an `UnkeptOriginal`."""
        if tensor.is_meta:
            return UnkeptOriginal(tensor)
        offset = -(-self._size // _ALIGNMENT) * _ALIGNMENT
        values = tensor.detach().cpu().contiguous()
        if type(values) is not Tensor:
            raise TypeError(f"a {type(values).__name__} has no values of its own that could be written to a file")
        if values.nbytes:
            self._file.seek(offset)
            self._file.write((ctypes.c_char * values.nbytes).from_address(values.data_ptr()))
            self._file.flush()
            self._size, self._mapping = offset + values.nbytes, None
        return FiledOriginal(self, offset, values.shape, values.dtype)

    def read(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor at the offset, in pages of the file that are read when they are used."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        if self._mapping is None:
            # Not read-only, which torch warns of: a write would go to a page of the process's own.
            self._mapping = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=offset).view(shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TensorFile":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"content": self.read(0, torch.Size([self._size]), torch.uint8)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TensorFile.__init__(self)
        self.original(state["content"])


@dataclass(frozen=True)
class FiledOriginal:
    """The values at an offset of a file."""

    file: TensorFile = field(repr=False)
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, now: Tensor) -> Tensor:
        """The values of then, on the device of `now`."""
        return self.file.read(self.offset, self.shape, self.dtype).to(now.device)


class UnkeptOriginal:
    """What a tensor was, known only as long as it has not changed: sums of its bits are kept, not its values.

    The sums, over rows and over columns, are of integers and the same on every device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._sums = None if tensor.is_meta else sums_of_bits(tensor)

    def of(self, now: Tensor) -> Tensor:
        """`now` in the dtype of then.

        Raises:
            ValueError: that is not what it was.
        """
        values = now.detach().to(self.dtype)
        if self._sums is None:
            if not values.is_meta:
                raise ValueError("the weight was on the meta device at first, so that there is no original")
        elif values.is_meta or not torch.equal(sums_of_bits(values), self._sums):
            raise ValueError("the weight has changed and its original was not kept")
        return values


def sums_of_bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor (..., n) as integers, summed over its rows and over its columns, on the CPU."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1).contiguous()
    bits = rows.view(_INTEGERS[tensor.element_size()])
    return torch.cat([bits.sum(0), bits.sum(1)]).cpu()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # none that overflow in a sum
