"""The layers of a SinkCache, and what they share in a forward pass."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from hf_galore.attention.sink_ring import SinkRing, join_sinks
from hf_galore.attention.sink_window import SinkWindow, Step
from hf_galore.integrations.rotary import KeyRotation, Turn


class SinkSteps:
    """The forward pass that is going on, for all layers: `begin` it before the first, `end` it after the last.

    Args:
        dtype: what keys are rotated in.
    """

    def __init__(self, window: SinkWindow, rotation: KeyRotation, dtype: torch.dtype) -> None:
        self.window, self.rotation, self.dtype = window, rotation, dtype
        self.rings: dict[int, SinkRing] = {}  # by the indices of their layers
        self.reset()

    def reset(self) -> None:
        """As if nothing had been seen."""
        self.window.reset()
        self.step: Step | None = None
        self.sink_turn: Turn | None = None
        self.turned: dict[int, Tensor] = {}  # sinks that are rotated already
        self.is_in_parts = False  # while a forward pass calls itself for its first parts
        self.earlier: list[Tensor] = []  # and the outputs of those
        self.split()

    def split(self) -> None:
        """After the layers' buffers were replaced."""
        self.joints: list[tuple[Tensor, list[int]]] = []

    def begin(self, new: int) -> Step:
        """Prepares for `new` tokens."""
        self.step = step = self.window.step(new)
        if step.shifts is None or not self.window.n_sink:
            return step
        if step.mask is not None:
            self.sink_turn = self.turn(step.shifts.repeat_interleave(self.window.n_sink, dim=1))
            return step
        self.sink_turn = self.turn(step.shifts)
        if step.arrivals is None:
            self._turn_all(self.sink_turn)
        return step

    def _turn_all(self, turn: Turn) -> None:
        if not self.joints:
            self.joints = join_sinks(self.rings)
        for joint, group in self.joints:  # layers with sinks are of one type, and rotate alike
            turned = turn.rotate(group[0], joint)
            self.turned.update(zip(group, turned.chunk(len(group), dim=1), strict=True))

    def end(self) -> None:
        """They are in all layers."""
        assert self.step is not None
        self.window.advance(self.step)
        self.step = self.sink_turn = None
        self.turned = {}

    def turn(self, positions: Tensor) -> Turn:
        """The rotation by these positions (rows, n)."""
        return self.rotation.by(positions, self.dtype)


class SinkLayer(CacheLayerMixin):
    """The cache of one layer with full attention: a `SinkRing`, allocated at the first tokens.

    Multi-head latent attention caches the rotated channels of its keys as values, and its latents as keys: the ring
    is given what turns as its keys.
    """

    is_sliding = False

    def __init__(self, steps: SinkSteps, index: int) -> None:
        super().__init__()
        self.steps, self.index = steps, index
        self.is_latent = steps.rotation.turns_values(index)
        self.ring = steps.rings[index] = SinkRing(steps.window.n_sink, steps.window.capacity)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates all that the layer will ever need."""
        self._allocate(key_states, value_states)

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        self.ring.allocate(*self._turning_first(key_states, value_states))
        self._show()
        self.is_initialized = True

    def _show(self) -> None:
        self.keys, self.values = self._turning_first(self.ring.keys, self.ring.values)

    def _turning_first(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in the ring's order; or those of the ring in the model's."""
        return (second, first) if self.is_latent else (first, second)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values that the new tokens attend to.

        Raises:
            RuntimeError: the tokens do not come from a forward pass of the model that the cache was made for, or
                gradients are wanted.
        """
        step = self.steps.step
        if step is None or step.new != key_states.shape[2]:
            raise RuntimeError("a SinkCache works in the model that it was made for, and in no other")
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("a SinkCache overwrites what it holds and has no gradients: use torch.no_grad()")
        if not self.is_initialized:
            self._allocate(key_states, value_states)
        new = self._turning_first(key_states, value_states)
        return self._turning_first(*self.ring.append(*new, step, self._rotate_sinks))

    def _rotate_sinks(self, keys: Tensor) -> Tensor:
        if self.index in self.steps.turned:
            return self.steps.turned[self.index]
        assert self.steps.sink_turn is not None
        return self.steps.sink_turn.rotate(self.index, keys)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that the queries are given, columns of the attention mask before those)."""
        end = self.get_seq_length() + query_length
        stored = min(end, self.ring.capacity)
        return stored, end - stored

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not."""
        return self.steps.window.seen

    def get_max_length(self) -> int:
        """None: -1."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens, and the size of the batch; `SinkSteps.reset` goes with it."""
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the beams, in place."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.ring.select_rows(rows)
            self.steps.split()
            self._show()


class HybridSinkLayer(LinearAttentionLayer, SinkLayer):
    """The cache of a layer with linear and full attention side by side: states, which go their own way, and a ring.

    Args:
        options: those of the states.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, steps: SinkSteps, index: int, **options: Any) -> None:
        SinkLayer.__init__(self, steps, index)
        LinearAttentionLayer.__init__(self, **options)

    def reset(self) -> None:
        """Forgets states and tokens."""
        LinearAttentionLayer.reset(self)
        SinkLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the beams."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        SinkLayer.reorder_cache(self, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self.reorder_cache(indices)
