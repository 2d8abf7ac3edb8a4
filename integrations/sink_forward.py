"""Hooks on a decoder that tell a SinkCache of each forward pass: padding, positions, masks, prompts in parts."""

import inspect
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import create_sliding_window_causal_mask

from hf_galore.attention.sink_window import SinkWindow, Step
from hf_galore.integrations.compatibility import cache_argument, cache_of

if TYPE_CHECKING:
    from hf_galore.integrations.sink_cache import SinkCache

Inputs = dict[str, Any]
_TAKES_MASKS = ("eager", "sdpa")  # attention implementations that a mask for each query can be given
_PER_TOKEN = ("input_ids", "inputs_embeds", "per_layer_inputs")
_MASK_CACHE = cache_argument(create_sliding_window_causal_mask)
_OF_STATES = ("linear_attention", "conv")  # what models call their masks for layers that keep states
_SMALLEST_CHUNK = 16
_ALL_TOKENS = "generate() takes all tokens, or the new ones with an attention_mask for all"


def attach(cache: "SinkCache", decoder: Any) -> None:
    """Hooks that work for this cache alone, and are removed with it."""
    names = list(inspect.signature(decoder.forward).parameters)
    before = partial(_before, weakref.ref(cache), names)
    after = partial(_after, weakref.ref(cache))
    for handle in (
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True, prepend=True),
    ):
        weakref.finalize(cache, handle.remove)


def _before(
    ref: "weakref.ref[SinkCache]", names: list[str], decoder: Any, args: tuple[Any, ...], kwargs: Inputs
) -> tuple[tuple[()], Inputs] | None:
    """What the forward pass is given instead of (args, kwargs)."""
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    cache = _in_use(ref, inputs)
    if cache is None:
        return None
    tokens = next(inputs[name] for name in _PER_TOKEN if inputs.get(name) is not None)
    window, new = cache.steps.window, tokens.shape[1]
    if not cache.steps.is_in_parts:
        _note_padding(window, inputs.get("attention_mask"), new, tokens.device)
        _check_positions(window, inputs.get("position_ids"), new)
    if not window.most_padding:
        inputs["attention_mask"] = None
    sizes = _parts(window, new, decoder.config._attn_implementation)
    if cache.has_states:
        _check_padding_is_masked(window, sizes)
    earlier = []
    if len(sizes) > 1:
        _check_divisible(decoder, inputs)
        *parts, inputs = _divided(inputs, sizes, window.seen)
        cache.steps.is_in_parts = True
        try:
            earlier = [decoder(**part)[0] for part in parts]
        finally:
            cache.steps.is_in_parts = False
    cache.steps.earlier = earlier
    fall = window.rebase(sizes[-1])
    if fall is not None:
        cache.turn_back(fall)
    step = cache.steps.begin(sizes[-1])
    inputs["position_ids"] = step.positions
    if step.mask is not None:
        inputs["attention_mask"] = _masks(cache, decoder, inputs, step, len(tokens))
    return (), inputs


def _after(ref: "weakref.ref[SinkCache]", decoder: Any, args: tuple[Any, ...], kwargs: Inputs, out: Any) -> Any:
    """The output of all parts of the forward pass."""
    cache = _in_use(ref, kwargs)
    if cache is None:
        return None
    cache.steps.end()
    earlier, cache.steps.earlier = cache.steps.earlier, []
    if not earlier:
        return None
    whole = torch.cat([*earlier, out[0]], dim=1)
    if isinstance(out, tuple):
        return (whole, *out[1:])
    out.last_hidden_state = whole
    return out


def _in_use(ref: "weakref.ref[SinkCache]", inputs: Inputs) -> "SinkCache | None":
    cache: SinkCache | None = ref()
    return cache if cache_of(inputs) is cache else None


def _note_padding(window: SinkWindow, mask: Any, new: int, device: torch.device) -> None:
    """Tells the window of padding; raises ValueError for masks of other forms, or that differ from those before."""
    if mask is None:
        if window.most_padding:
            raise ValueError("attention_mask: this cache holds padding; pass the mask of all tokens seen and new")
        if not window.seen:
            window.pad(torch.zeros(1, dtype=torch.long, device=device))
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError("attention_mask: SinkCache needs the mask of (batch, tokens seen and new)")
    width = window.seen + new
    if mask.shape[1] != width:
        raise ValueError(
            f"attention_mask: it is for {mask.shape[1]} tokens; {window.seen} were seen and {new} are new"
        )
    if new == 1 and window.seen > window.most_padding:
        return  # all rows have tokens: a mask that a 1 was added to
    is_token = mask.to(device).bool()
    padding = width - is_token.sum(1)
    if not torch.equal(is_token, torch.arange(width, device=device) >= padding[:, None]):
        raise ValueError("attention_mask: SinkCache takes padding on the left alone")
    window.pad(padding if padding.any() else padding[:1])


