"""Register tokens in a vision transformer: hooks that put them behind the first token and take them out after all.

They come in behind the position embeddings, where the paper has them; and behind the class token, as in transformers'
own models with registers, so that rotary embeddings of patches (DINOv3) know the patches as the last tokens. They are
gone before the final norm, the pooling and any head.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_galore.attention.blocks import find_blocks
from hf_galore.attention.placement import Placement

EMBEDDINGS = "embeddings"
_PLACED = "_hf_galore_placed"  # on the embeddings: how many they have put in


def hook_vision(encoder: Any, child: str) -> tuple[Any, ...]:
    """The handles of hooks that put in what the child of the encoder's embeddings gives: (n, d), or None."""
    embeddings = getattr(encoder, EMBEDDINGS)
    last = list(find_blocks(encoder).values())[-1]
    return (
        encoder.register_forward_pre_hook(_check, with_kwargs=True),
        embeddings.register_forward_hook(partial(_put, child)),
        last.register_forward_hook(partial(_take, embeddings)),
        encoder.register_forward_hook(partial(_take_captured, embeddings)),
    )


def forget(embeddings: nn.Module) -> None:
    """Removes what the hooks have left on the embeddings."""
    vars(embeddings).pop(_PLACED, None)


def _check(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("attention_mask") is not None:
        raise ValueError("attention_mask: register tokens in a vision transformer go with none")


def _put(child: str, embeddings: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        raise ValueError(f"{type(embeddings).__name__} puts out more than embeddings")
    own = getattr(embeddings, child)(out.device)
    setattr(embeddings, _PLACED, 0 if own is None else len(own))
    return out if own is None else _placement(len(own), out).put(own[None], out)


def _take(embeddings: nn.Module, block: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    rows, *rest = out if isinstance(out, tuple) else (out,)
    taken = _placement(getattr(embeddings, _PLACED), rows).take(rows)
    return (taken, *rest) if isinstance(out, tuple) else taken


def _take_captured(embeddings: nn.Module, encoder: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    """Hidden states of all blocks and attention weights, which transformers has captured inside."""
    n = getattr(embeddings, _PLACED)
    placement, length = _placement(n, out[0]), out[0].shape[1] + n

    def taken(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(taken(one) for one in value)
        if not isinstance(value, Tensor) or value.ndim < 3 or value.shape[-2] != length:
            return value
        return placement.take(value, value.ndim - 2)

    if isinstance(out, tuple):
        return tuple(taken(value) for value in out)
    for name in list(out):
        out[name] = taken(out[name])
    return out


def _placement(n: int, rows: Tensor) -> Placement:
    return Placement(n, torch.ones(len(rows), dtype=torch.long, device=rows.device))
