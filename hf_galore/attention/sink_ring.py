"""The keys and values of one layer: sinks, and a window that goes round in a buffer allocated once."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_galore.attention.sink_window import Slots, Step

Rotate = Callable[[Tensor], Tensor]


class SinkRing:
    """Holds N = S + W tokens of one layer; `append` follows the steps of a `SinkWindow`.

    `keys` and `values` are (batch, heads, N, head_dim) and never move; they change in place. The sinks' keys are kept
    a second time as they came, in float32 or better, because those in `keys` are rotated anew in each step: to rotate
    what was rotated and rounded before would lose the keys in a thousand steps of bfloat16.
    """

    def __init__(self, n_sink: int, capacity: int) -> None:
        self.n_sink, self.capacity = n_sink, capacity

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Buffers for the batch, heads, dtypes and devices of `key` and `value` (batch, heads, any, head_dim)."""
        self.keys = _buffer(key, self.capacity, key.dtype)
        self.values = _buffer(value, self.capacity, value.dtype)
        self.sink_keys = _buffer(key, self.n_sink, torch.promote_types(key.dtype, torch.float32))
        self.sink_values = _buffer(value, self.n_sink, value.dtype)

    def append(self, key: Tensor, value: Tensor, step: Step, rotate: Rotate) -> tuple[Tensor, Tensor]:
        """Writes the new tokens (batch, heads, new, head_dim) and returns what their queries attend to.

        That is the slots in use; or, for a step with a mask, what the columns of the mask stand for.

        Args:
            rotate: turns the sinks (batch, heads, new·S, head_dim), S for each query in turn, on by `step.shifts`;
                where there is one query it is given `sink_keys`.
        """
        if step.arrivals is not None:
            _take(self.sink_keys, key, step.arrivals)
            _take(self.sink_values, value, step.arrivals)
        if step.mask is not None:
            sinks = self._sinks_per_query(step, rotate)
            seen = [torch.cat(parts, 2) for parts in zip(sinks, (self.keys, self.values), (key, value), strict=True)]
            self._write(key, value, step)
            return seen[0], seen[1]
        self._write(key, value, step)
        if step.shifts is not None and self.n_sink:
            _put(self.keys, rotate(self.sink_keys), step.sink_slots)
        return self.keys[:, :, : step.stored], self.values[:, :, : step.stored]

    def tensors(self) -> tuple[Tensor, ...]:
        """All buffers."""
        return self.keys, self.values, self.sink_keys, self.sink_values

    def select_rows(self, rows: Tensor) -> None:
        """Rows of the batch in another order, in place; or more or fewer of them, in new buffers."""
        for name in ("keys", "values", "sink_keys", "sink_values"):
            old = getattr(self, name)
            new = old.index_select(0, rows.to(old.device))
            setattr(self, name, old.copy_(new) if old.shape == new.shape else new)

    def _write(self, key: Tensor, value: Tensor, step: Step) -> None:
        _put(self.keys, key, step.slots)
        _put(self.values, value, step.slots)

    def _sinks_per_query(self, step: Step, rotate: Rotate) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, new·S, head_dim): the sinks once for each query, as it sees them."""
        keys, values = (sinks.repeat(1, 1, step.new, 1) for sinks in (self.sink_keys, self.sink_values))
        if self.n_sink:
            keys = rotate(keys)
        return keys.to(self.keys.dtype), values


def join_sinks(rings: Mapping[int, SinkRing]) -> list[tuple[Tensor, list[int]]]:
    """Makes the sinks' keys of rings that are alike one tensor (batch, heads of all these rings, S, head_dim).

    So that they are rotated at once: a rotation is many operations on very little. Returns each with the keys of its
    rings, whose heads come in this order.
    """
    alike: dict[object, list[int]] = {}
    for key, ring in rings.items():
        alike.setdefault((ring.sink_keys.shape, ring.sink_keys.dtype, ring.sink_keys.device), []).append(key)
    joints = []
    for group in alike.values():
        joint = torch.cat([rings[key].sink_keys for key in group], dim=1)
        for key, part in zip(group, joint.chunk(len(group), dim=1), strict=True):
            rings[key].sink_keys = part
        joints.append((joint, group))
    return joints


def _buffer(like: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    batch, heads, _, width = like.shape
    return torch.zeros(batch, heads, length, width, dtype=dtype, device=like.device)


def _index(slots: Tensor, of: Tensor) -> Tensor:
    batch, heads, _, width = of.shape
    return slots.to(of.device)[:, None, :, None].expand(batch, heads, -1, width)


def _put(buffer: Tensor, new: Tensor, slots: Slots) -> None:
    """buffer[b, :, slots[b, i]] = new[b, :, i]."""
    if isinstance(slots, slice):
        buffer[:, :, slots] = new
        return
    new = new.to(buffer.dtype)
    if len(slots) == 1:
        buffer.index_copy_(2, slots[0].to(buffer.device), new)
    else:
        buffer.scatter_(2, _index(slots, buffer), new)


def _take(buffer: Tensor, new: Tensor, sources: Tensor) -> None:
    """buffer[b, :, j] = new[b, :, sources[b, j]], where there is such a token."""
    length = new.shape[2]
    taken = new.gather(2, _index(sources.clamp(0, length - 1), new)).to(buffer.dtype)
    exists = ((sources >= 0) & (sources < length)).to(buffer.device)[:, None, :, None]
    buffer.copy_(torch.where(exists, taken, buffer))
