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

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen: all, in a forward pass of the decoder; else the user's."""
        seen = super().get_seq_length(layer_idx)
        return seen if self.is_running else seen - self.prefix

    def reset(self) -> None:
        """Forgets all tokens, ours too."""
        super().reset()
        self.prefix, self.is_running = 0, False


def prefix_of(cache: Any) -> int:
    """How many tokens of ours the cache holds."""
    return cache.prefix if isinstance(cache, PrefixedCache) else 0


def make_room(cache: Cache, n: int, sliding_window: int | None) -> None:
    """For a cache without tokens: layers of fixed length get n more slots, those with a window up to all of it."""
    if isinstance(cache, PrefixedCache):
        return  # it was reset, and has them
    for layer in cache.layers:
        if getattr(layer, "max_cache_len", None) is not None:
            longer = layer.max_cache_len + n
            layer.max_cache_len = longer if not layer.is_sliding else min(longer, sliding_window or longer)
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
