"""Interventions on massive activations: what becomes of a model if they are zero, their mean, or scaled.

Section 3 of "Massive Activations in Large Language Models" (arXiv 2402.17762): with their mean in their place a model
is what it was, with zeros it is lost. The means here are those of each kind of token and feature, not one for all.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_galore.attention.activations import check_blocks
from hf_galore.attention.blocks import observed
from hf_galore.attention.criterion import Criterion, magnitudes
from hf_galore.attention.perplexity import perplexity
from hf_galore.attention.report import ActivationReport, Site
from hf_galore.attention.tokens import CLASSES, Sequences
from hf_galore.checks import check_integer, check_number

CHANGES = ("zero", "mean")  # or a number, which scales


@contextmanager
def intervene(
    model: nn.Module, report: ActivationReport, change: str | float, *, blocks: Sequence[int] | None = None
) -> Iterator[None]:
    """Inside, the massive activations that the report has found are changed, in every forward pass.

    An activation is changed if it is at a site of the report (kind of token and feature) after a chosen block and is
    massive now, by the report's criterion. All else keeps its bits.

    Args:
        report: of this model.
        change: "zero"; "mean", of the site after that block; or a number that they are multiplied with.
        blocks: after which, from 0. None takes for each site the block that it is born in: later blocks inherit
            what that one puts out.

    Raises, before the model is changed:
        ValueError: `change` or a block is none of these, no site of the report is in the chosen blocks, or the report
            is of a model with other blocks.
        TypeError: `change` is neither a string nor a number, a block is no integer.

    Raises in the forward pass:
        ValueError: see `hf_galore.attention.blocks.observed`.
    """
    edits = _edits(report, change, blocks)

    def edit(block: int, h: Tensor, sequences: Sequences) -> Tensor | None:
        return edits[block].apply(h, sequences) if block in edits else None

    with observed(model, edit, delimiters=report.delimiters) as names:
        if names != [block.name for block in report.blocks]:
            raise ValueError("report: it is of a model with other blocks; make one of this model")
        yield


def intervention_perplexity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    report: ActivationReport,
    changes: Sequence[str | float] = CHANGES,
    *,
    blocks: Sequence[int] | None = None,
) -> dict[str, float]:
    """The perplexity of the model as it is ("unchanged") and under each intervention, by its name.

    Args:
        batches: see `hf_galore.attention.perplexity.perplexity`; gone through several times.
        report, changes, blocks: see `intervene`.

    Raises:
        TypeError: `batches` can be gone through only once.
        ValueError, TypeError: see `intervene`; before anything runs.
    """
    if iter(batches) is batches:
        raise TypeError("batches: an iterator, which ends after one pass; give a list, or an object that begins anew")
    for change in changes:
        _edits(report, change, blocks)
    found = {"unchanged": perplexity(model, batches)}
    for change in changes:
        with intervene(model, report, change, blocks=blocks):
            found[str(change)] = perplexity(model, batches)
    return found


@dataclass(frozen=True)
class _Edit:
    """What happens after one block, at some features: y = scale·a + value, for each of the CLASSES of tokens."""

    criterion: Criterion
    features: Tensor  # (f,) int64
    chosen: Tensor  # (classes, f) bool
    scale: float
    value: Tensor  # (classes, f) float64

    def apply(self, h: Tensor, sequences: Sequences) -> Tensor | None:
        """The changed h (batch, tokens, d), or None if nothing in it is massive."""
        changed: Tensor | None = None
        features = self.features.to(h.device)
        for number, (index, classes) in enumerate(sequences.rows(h)):
            states = h[number, index]
            sizes = magnitudes(states.detach())
            where = self.criterion(sizes[:, features], sizes.median()) & self.chosen.to(h.device)[classes]
            tokens, columns = where.nonzero(as_tuple=True)
            if len(tokens):
                changed = h.clone() if changed is None else changed
                here = number, index[tokens], features[columns]
                value = self.value[classes[tokens].cpu(), columns.cpu()].to(h)
                changed[here] = h[here] * self.scale + value
        return changed


def _edits(report: ActivationReport, change: str | float, blocks: Sequence[int] | None) -> dict[int, _Edit]:
    """The edit of each block that has one."""
    if not isinstance(change, str):
        check_number("change", change, low=torch.finfo(torch.float64).min)
    elif change not in CHANGES:
        raise ValueError(f"change={change!r} is not one of {', '.join(CHANGES)}, and no number")
    if blocks is not None:
        for block in blocks:
            check_integer("blocks", block, low=0)
        check_blocks(blocks, len(report.blocks))
    chosen: dict[int, list[Site]] = {}
    for site in report.sites:
        for block in [site.born] if blocks is None else sorted(set(blocks) & set(site.blocks)):
            chosen.setdefault(block, []).append(site)
    if not chosen:
        where = "" if blocks is None else f" after the blocks {list(blocks)}"
        raise ValueError(f"report: it has no massive activation{where} to change")
    scale = 0.0 if isinstance(change, str) else float(change)
    return {block: _edit(report.criterion, block, sites, scale, change == "mean") for block, sites in chosen.items()}


def _edit(criterion: Criterion, block: int, sites: list[Site], scale: float, to_mean: bool) -> _Edit:
    features = sorted({site.feature for site in sites})
    chosen = torch.zeros(len(CLASSES), len(features), dtype=torch.bool)
    value = torch.zeros(len(CLASSES), len(features), dtype=torch.float64)
    for site in sites:
        at = CLASSES.index(site.token), features.index(site.feature)
        chosen[at] = True
        value[at] = site.blocks[block].mean if to_mean else 0.0
    return _Edit(criterion, torch.tensor(features), chosen, scale, value)
