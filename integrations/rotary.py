"""The rotation that a transformers model gives its keys: found, checked against the model itself, and applied."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_galore.integrations.compatibility import cache_argument
from hf_galore.integrations.decoders import KEEP_NO_KEYS, likely_token, trial_of

Angles = dict[str | None, tuple[Tensor, Tensor]]  # (cos, sin) by type of layer; None where all layers have the same
_TURN = 7  # positions between the two keys of the check
_ALIBI = "it has ALiBi, a bias on the scores that does not follow the keys"
_GROWING = {"dynamic", "longrope"}  # rope types whose frequencies change beyond the length of pretraining


class _Turning(NamedTuple):
    """What a layer caches that turns with its position."""

    is_value: bool  # multi-head latent attention has it in place of the values, and latents in place of the keys
    is_partial: bool  # the first channels alone turn


class KeyRotation:
    """Turns keys of any layer on to later positions: R(Δ) k(p) = k(p + Δ).

    It is made of the decoder's rotary embedding at position Δ, without its attention scaling, which the keys have
    already, and of the modeling file's `apply_rotary_pos_emb`, on the first channels if the embedding is partial.
    Where the file has none, channels i and i + d/2 are turned, or neighbours if its angles are complex numbers.

    Args:
        decoder: the module with the layers and the rotary embedding.
        layer_types: of each layer, for models with an embedding per type.

    Raises:
        ValueError: the keys of some layer do not turn so: learned positions, ALiBi, a table of angles that ends, no
            positions at all.
    """

    def __init__(self, decoder: Any, layer_types: Sequence[str]) -> None:
        modeling = sys.modules[type(decoder).__module__]
        rotary: Any = next((part for part in decoder.children() if "Rotary" in type(part).__name__), None)
        if rotary is None:
            raise ValueError(_refusal(decoder, _kind_of_positions(modeling, decoder)))
        if any(buffer.ndim > 1 for buffer in rotary.buffers()):  # and not frequencies
            raise ValueError(_refusal(decoder, "its rotary angles are in a table that ends"))
        known = getattr(rotary, "rope_type", None)  # by type of layer, where each has an embedding of its own
        attending = {kind for kind in layer_types if kind not in KEEP_NO_KEYS}
        without = sorted(attending - known.keys()) if isinstance(known, dict) else []
        if without:
            raise ValueError(_refusal(decoder, f"the keys of {', '.join(without)} have no position (NoPE)"))
        self._rotary = rotary
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        self._types = {index: kind if by_type else None for index, kind in enumerate(layer_types) if kind in attending}
        self._apply = self._turn_of(modeling, decoder.device)
        self._takes_queries = "k" in inspect.signature(self._apply).parameters  # (q, k, cos, sin), not (x, cos, sin)
        self._scaling = self._scalings(decoder.device)
        self._turning: dict[int, _Turning] = {}  # by layer
        self._check(decoder)

    def __deepcopy__(self, memo: dict) -> "KeyRotation":
        return self  # it is the model's, and does not change

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """cos and sin (rows, n, channels) at the positions (rows, n), free of attention scaling."""
        tables = self._tables(positions, dtype)
        return {name: (cos / self._scaling[name], sin / self._scaling[name]) for name, (cos, sin) in tables.items()}

    def _tables(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        tables = self._given(positions, dtype)
        return {
            name: _of_complex(table, dtype) if isinstance(table, Tensor) else table for name, table in tables.items()
        }

    def _given(self, positions: Tensor, dtype: torch.dtype) -> dict[str | None, Any]:
        """What the model's embedding gives for the positions: cos and sin, or complex numbers."""
        like = torch.empty((), dtype=dtype, device=positions.device)
        return {
            name: self._rotary(like, positions, **({} if name is None else {"layer_type": name}))
            for name in dict.fromkeys(self._types.values())
        }

    def _turn_of(self, modeling: Any, device: torch.device) -> Callable[..., Any]:
        """The function that turns channels by cos and sin."""
        tables = self._given(torch.zeros(1, 1, dtype=torch.long, device=device), torch.float32)
        if any(isinstance(table, Tensor) for table in tables.values()):
            return _turn_neighbours
        return getattr(modeling, "apply_rotary_pos_emb", _turn_halves)

    def _scalings(self, device: torch.device) -> dict[str | None, float]:
        """What each type multiplies cos and sin by: at position 0, cos is this in all channels."""
        tables = self._tables(torch.zeros(1, 1, dtype=torch.long, device=device), torch.float64)
        return {name: float(cos.flatten()[0]) for name, (cos, _) in tables.items()}

    def turns_values(self, layer: int) -> bool:
        """Whether the layer caches the rotated channels of its keys as values, and its latents as keys."""
        return self._turning[layer].is_value

    def rotate(self, layer: int, angles: Angles, keys: Tensor) -> Tensor:
        """The layer's keys (batch, heads, n, head_dim) turned on by the angles."""
        cos, sin = (table.to(keys.device, keys.dtype) for table in angles[self._types[layer]])
        if self._turning[layer].is_partial:
            turning, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
            return torch.cat([self._turn(turning, cos, sin), rest], dim=-1)
        return self._turn(keys, cos, sin)

    def by(self, positions: Tensor, dtype: torch.dtype) -> "Turn":
        """The rotation by these positions, for all layers: angles are computed once."""
        return Turn(self, self.angles(positions, dtype))

    def _turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self._takes_queries:
            return self._apply(keys[:, :0], keys, cos=cos, sin=sin)[1]  # no queries
        return self._apply(keys, cos=cos, sin=sin)  # GPT-J has sin first

    @torch.no_grad()
    def _check(self, decoder: Any) -> None:
        """Runs one token at two positions: its keys must differ by the rotation, in every layer that attends.

        A single token attends to itself alone, so that nothing else in the model depends on its position.
        """
        cached = _cached_at(decoder, positions=(3, 3 + _TURN))
        for layer in self._types:
            moving = [is_value for is_value in (False, True) if _moves(cached[layer][is_value])]
            if not moving:
                has_alibi = getattr(decoder.config, "alibi", False)
                raise ValueError(
                    _refusal(
                        decoder, _ALIBI if has_alibi else f"the keys of layer {layer} do not change with the position"
                    )
                )
            ways = (_Turning(is_value, is_partial) for is_value in moving[:1] for is_partial in (False, True))
            if not any(self._turns(layer, way, cached[layer][way.is_value]) for way in ways):
                reason = f"a key of layer {layer} at a later position is not the rotated key"
                raise ValueError(_refusal(decoder, reason))

    def _turns(self, layer: int, way: _Turning, state: Any) -> bool:
        """Tries whether the layer's `state` (2, heads, 1, width) turns in this way, and keeps it."""
        self._turning[layer] = way
        wide = state.to(torch.promote_types(state.dtype, torch.float32))
        turn = self.by(torch.tensor([[_TURN]], device=state.device), wide.dtype)
        try:
            turned = turn.rotate(layer, wide[:1])
        except RuntimeError:  # the shapes of a partial embedding
            return False
        return float((turned[0] - wide[1]).abs().max()) <= _tolerance(state)


