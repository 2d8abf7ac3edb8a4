"""The rotation that a transformers model gives its keys: found, checked against the model itself, and applied."""

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_galore.integrations.compatibility import cache_argument

Angles = dict[str | None, tuple[Tensor, Tensor]]  # (cos, sin) by type of layer; None where all layers have the same
_TURN = 7  # positions between the two keys of the check
_ALIBI = "it has ALiBi, a bias on the scores that does not follow the keys"
_GROWING = {"dynamic", "longrope"}  # rope types whose frequencies change beyond the length of pretraining


class KeyRotation:
    """Turns keys of any layer on to later positions: R(Δ) k(p) = k(p + Δ).

    It is made of the decoder's `rotary_emb` at position Δ, without its attention scaling, which the keys have already,
    and of the modeling file's `apply_rotary_pos_emb`, on the first channels if the embedding is partial.

    Args:
        decoder: the module with the layers and `rotary_emb`.
        layer_types: of each layer, for models with an embedding per type.

    Raises:
        ValueError: the keys of some layer do not turn so: learned positions, ALiBi, no positions at all.
    """

    def __init__(self, decoder: Any, layer_types: Sequence[str]) -> None:
        modeling = sys.modules[type(decoder).__module__]
        rotary, apply = getattr(decoder, "rotary_emb", None), getattr(modeling, "apply_rotary_pos_emb", None)
        if rotary is None or apply is None:
            raise ValueError(_refusal(decoder, _kind_of_positions(modeling, decoder)))
        known = getattr(rotary, "rope_type", None)  # by type of layer, where each has an embedding of its own
        without = sorted(set(layer_types) - known.keys()) if isinstance(known, dict) else []
        if without:
            raise ValueError(_refusal(decoder, f"the keys of {', '.join(without)} have no position (NoPE)"))
        self._rotary, self._apply = rotary, apply
        parameters = inspect.signature(apply).parameters
        self._is_of_pairs = "k" in parameters  # (q, k, cos, sin), not (x, cos, sin)
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        self._types: list[str | None] = [name if by_type else None for name in layer_types]
        self._scaling = self._scalings(decoder.device)
        self._is_partial = [False] * len(layer_types)
        self._check(decoder)

    def __deepcopy__(self, memo: dict) -> "KeyRotation":
        return self  # it is the model's, and does not change

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """cos and sin (rows, n, channels) at the positions (rows, n), free of attention scaling."""
        tables = self._tables(positions, dtype)
        return {name: (cos / self._scaling[name], sin / self._scaling[name]) for name, (cos, sin) in tables.items()}

    def _tables(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        like = torch.empty((), dtype=dtype, device=positions.device)
        return {
            name: self._rotary(like, positions, **({} if name is None else {"layer_type": name}))
            for name in dict.fromkeys(self._types)
        }

    def _scalings(self, device: torch.device) -> dict[str | None, float]:
        """What each type multiplies cos and sin by: at position 0, cos is this in all channels."""
        tables = self._tables(torch.zeros(1, 1, dtype=torch.long, device=device), torch.float64)
        return {name: float(cos.flatten()[0]) for name, (cos, _) in tables.items()}

    def rotate(self, layer: int, angles: Angles, keys: Tensor) -> Tensor:
        """The layer's keys (batch, heads, n, head_dim) turned on by the angles."""
        cos, sin = (table.to(keys.device, keys.dtype) for table in angles[self._types[layer]])
        if self._is_partial[layer]:
            turning, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
            return torch.cat([self._turn(turning, cos, sin), rest], dim=-1)
        return self._turn(keys, cos, sin)

    def by(self, positions: Tensor, dtype: torch.dtype) -> "Turn":
        """The rotation by these positions, for all layers: angles are computed once."""
        return Turn(self, self.angles(positions, dtype))

    def _turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self._is_of_pairs:
            return self._apply(keys[:, :0], keys, cos, sin)[1]  # no queries
        return self._apply(keys, cos, sin)

    @torch.no_grad()
    def _check(self, decoder: Any) -> None:
        """Runs one token at two positions: its keys must differ by the rotation, in every layer.

        A single token attends to itself alone, so that nothing else in the model depends on its position.
        """
        for layer, key in enumerate(_keys_at(decoder, positions=(3, 3 + _TURN))):
            wide = key.to(torch.promote_types(key.dtype, torch.float32))
            turn = self.by(torch.tensor([[_TURN]], device=key.device), wide.dtype)
            # Two roundings of the keys in their own dtype, and angles that transformers computes in float32.
            tolerance = 16 * max(torch.finfo(key.dtype).eps, torch.finfo(torch.float32).eps) * float(wide.abs().max())
            if float((wide[0] - wide[1]).abs().max()) <= tolerance:
                has_alibi = getattr(decoder.config, "alibi", False)
                raise ValueError(
                    _refusal(decoder, _ALIBI if has_alibi else f"the keys of layer {layer} have no position (NoPE)")
                )
            for self._is_partial[layer] in (False, True):
                try:
                    turned = turn.rotate(layer, wide[:1])
                except RuntimeError:  # the shapes of a partial embedding
                    continue
                if float((turned[0] - wide[1]).abs().max()) <= tolerance:
                    break
            else:
                reason = f"a key of layer {layer} at a later position is not the rotated key"
                raise ValueError(_refusal(decoder, reason))


class Turn:
    """A rotation by given positions."""

    def __init__(self, rotation: KeyRotation, angles: Angles) -> None:
        self._rotation, self._angles = rotation, angles

    def rotate(self, layer: int, keys: Tensor) -> Tensor:
        """The layer's keys turned on; see `KeyRotation.rotate`."""
        return self._rotation.rotate(layer, self._angles, keys)


def position_limit(config: Any) -> int | None:
    """Up to which position the frequencies stay what they are; None if they never change."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    growing = [one for one in nested if one.get("rope_type") in _GROWING]
    limits = [one.get("original_max_position_embeddings", config.max_position_embeddings) for one in growing]
    return min(limits, default=None)


def _keys_at(decoder: Any, positions: tuple[int, int]) -> list[Tensor]:
    """Keys (2, heads, 1, head_dim) of each layer for one token at two positions."""
    weight = decoder.get_input_embeddings().weight
    token = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    decoder(
        inputs_embeds=token.to(weight.device, weight.dtype).expand(2, 1, -1),
        position_ids=torch.tensor(positions, device=weight.device)[:, None],
        use_cache=True,
        **{cache_argument(decoder.forward): cache},
    )
    return [layer.keys for layer in cache.layers]


def _kind_of_positions(modeling: Any, decoder: Any) -> str:
    if any("alibi" in name.lower() for name in vars(modeling)):
        return _ALIBI
    learned = [name for name, module in decoder.named_modules() if isinstance(module, nn.Embedding)]
    if len(learned) > 1:
        return f"it has learned positions ({', '.join(learned[1:])}), which end where the table ends"
    return "its decoder has no `rotary_emb`, or its modeling file no `apply_rotary_pos_emb`"


def _refusal(decoder: Any, reason: str) -> str:
    return (
        f"model: SinkCache cannot count the positions of {type(decoder).__name__} within the cache: {reason}. It "
        "needs rotary position embeddings in every layer"
    )
