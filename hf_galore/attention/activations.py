"""Massive activations: hooks that watch the hidden states and the attention of a transformer, and report on them.

After "Massive Activations in Large Language Models" (arXiv 2402.17762): a few activations are thousands of times as
large as the median, at fixed features of the start token and of the first delimiter, appear after an early block, stay
until a late one, and draw the attention to their tokens. What is counted is one sequence after another, so that the
report does not depend on how they are batched and padded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_galore.attention.blocks import observed
from hf_galore.attention.criterion import Criterion
from hf_galore.attention.report import ActivationReport, make_report
from hf_galore.attention.tallies import AttentionTally, HiddenTally
from hf_galore.attention.tokens import Sequences
from hf_galore.checks import check_boolean, check_integer

_CRITERION = Criterion()


class ActivationRecorder:
    """The statistics of all blocks of a model, as far as it has run.

    Args: see `record_activations`.
    """

    def __init__(self, top: int, criterion: Criterion, delimiters: Sequence[int]) -> None:
        self.top, self.criterion, self.delimiters = top, criterion, tuple(delimiters)
        self.hidden: dict[int, HiddenTally] = {}
        self.attention: dict[int, AttentionTally] = {}
        self.names: list[str] = []

    def add_hidden(self, block: int, h: Tensor, sequences: Sequences) -> None:
        """Takes the hidden states (batch, tokens, d) after a block."""
        h = h.detach()
        tally = self.hidden.setdefault(block, HiddenTally(self.top, self.criterion))
        rows = sequences.rows(h)
        for states, ids, (index, classes) in zip(h, _rows(sequences.ids, len(h)), rows, strict=True):
            tally.add(states[index], classes, None if ids is None else ids[index.to(ids.device)])

    def add_weights(self, block: int, weights: Tensor, sequences: Sequences) -> None:
        """Takes the attention weights (batch, heads, tokens, tokens) of a block."""
        tally = self.attention.setdefault(block, AttentionTally())
        rows = sequences.rows(weights[:, 0])
        for matrices, (index, classes) in zip(weights.detach(), rows, strict=True):
            whole = len(index) == matrices.shape[-1]  # no padding: no copy
            tally.add(matrices if whole else matrices[:, index][:, :, index], classes)

    def report(self) -> ActivationReport:
        """What has been found until now.

        Raises:
            ValueError: the model has not run, or not through all of its blocks.
        """
        if len(self.hidden) < len(self.names):
            raise ValueError("model: not all of its blocks have run while it was recorded")
        return make_report(self.names, self.hidden, self.attention, self.criterion, self.delimiters)


@contextmanager
def record_activations(
    model: nn.Module,
    *,
    top: int = 3,
    delimiters: Sequence[int] = (),
    criterion: Criterion = _CRITERION,
    attention: bool = False,
) -> Iterator[ActivationRecorder]:
    """Inside, every forward pass of the model adds to the statistics; `report()` of what it gives has the result.

    A row of the batch is a sequence from its start; `attention_mask` (batch, tokens) tells its padding. Nothing
    is kept of the tensors, and the hooks are gone afterwards.

    Args:
        model: a decoder or an encoder of text or images, with one list of blocks.
        top: how many of the largest magnitudes are reported.
        delimiters: token ids whose first occurrence in a sequence is a kind of token of its own, as the start is.
        attention: also record the shares of attention; the attention modules must return their weights, which in
            transformers they do with attn_implementation="eager".

    Raises, before or in the forward pass:
        ValueError: see `hf_galore.attention.blocks.observed`; an activation is not finite.
        TypeError: `top` or a delimiter is no integer.
    """
    check_integer("top", top, low=1)
    check_boolean("attention", attention)
    for delimiter in delimiters:
        check_integer("delimiters", delimiter, low=0)
    recorder = ActivationRecorder(top, criterion, delimiters)
    on_weights = recorder.add_weights if attention else None
    with observed(model, recorder.add_hidden, on_weights, delimiters=recorder.delimiters) as recorder.names:
        yield recorder


def landscape(model: nn.Module, inputs: dict[str, Tensor], blocks: Sequence[int]) -> dict[int, Tensor]:
    """|h| (tokens, d) after the chosen blocks, of the first sequence of one forward pass, without its padding.

    Raises:
        ValueError: the model has no such block.
    """
    found: dict[int, Tensor] = {}

    def keep(block: int, h: Tensor, sequences: Sequences) -> None:
        if block in blocks:
            index, _ = sequences.rows(h)[0]
            found[block] = h[0, index].detach().abs().float().cpu()

    with observed(model, keep) as names, torch.no_grad():
        check_blocks(blocks, len(names))
        model(**inputs)
    return found


def check_blocks(blocks: Sequence[int], count: int) -> None:
    """Raises ValueError unless all are blocks of a model that has `count` of them."""
    for block in blocks:
        if not 0 <= block < count:
            raise ValueError(f"blocks: {block} is not one of 0 to {count - 1}")


def _rows(ids: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if ids is None else list(ids)
