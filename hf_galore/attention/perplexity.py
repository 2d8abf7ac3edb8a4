"""The perplexity of a causal language model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and there are no gradients; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """exp of the mean negative log-likelihood, in nats, of every token but the first of each sequence.

    The model is in eval mode meanwhile. Logits are taken in float32, or in float64 if they are.

    Args:
        model: called with a batch, it gives `logits` (batch, tokens, vocabulary).
        batches: arguments of its forward: `input_ids` (batch, tokens), and `attention_mask` where there is padding.

    Raises:
        ValueError: there is no token to predict, or the logits are not of that shape.
    """
    total, count = 0.0, 0
    with evaluation(model):
        for batch in batches:
            nats, tokens = _negative_log_likelihood(model, batch)
            total, count = total + nats, count + tokens
    if not count:
        raise ValueError("batches: there is no token to predict")
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def _negative_log_likelihood(model: nn.Module, batch: Mapping[str, Any]) -> tuple[float, int]:
    """The sum of the negative log-likelihoods of one batch, in nats, and how many tokens it is of."""
    ids: Tensor = batch["input_ids"]
    logits: Tensor = model(**batch).logits
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"model: logits of shape {tuple(logits.shape)} do not tell of tokens {tuple(ids.shape)}")
    mask = batch.get("attention_mask")
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    counts = (counts[:, 1:] & counts[:, :-1]).to(logits.device)
    kept = logits[:, :-1][counts]
    wide = kept if kept.dtype == torch.float64 else kept.float()
    loss = cross_entropy(wide, ids.to(logits.device)[:, 1:][counts], reduction="sum")
    return float(loss), int(counts.sum())
