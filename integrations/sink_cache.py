"""A cache for transformers' generate() that goes on for ever: sink tokens and a rolling window."""

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)

from hf_galore.attention.sink_window import SinkWindow
from hf_galore.checks import check_integer
from hf_galore.integrations.compatibility import cache_argument
from hf_galore.integrations.decoders import KEEP_NO_KEYS, decoder_of, makes_masks, own_cache
from hf_galore.integrations.rotary import KeyRotation, position_limit
from hf_galore.integrations.sink_forward import attach
from hf_galore.integrations.sink_layer import HybridSinkLayer, SinkLayer, SinkSteps

FULL, SLIDING = "full_attention", "sliding_attention"
HYBRID = "hybrid"  # linear and full attention side by side
_OWN_WINDOW = {SLIDING, "hybrid_sliding"}
# Positions stay below this: up to here the angles, in float32, are exact to 0.004.
POSITION_LIMIT = 2**16


class SinkCache(Cache):
    """The first `n_sink` tokens and the last `window`, with positions counted within the cache (StreamingLLM).

        cache = SinkCache(model, n_sink=4, window=1020)
        model.generate(input_ids, past_key_values=cache, max_new_tokens=100_000)

    Memory is constant, and a token costs attention over n_sink + window. Logits are those of StreamingLLM (arXiv
    2309.17453), token by token, however the tokens are fed: a prompt longer than the window, chunks, a conversation
    over many calls of generate(), rows with padding on the left. Until anything is evicted, they are DynamicCache's.
    Where the paper rotates every key in every step, only the sinks' are here (`hf_galore.attention.sink_window`).

    A hook on the model's decoder, which does nothing for other caches and goes when this one does, gives it the
    positions, sees the padding, and divides long prompts into chunks. Layers with a sliding window of their own keep
    it, in models that mix them with full attention, and layers of linear attention or convolutions their states, which
    are of constant size and forget nothing. Where images are counted in three dimensions (Qwen2-VL), text alone is
    taken. Queries of several tokens that do not fit into the cache need a
    mask, which `eager` and `sdpa` take; other attention implementations are fed such prompts token by token.

    `torch.compile(model.forward)` makes one graph of a step, with `fullgraph` and with padding too, that serves all
    positions once the window is full. `is_compileable` stays False nevertheless: generate() would then pass masks of
    its own, and on a GPU record CUDA graphs, anew at each step because the number of tokens seen is not a tensor.

    Beams are reordered; assisted decoding is refused, as what was evicted cannot come back. A deep copy, such as of a
    cache that holds a prompt, shares the model.

    Args:
        model: a transformers decoder with rotary embeddings, in evaluation mode; peft's wrappers are fine.
        n_sink: first tokens of each row that stay, 0 for a plain window.
        window: last tokens that stay.

    Raises:
        TypeError, ValueError: wrong types and sizes; no rotary embeddings in some layer that attends; attention that
            is neither full nor sliding; a sliding window or a rotary embedding (dynamic, longrope) that the cache does
            not fit into; masks that the model makes for its decoder.
    """

    def __init__(self, model: Any, n_sink: int = 4, window: int = 1020) -> None:
        check_integer("n_sink", n_sink, low=0)
        check_integer("window", window, low=1)
        if not hasattr(model, "get_decoder"):
            raise TypeError(f"model={type(model).__name__} is not a model of transformers")
        if model.training:
            raise ValueError("model: it is in training mode; SinkCache is for generation, after model.eval()")
        self.decoder = decoder_of(model)
        _check_decoder(model, self.decoder)
        config = self.decoder.config
        types, options = get_layer_types_and_kwargs(config)
        capacity = n_sink + window
        sinks = _types_with_sinks(config, types, options, capacity)
        limit = position_limit(config)
        if limit is not None and 2 * capacity > limit:
            raise ValueError(
                f"window={window}: the rotary embedding changes from position {limit} on, which allows an n_sink + "
                f"window of half of that, {limit // 2}"
            )
        rotation = KeyRotation(self.decoder, types)
        positions = SinkWindow(n_sink, window, limit or max(POSITION_LIMIT, 2 * capacity))
        self.steps = SinkSteps(positions, rotation, torch.promote_types(self.decoder.dtype, torch.float32))
        layers = [self._layer(index, kind, kind in sinks, options[index]) for index, kind in enumerate(types)]
        super().__init__(layers=layers)
        self.has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        attach(self, self.decoder)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and states."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer))

    def _layer(self, index: int, kind: str, has_sinks: bool, options: dict[str, Any]) -> Any:
        if not has_sinks:
            return DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)
        return HybridSinkLayer(self.steps, index, **options) if kind == HYBRID else SinkLayer(self.steps, index)

    def turn_back(self, fall: Tensor) -> None:
        """Rotates all stored keys back by `fall` positions (rows,): positions are counted from there now."""
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
                continue
            turning: Any = layer.values if self.steps.rotation.turns_values(index) else layer.keys
            turn = self.steps.turn(-fall[:, None].expand(-1, turning.shape[2]))
            turning.copy_(turn.rotate(index, turning.to(self.steps.dtype)))

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """None: -1."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens, and the size of the batch."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                LinearAttentionCacheLayerMixin.__init__(layer, layer.number_of_states)
        self.steps.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the beams."""
        super().reorder_cache(beam_idx)
        self.steps.window.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        for layer in self.layers:
            select = getattr(layer, "batch_select_indices", layer.reorder_cache)  # states have the second alone
            select(indices)
        self.steps.window.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        sinks = next(layer for layer in self.layers if isinstance(layer, SinkLayer))
        rows = torch.arange(len(sinks.ring.keys)).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: what was evicted cannot come back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a SinkCache cannot be cropped, which assisted decoding needs: it has overwritten what was evicted. Use "
            "generate() without assistant_model and prompt_lookup_num_tokens"
        )

    def activate_past_recording(self) -> NoReturn:
        """Refused, as `crop` is."""
        self.crop(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SinkCache":
        memo[id(self.decoder)] = self.decoder
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        attach(new, new.decoder)
        return new


def _tensors(layer: Any) -> list[Tensor]:
    """What the layer holds."""
    held: list[Tensor | None] = []
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        held += [*layer.conv_states.values(), *layer.recurrent_states.values()]
    if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
        held += layer.ring.tensors() if isinstance(layer, SinkLayer) else (layer.keys, layer.values)
    return [tensor for tensor in held if tensor is not None]


def _check_decoder(model: Any, decoder: Any) -> None:
    """Raises ValueError unless the decoder takes any cache, and makes masks for it."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"model: {name} has an encoder; SinkCache is for models that are a decoder alone")
    if cache_argument(decoder.forward) is None:
        raise ValueError(f"model: {type(decoder).__name__} takes no cache of keys and values")
    own = own_cache(decoder)
    if own is not None:
        raise ValueError(f"model: {type(decoder).__name__} takes no other cache than {own.__name__}")
    if makes_masks(model, decoder):
        raise ValueError(
            f"model: {name} makes the masks of its decoder itself, for images that attend in both directions, and "
            "SinkCache needs masks of its own there"
        )


def _types_with_sinks(config: Any, types: list[str], options: list[dict[str, Any]], capacity: int) -> set[str]:
    """Which types of layers keep sinks: full attention; where there is none, sliding, if sinks are in its windows.

    Raises:
        ValueError: no layer can, or there are layers of a type that has another kind of cache.
    """
    other = sorted(set(types) - {FULL, HYBRID} - _OWN_WINDOW - KEEP_NO_KEYS)
    if other:
        raise ValueError(
            f"model: layers of {config.model_type} are {', '.join(other)}; SinkCache knows full and sliding attention "
            "and, beside it, layers that keep states"
        )
    if {FULL, HYBRID} & set(types):
        return {FULL, HYBRID}
    windows = [option["sliding_window"] for kind, option in zip(types, options, strict=True) if kind == SLIDING]
    if not windows:
        raise ValueError(
            f"model: layers of {config.model_type} are {', '.join(sorted(set(types)))}; SinkCache is for attention"
        )
    if capacity > min(windows):
        raise ValueError(
            f"window: all attention layers of {config.model_type} have a sliding window of {min(windows)} tokens, "
            f"outside of which sinks are masked; n_sink + window is {capacity} and may be {min(windows)}"
        )
    return {SLIDING}
