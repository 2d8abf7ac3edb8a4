"""A cache for transformers' generate() that goes on for ever: sink tokens and a rolling window."""

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from hf_galore.attention.sink_window import SinkWindow
from hf_galore.checks import check_integer
from hf_galore.integrations.decoders import decoder_of
from hf_galore.integrations.rotary import KeyRotation, position_limit
from hf_galore.integrations.sink_forward import attach
from hf_galore.integrations.sink_layer import SinkLayer, SinkSteps

FULL, SLIDING = "full_attention", "sliding_attention"
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
    it, in models that mix them with full attention. Queries of several tokens that do not fit into the cache need a
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
        TypeError, ValueError: wrong types and sizes; no rotary embeddings in some layer; layers that are neither full
            nor sliding attention; a sliding window or a rotary embedding (dynamic, longrope) that the cache does not
            fit into.
    """

    def __init__(self, model: Any, n_sink: int = 4, window: int = 1020) -> None:
        check_integer("n_sink", n_sink, low=0)
        check_integer("window", window, low=1)
        if not hasattr(model, "get_decoder"):
            raise TypeError(f"model={type(model).__name__} is not a model of transformers")
        if model.training:
            raise ValueError("model: it is in training mode; SinkCache is for generation, after model.eval()")
        self.decoder = decoder_of(model)
        config = self.decoder.config
        types, options = get_layer_types_and_kwargs(config)
        capacity = n_sink + window
        is_sink = _sink_layers(config, types, options, capacity)
        limit = position_limit(config)
        if limit is not None and 2 * capacity > limit:
            raise ValueError(
                f"window={window}: the rotary embedding changes from position {limit} on, which allows an n_sink + "
                f"window of half of that, {limit // 2}"
            )
        rotation = KeyRotation(self.decoder, types)
        positions = SinkWindow(n_sink, window, limit or max(POSITION_LIMIT, 2 * capacity))
        self.steps = SinkSteps(positions, rotation, torch.promote_types(self.decoder.dtype, torch.float32))
        layers = [
            SinkLayer(self.steps, index) if is_sink[index] else DynamicSlidingWindowLayer(**options[index])
            for index in range(len(types))
        ]
        super().__init__(layers=layers)
        attach(self, self.decoder)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer))

    def turn_back(self, fall: Tensor) -> None:
        """Rotates all stored keys back by `fall` positions (rows,): positions are counted from there now."""
        for index, layer in enumerate(self.layers):
            if not layer.is_initialized:
                continue
            turn = self.steps.turn(-fall[:, None].expand(-1, layer.keys.shape[2]))
            layer.keys.copy_(turn.rotate(index, layer.keys.to(self.steps.dtype)))

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """None: -1."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()
        self.steps.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the beams."""
        super().reorder_cache(beam_idx)
        self.steps.window.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self.steps.window.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        rows = torch.arange(self.layers[0].keys.shape[0]).repeat_interleave(repeats)
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


def _tensors(layer: Any) -> tuple[Tensor, ...]:
    if not layer.is_initialized:
        return ()
    return layer.ring.tensors() if isinstance(layer, SinkLayer) else (layer.keys, layer.values)


def _sink_layers(config: Any, types: list[str], options: list[dict[str, Any]], capacity: int) -> list[bool]:
    """Which layers keep sinks: those with full attention; where there is none, all, if sinks are in their windows."""
    other = sorted(set(types) - {FULL, SLIDING})
    if other:
        raise ValueError(f"model: layers of {config.model_type} are {', '.join(other)}; SinkCache is for attention")
    if FULL in types:
        return [kind == FULL for kind in types]
    narrowest = min(option["sliding_window"] for option in options)
    if capacity > narrowest:
        raise ValueError(
            f"window: all layers of {config.model_type} have a sliding window of {narrowest} tokens, outside of which "
            f"sinks are masked; n_sink + window is {capacity} and may be {narrowest}"
        )
    return [True] * len(types)
