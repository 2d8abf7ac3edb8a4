"""What differs between the versions of transformers that hf_galore runs with, asked of their functions by signature.

transformers 5.23 brought `pack_gqa`, and 5.24 renamed `past_key_values` to `cache`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache
from transformers.integrations import sdpa_attention

_OLD_NAME, _NEW_NAME = "past_key_values", "cache"

# Packs the query heads that share keys, which transformers' sdpa does for one query; older ones repeat the keys.
pack_gqa: Callable[[Any, int], Any] | None = getattr(sdpa_attention, "pack_gqa", None)


def cache_argument(function: Callable[..., Any]) -> Any:
    """The name of the function's argument for a cache of keys and values, None if it has none."""
    parameters = inspect.signature(function).parameters
    # Where a function has both, `cache` is the paged cache of continuous batching.
    return next((name for name in (_OLD_NAME, _NEW_NAME) if name in parameters), None)


def cache_of(inputs: dict[str, Any]) -> Any:
    """The cache among the arguments of a forward pass, by either name; None if there is none.

    Hooks that dynamo traces call this: a loop over the names would cost a graph of its own.
    """
    cache = inputs.get(_NEW_NAME)
    return cache if isinstance(cache, Cache) else inputs.get(_OLD_NAME)
