"""The loss of a language model on blocks of tokens."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from corpus import Blocks

_BATCH = 8  # blocks at a time


@torch.no_grad()
def loss_of(model: nn.Module, blocks: Blocks) -> float:
    """The mean loss on the blocks."""
    losses = []
    for first in range(0, len(blocks), _BATCH):
        tokens = tokens_of(blocks, range(first, min(first + _BATCH, len(blocks))))
        losses += [model(input_ids=tokens, labels=tokens).loss] * len(tokens)
    return float(torch.stack(losses).mean())


def tokens_of(blocks: Blocks, indices: Sequence[int]) -> torch.Tensor:
    """The blocks of these numbers, stacked."""
    return torch.stack([blocks[index]["input_ids"] for index in indices])
