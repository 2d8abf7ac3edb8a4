"""Caches that hold tokens of ours in front of the user's, and count the user's alone."""

from functools import cache as remembered
from typing import Any

from transformers.cache_utils import Cache


class PrefixedCache(Cache):
    """What a cache is an instance of, besides its own class, while it holds `prefix` tokens of ours.

    generate() asks a cache how many of its tokens are there already, and the decoder how many there are: `is_running`
    tells the two apart.
    """

    prefix: int
    is_running: bool
    forgets = False  # whether ours push tokens out of a window that held the whole sequence without them

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen: all, in a forward pass of the decoder; else the user's."""
        seen = super().get_seq_length(layer_idx)
        return seen if self.is_running else seen - self.prefix

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """How many tokens there is room for, counted as in `get_seq_length`; -1 if there is no end."""
        length: int = super().get_max_length(layer_idx)
        return length if self.is_running or length < 0 else length - self.prefix

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back, as assisted decoding does."""
        return bool(super().is_croppable) and not self.forgets

    def reset(self) -> None:
        """Forgets all tokens, ours too."""
        super().reset()
        self.prefix, self.is_running = 0, False


def make_room(cache: Any, n: int, sliding_window: int | None) -> None:
    """For a cache without tokens: layers of fixed length get n more slots, those with a window up to all of it."""
    if isinstance(cache, PrefixedCache):
        return  # it was reset, and has them
    for layer in cache.layers:
        if getattr(layer, "max_cache_len", None) is not None:
            longer = layer.max_cache_len + n
            if layer.is_sliding and sliding_window is not None and longer > sliding_window:
                longer = sliding_window
                cache.forgets = True
            layer.max_cache_len = longer
            layer.is_initialized = False  # buffers that were allocated early are allocated anew


def mark(cache: Any, n: int, is_running: bool) -> None:
    """Makes the cache a PrefixedCache with n tokens of ours."""
    if not isinstance(cache, PrefixedCache):
        of: Any = type(cache)
        cache.__class__ = _with_prefix(of)
    cache.prefix, cache.is_running = n, is_running


@remembered
def _with_prefix(of: type) -> type:
    return type(of.__name__, (PrefixedCache, of), {"__doc__": of.__doc__, "__module__": of.__module__})
