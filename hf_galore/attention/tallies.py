"""Running statistics of one block: what is kept of its hidden states and attention weights, never the tensors."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_galore.attention.criterion import Criterion, magnitudes
from hf_galore.attention.tokens import CLASSES


class Activation(NamedTuple):
    """One activation and where it was."""

    value: float
    sequence: int  # from 0, in the order they were seen
    position: int  # in the sequence, from 0, padding not counted
    token: int | None  # its id; None where the input is no ids
    feature: int


class Place(NamedTuple):
    """Where activations are alike: a kind of token and a feature."""

    token: str  # of CLASSES
    feature: int


@dataclass
class Massive:
    """The massive activations of one place after one block."""

    count: int = 0
    total: float = 0.0
    strongest: Activation | None = None

    def add(self, activation: Activation) -> None:
        self.count += 1
        self.total += activation.value
        if self.strongest is None or abs(activation.value) > abs(self.strongest.value):
            self.strongest = activation

    @property
    def mean(self) -> float:
        return self.total / self.count


class HiddenTally:
    """Statistics of the hidden states after one block; its size depends on `top` and the number of places alone.

    Args:
        top: how many of the largest magnitudes of a sequence count.
    """

    def __init__(self, top: int, criterion: Criterion) -> None:
        self.top, self.criterion = top, criterion
        self.sequences = 0
        self.median_total = 0.0
        self.top_total = torch.zeros(top, dtype=torch.float64)
        self.strongest: list[Activation] = []
        self.massive: dict[Place, Massive] = {}

    def add(self, h: Tensor, classes: Tensor, ids: Tensor | None) -> None:
        """Takes the hidden states (tokens, d) of one sequence, whose tokens have these classes and ids.

        Raises:
            ValueError: there are fewer activations than `top`, or some are not finite.
        """
        sizes = magnitudes(h)
        if sizes.numel() < self.top:
            raise ValueError(f"top={self.top} is more than the {sizes.numel()} activations of a sequence")
        largest, places = sizes.flatten().topk(self.top)
        if not largest.isfinite().all():  # NaN counts as the largest
            raise ValueError(f"model: sequence {self.sequences} has activations that are not finite")
        median = sizes.median()

        def at(position: int, feature: int) -> Activation:
            token = None if ids is None else int(ids[position])
            return Activation(float(h[position, feature]), self.sequences, position, token, feature)

        here = [at(*divmod(place, h.shape[1])) for place in places.tolist()]
        self.strongest = sorted(self.strongest + here, key=lambda one: -abs(one.value))[: self.top]
        for position, feature in self.criterion(sizes, median).nonzero().tolist():
            place = Place(CLASSES[int(classes[position])], feature)
            self.massive.setdefault(place, Massive()).add(at(position, feature))
        self.top_total += largest.cpu().double()
        self.median_total += float(median)
        self.sequences += 1


class AttentionTally:
    """Shares of attention after one block; its size depends on the heads and the longest sequence alone.

    The share of attention that a token receives from a head is the mean over all queries of its attention weight, so
    that the shares of all tokens sum to 1.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.by_class_total = torch.zeros(0, len(CLASSES), dtype=torch.float64)  # (heads, classes)
        self.by_class_count = torch.zeros(len(CLASSES), dtype=torch.float64)  # tokens
        self.by_position_total = torch.zeros(0, dtype=torch.float64)
        self.by_position_count = torch.zeros(0, dtype=torch.float64)  # sequences

    def add(self, weights: Tensor, classes: Tensor) -> None:
        """Takes the weights (heads, tokens, tokens) of one sequence, whose tokens have these classes."""
        received = weights.mean(-2, dtype=torch.promote_types(weights.dtype, torch.float32)).cpu().double()
        classes, (heads, tokens) = classes.cpu(), received.shape
        if not self.sequences:
            self.by_class_total = self.by_class_total.new_zeros(heads, len(CLASSES))
        self.by_class_total.index_add_(1, classes, received)
        self.by_class_count += classes.bincount(minlength=len(CLASSES))
        longer = tokens - len(self.by_position_total)
        if longer > 0:
            self.by_position_total = torch.cat([self.by_position_total, torch.zeros(longer, dtype=torch.float64)])
            self.by_position_count = torch.cat([self.by_position_count, torch.zeros(longer, dtype=torch.float64)])
        self.by_position_total[:tokens] += received.mean(0)
        self.by_position_count[:tokens] += 1
        self.sequences += 1