def _check_positions(window: SinkWindow, positions: Tensor | None, new: int) -> None:
    """Raises ValueError unless there are tokens, and positions count those of each row, those seen before included."""
    if not new:
        raise ValueError(f"input_ids: no token is new after the {window.seen} seen; {_ALL_TOKENS}")
    if positions is None or torch.compiler.is_compiling():  # a graph cannot raise what depends on data
        return
    if positions.ndim == 3:  # of models that count images in three dimensions, and time besides
        if not (positions == positions[:1]).all():
            raise ValueError(
                "position_ids: they count an image or a video in three dimensions, and SinkCache counts tokens: it "
                "takes text alone here"
            )
        positions = positions[0]
    if new == 1 and not window.most_padding and positions.ndim == 2 and (positions == window.seen).all():
        return
    expected = window.seen + torch.arange(new, device=positions.device) - window.padding.to(positions.device)[:, None]
    if positions.ndim != 2 or not ((positions == expected) | (expected < 0)).all():
        raise ValueError(
            "position_ids: SinkCache counts positions itself; leave them out, or count the tokens of each row through "
            f"all calls; {_ALL_TOKENS}"
        )


def _check_padding_is_masked(window: SinkWindow, sizes: list[int]) -> None:
    """Raises ValueError where transformers would let padding into the states of layers: in passes of one token."""
    start = window.seen
    for size in sizes:
        if size == 1 and start < window.most_padding:
            raise ValueError(
                "attention_mask: layers of this model that keep states take padding for a token if it comes alone: "
                "pass it together with the tokens after it, with attn_implementation 'eager' or 'sdpa'"
            )
        start += size


def _parts(window: SinkWindow, new: int, implementation: str) -> list[int]:
    """Numbers of tokens that the forward pass is divided into: what fits in order, then chunks.

    In a chunk each query has its own S sinks; its size is such that they are not much more than the window.
    """
    chunk = min(window.window, max(_SMALLEST_CHUNK, window.window // (window.n_sink + 1)))
    if implementation not in _TAKES_MASKS:
        chunk = 1
    first = min(new, max(0, window.capacity - window.seen))
    rest = new - first
    return [first] * bool(first) + [chunk] * (rest // chunk) + [rest % chunk] * bool(rest % chunk)


def _check_divisible(decoder: Any, inputs: Inputs) -> None:
    for name in ("output_hidden_states", "output_attentions"):
        wanted = inputs.get(name)
        if getattr(decoder.config, name) if wanted is None else wanted:
            raise ValueError(f"{name}: a prompt that does not fit into the SinkCache is run in parts, and has none")
    known = {*_PER_TOKEN, "attention_mask", "position_ids"}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name not in known:
            raise ValueError(f"{name}: a prompt that does not fit into the SinkCache is run in parts, without this")


def _divided(inputs: Inputs, sizes: list[int], seen: int) -> list[Inputs]:
    """The inputs of each part."""
    parts, start = [], 0
    for size in sizes:
        part = {**inputs, "position_ids": None}
        for name in _PER_TOKEN:
            if inputs.get(name) is not None:
                part[name] = inputs[name][:, start : start + size]
        start += size
        if inputs.get("attention_mask") is not None:
            part["attention_mask"] = inputs["attention_mask"][:, : seen + start]
        parts.append(part)
    return parts


def _masks(cache: "SinkCache", decoder: Any, inputs: Inputs, step: Step, batch: int) -> Any:
    """The step's mask as transformers takes it: for one kind of layer, or for all."""
    assert step.mask is not None
    mask = step.mask[:, None].expand(batch, -1, -1, -1)
    if decoder.config._attn_implementation == "eager":
        blocked = torch.full((), torch.finfo(decoder.dtype).min, dtype=decoder.dtype, device=mask.device)
        mask = torch.where(mask, torch.zeros_like(blocked), blocked)
    masks: dict[str, Any] = {"full_attention": mask}
    if cache.has_states:
        tokens = inputs.get("attention_mask")
        masks |= dict.fromkeys(_OF_STATES, None if tokens is None else tokens[:, -step.new :])
    if True in cache.is_sliding:
        masks["sliding_attention"] = _sliding_mask(cache, decoder, inputs, step, batch)
    return mask if len(masks) == 1 else masks


def _sliding_mask(cache: "SinkCache", decoder: Any, inputs: Inputs, step: Step, batch: int) -> Any:
    return create_sliding_window_causal_mask(
        config=decoder.config,
        inputs_embeds=torch.empty(batch, step.new, 0, dtype=decoder.dtype, device=step.positions.device),
        attention_mask=inputs.get("attention_mask"),
        **{_MASK_CACHE: cache},
    )