class Turn:
    """A rotation by given positions."""

    def __init__(self, rotation: KeyRotation, angles: Angles) -> None:
        self._rotation, self._angles = rotation, angles

    def rotate(self, layer: int, keys: Tensor) -> Tensor:
        """The layer's keys turned on; see `KeyRotation.rotate`."""
        return self._rotation.rotate(layer, self._angles, keys)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels i and i + d/2 of x (batch, heads, n, d) turned, by tables (rows, n, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 of x (batch, heads, n, d) turned, by tables (rows, n, d)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos[:, None] + turned * sin[:, None]


def _of_complex(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (rows, n, d) for neighbours, of complex numbers (rows, n, d/2) whose arguments are the angles."""
    cos, sin = (part.to(dtype).repeat_interleave(2, dim=-1) for part in (angles.real, angles.imag))
    return cos, sin


def position_limit(config: Any) -> int | None:
    """Up to which position the frequencies stay what they are; None if they never change."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    growing = [one for one in nested if one.get("rope_type") in _GROWING]
    limits = [one.get("original_max_position_embeddings", config.max_position_embeddings) for one in growing]
    return min(limits, default=None)


def _cached_at(decoder: Any, positions: tuple[int, int]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Keys and values (2, heads, 1, width) of each layer for one token at two positions, None where it has none."""
    token = likely_token(decoder)
    cache = DynamicCache(config=decoder.config)
    with trial_of(decoder):
        decoder(
            input_ids=token.expand(2, 1),
            position_ids=torch.tensor(positions, device=token.device)[:, None],
            use_cache=True,
            **{cache_argument(decoder.forward): cache},
        )
    return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]


def _moves(state: Tensor | None) -> bool:
    """Whether it differs between the two positions by more than rounding."""
    if state is None:
        return False
    first, second = state.to(torch.promote_types(state.dtype, torch.float32))
    return float((first - second).abs().max()) > _tolerance(state)


def _tolerance(state: Tensor) -> float:
    """Two roundings of keys in their own dtype, and angles that transformers computes in float32."""
    return 16 * max(torch.finfo(state.dtype).eps, torch.finfo(torch.float32).eps) * float(state.abs().max())


def _kind_of_positions(modeling: Any, decoder: Any) -> str:
    if any("alibi" in name.lower() for name in vars(modeling)):
        return _ALIBI
    learned = [name for name, module in decoder.named_modules() if isinstance(module, nn.Embedding)]
    if len(learned) > 1:
        return f"it has learned positions ({', '.join(learned[1:])}), which end where the table ends"
    moving = [any(map(_moves, cached)) for cached in _cached_at(decoder, positions=(3, 3 + _TURN))]
    return (
        "its decoder has no rotary embedding for all layers"
        if any(moving)
        else "its keys do not change with the position"
    )


def _refusal(decoder: Any, reason: str) -> str:
    return (
        f"model: SinkCache cannot count the positions of {type(decoder).__name__} within the cache: {reason}. It "
        "needs rotary position embeddings in every layer"
    )
