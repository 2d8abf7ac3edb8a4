"""Register tokens in a decoder: hooks that put them in front of the first forward pass and take them out of it.

The decoder's pre-hook gives it embeddings instead of token ids, with ours in front of each row's first token, and with
the attention mask and the positions to match. The other hook takes their rows out of everything that has rows for
tokens: hidden states, attention weights, logits of routers. A cache that was given holds them from then on.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import Cache

from hf_galore.attention.placement import Placement, left_padding
from hf_galore.integrations.compatibility import cache_of
from hf_galore.integrations.prefixed_cache import PrefixedCache, make_room, mark
from hf_galore.integrations.sink_cache import SinkCache

Inputs = dict[str, Any]
CHILD = "bias_tokens"  # transformers' Trainer does not decay what has "bias" in its name
_PLACED = "_hf_galore_placed"
_OF_IMAGES = "visual_pos_masks"  # which tokens are of images (batch, tokens)
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", _OF_IMAGES}
_PLANES = 4  # of positions, if they have those for masks in front of three for images


def hook_decoder(decoder: Any) -> tuple[Any, ...]:
    """The handles of hooks that put in what the decoder's child gives: embeddings (n, d), or None for nothing."""
    names = list(inspect.signature(decoder.forward).parameters)
    return (
        decoder.register_forward_pre_hook(partial(_before, names), with_kwargs=True, prepend=True),
        decoder.register_forward_hook(_after, with_kwargs=True),
    )


def forget(decoder: nn.Module) -> None:
    """Removes what the hooks have left on the decoder."""
    vars(decoder).pop(_PLACED, None)


def masks_later(*, attention_mask: Any, **others: Any) -> Any:
    """For generate(), which makes masks (batch, 1, tokens, slots) for static caches: leaves that to the decoder.

    So that ours are in them. The mask is as wide as the cache, because one that grew would be compiled again.
    """
    cache = cache_of(others)
    if not isinstance(attention_mask, Tensor) or not isinstance(cache, StaticCache):
        return attention_mask
    return nn.functional.pad(attention_mask, (0, max(0, cache.get_max_length() - attention_mask.shape[1])))


def _before(names: list[str], decoder: Any, args: tuple[Any, ...], kwargs: Inputs) -> tuple[tuple[()], Inputs] | None:
    """What the forward pass is given instead of (args, kwargs)."""
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    cache = cache_of(inputs)
    if _is_part(cache):
        return None
    given = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
    own = getattr(decoder, CHILD)(given.device)
    if own is None:
        return None
    _check(inputs)
    if isinstance(cache, PrefixedCache) and cache.prefix:
        return (), _continued(inputs, cache)
    mask = inputs.get("attention_mask")
    after = None if mask is None else left_padding(mask)
    if after is not None and not torch.compiler.is_compiling() and not after.any():
        after = None
    if cache is not None:
        _check_empty(cache, after, mask)
        make_room(cache, len(own), getattr(decoder.config, "sliding_window", None))
        mark(cache, len(own), is_running=True)
    embeds = given if given.ndim == 3 else decoder.get_input_embeddings()(given)
    placement = Placement(len(own), after)
    inputs |= {"input_ids": None, "inputs_embeds": placement.put(own[None], embeds)}
    if mask is not None:
        inputs["attention_mask"] = placement.put(mask.new_ones(1, len(own)), mask)
    of_images = inputs.get(_OF_IMAGES)
    if of_images is not None:
        inputs[_OF_IMAGES] = placement.put(of_images.new_zeros(1, len(own)), of_images)
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = _positions(inputs["position_ids"], placement, len(embeds))
    setattr(decoder, _PLACED, (placement, inputs["inputs_embeds"].shape[:2]))
    return (), inputs


