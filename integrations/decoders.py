"""Which part of a transformers model is its decoder, and whether that attends to what it has seen."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor
from transformers.cache_utils import Cache, get_layer_types_and_kwargs
from transformers.modeling_utils import PreTrainedModel

from hf_galore.integrations.compatibility import cache_argument

# Types of layers whose caches hold no keys and values; transformers 5.22 calls some dummies "moe" and "mlp".
KEEP_NO_KEYS = {"linear_attention", "conv", "dummy", "moe", "mlp"}
_FIRST_IDS = 64


def decoder_of(model: Any) -> Any:
    """The module with embeddings and blocks and without a head: what `get_decoder()` finds, or should find.

    In transformers 5.23 that finds the head where a model calls its head `decoder` (ModernBERT), and the whole model
    where this has the name of another part (Llama 4's text model).
    """
    decoder = model.get_decoder()
    if isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is None:
        return decoder
    parts = (decoder if isinstance(decoder, PreTrainedModel) else model).modules()
    headless = (part for part in parts if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is None)
    return next(headless, decoder)


def keeps_keys(decoder: Any) -> bool:
    """Whether the decoder's forward takes a cache, and a layer of it keeps keys and values there.

    Those of Mamba and its like take one for their states alone.
    """
    if cache_argument(decoder.forward) is None:
        return False
    types, _ = get_layer_types_and_kwargs(decoder.config)
    return not set(types) <= KEEP_NO_KEYS


def own_cache(decoder: Any) -> type | None:
    """The kind of cache that the decoder was written for and takes alone (MiniMax's), as its forward declares it."""
    name = cache_argument(decoder.forward)
    declared = None if name is None else inspect.signature(decoder.forward).parameters[name].annotation
    kinds = [kind for kind in (declared, *get_args(declared)) if isinstance(kind, type) and issubclass(kind, Cache)]
    return kinds[0] if kinds and all(".models." in kind.__module__ for kind in kinds) else None


def embeddings_of(decoder: Any) -> Any:
    """The decoder's embeddings of tokens.

    Raises:
        ValueError: it has none, or several, one for each codebook (MusicGen).
    """
    try:
        embeddings = decoder.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if not isinstance(getattr(embeddings, "embedding_dim", None), int):
        raise ValueError(f"model: {type(decoder).__name__} has no embeddings of tokens, or several for each token")
    return embeddings


@contextmanager
def trial_of(model: Any) -> Iterator[None]:
    """Inside, what is run to see what a model does leaves nothing behind: no gradients, random numbers or graphs."""
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def likely_token(decoder: Any) -> Tensor:
    """The id (1, 1), among the first of the vocabulary, with the longest embedding: for trial runs.

    An id, because some decoders look up more than the embeddings for it; and this one, because the embeddings of
    padding and of unused tokens are often zeros, of which all is zero.
    """
    embeddings = embeddings_of(decoder)
    ids = torch.arange(min(_FIRST_IDS, decoder.config.vocab_size), device=decoder.device)
    return embeddings(ids).float().norm(dim=-1).argmax().view(1, 1)


class _Reached(Exception):
    """Ends a trial run at the decoder."""


def makes_masks(model: Any, decoder: Any) -> bool:
    """Whether the model hands its decoder masks of its own for the mask (batch, tokens) that it is given.

    Those with images often do, where image tokens attend in both directions. Models that do not run on token ids
    alone are taken for others.
    """
    names = list(inspect.signature(decoder.forward).parameters)
    found = []

    def see(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
        found.append(mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2))
        raise _Reached

    ids = likely_token(decoder).expand(2, 3)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    hook = decoder.register_forward_pre_hook(see, with_kwargs=True, prepend=True)
    try:
        with trial_of(decoder):
            model(input_ids=ids, attention_mask=mask)
    except (_Reached, TypeError, ValueError, AttributeError, RuntimeError):
        pass
    finally:
        hook.remove()
    return any(found)