def _continued(inputs: Inputs, cache: PrefixedCache) -> Inputs:
    """The inputs of a later forward pass: the cache has ours."""
    n, mask, positions = cache.prefix, inputs.get("attention_mask"), inputs.get("position_ids")
    cache.is_running = True
    if mask is not None:
        mask = Placement(n, left_padding(mask)).put(mask.new_ones(1, n), mask)
    return inputs | {"attention_mask": mask} | ({} if positions is None else {"position_ids": positions + n})


def _positions(given: Tensor, placement: Placement, batch: int) -> Tensor:
    """Positions of all: ours begin where the row's first token did, and move the tokens on."""
    if given.ndim == 3:  # of images in three dimensions, and of time besides
        return torch.stack([_positions(plane, placement, batch) for plane in given])
    first = given[:, :1]
    if placement.after is not None:
        given = given.expand(batch, -1)
        first = given.gather(1, placement.after[:, None].clamp(max=given.shape[1] - 1))
    own = first + torch.arange(placement.n, device=given.device)
    return placement.put(own, given + placement.n)


def _after(decoder: Any, args: tuple[Any, ...], kwargs: Inputs, out: Any) -> Any:
    """The output of the tokens."""
    cache = cache_of(kwargs)
    if _is_part(cache):
        return None
    if isinstance(cache, PrefixedCache):
        cache.is_running = False
    placed = getattr(decoder, _PLACED, None)
    if placed is None:
        return None
    setattr(decoder, _PLACED, None)
    if isinstance(out, tuple):
        return tuple(_without(value, *placed) for value in out)
    for name in list(out):
        out[name] = _without(out[name], *placed)
    return out


def _without(value: Any, placement: Placement, shape: tuple[int, int]) -> Any:
    """An output of rows (batch, tokens) without ours; what has no rows for tokens as it is."""
    batch, length = shape
    if isinstance(value, tuple):
        return tuple(_without(one, placement, shape) for one in value)
    if isinstance(value, Cache) and not isinstance(value, PrefixedCache) and not torch.compiler.is_compiling():
        mark(value, placement.n, is_running=False)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 4:  # attention weights (batch, heads, tokens, keys)
        return placement.take(value, 2)
    if value.ndim == 2 and len(value) == batch * length:  # logits of a router (batch · tokens, experts)
        return placement.take(value.view(batch, length, -1)).flatten(0, 1)
    return placement.take(value) if value.ndim == 3 else value


def _is_part(cache: Any) -> bool:
    """Whether a SinkCache has divided the forward pass, and calls the decoder for a part: ours are in already."""
    return isinstance(cache, SinkCache) and cache.steps.is_in_parts


def _check(inputs: Inputs) -> None:
    """Raises ValueError for inputs that ours cannot be put in front of."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ValueError(
            "attention_mask: register tokens need one of (batch, tokens). generate() makes others for static caches, "
            "unless the tokens were added to the model that generates and not to a part of it"
        )
    if positions is not None and positions.ndim not in (2, 3):
        raise ValueError("position_ids: register tokens need those of (batch, tokens), or (dimensions, batch, tokens)")
    tensors = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    others, cache, paged = sorted(tensors - _KNOWN), cache_of(inputs), inputs.get("cache")
    if others or (paged is not None and paged is not cache):
        raise ValueError(f"{', '.join(others) or 'cache'}: register tokens do not go with this input")
    if positions is None or mask is not None or cache is not None:
        return
    if positions.ndim == 3:
        if len(positions) != _PLANES:
            return
        positions = positions[0]
    if not torch.compiler.is_compiling() and bool((positions.diff(dim=1) != 1).any()):
        raise ValueError("position_ids: sequences packed into one row would share register tokens: pad instead")


def _check_empty(cache: Any, after: Tensor | None, mask: Any) -> None:
    if int(cache.get_seq_length()):
        raise ValueError("past_key_values: it holds tokens without the register tokens in front of them")
    if after is not None and bool((after == mask.shape[1]).any()):
        raise ValueError(
            "attention_mask: a row has no token, and register tokens come right before the first: pass longer chunks"
        )
