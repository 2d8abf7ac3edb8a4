"""Explicit attention bias: keys k' and values v' of every head that all tokens attend to, whatever the text.

"Massive Activations in Large Language Models" (arXiv 2402.17762), section 4: with

    softmax([q·k', q·K] / √d) [v'; V]

a model needs no massive activations to make such a constant of its own. Deviations from the paper: there may be n
columns and not one; under grouped queries they belong to the key-value heads; and an optional gate, one per query
head, makes a finetuning start from the model as it is:

    out + tanh(gate) · (out with the columns − out)

At gate = 0 the model is the original, bit for bit, and the gate has a gradient; k' and v' have one from the second
step on.

Variants share the mathematics: "sink_logits" has k' = v' = 0 and a trained logit per query head (as gpt-oss has), and
"off_by_one" has k' = v' = 0 and the logit 0, so that the softmax has 1 added to its denominator.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_galore.checks import check_choice, check_integer, check_number

KINDS = ("key_value", "sink_logits", "off_by_one")
STARTS = ("noop", "random")
PAPER_STD = 0.02  # of the published code, for k' and for v'


@dataclass(frozen=True)
class Heads:
    """The shape of an attention: how many heads of queries and of keys, and how long a key and a value are."""

    query: int
    key_value: int
    key_dim: int
    value_dim: int


class Columns(NamedTuple):
    """What n columns hold, H query heads in G key-value heads: None stands for zeros, and for no gate."""

    key: Tensor | None  # (G, n, key_dim)
    value: Tensor | None  # (G, n, value_dim)
    logit: Tensor | None  # (H, n), added to the scaled product of query and key
    gate: Tensor | None  # (H,), after the tanh
    n: int


def check_bias(kind: Any, start: Any, n: Any, std: Any) -> None:
    """Raises ValueError or TypeError for options that `AttentionBias` has not."""
    check_choice("kind", kind, KINDS)
    check_choice("start", start, STARTS)
    check_integer("n", n, low=1)
    check_number("std", std, low=0.0)


class AttentionBias(nn.Module):
    """The parameters of one attention's columns; called without arguments it returns them as `Columns`.

    Every parameter is a vector: optimizers decay, project and orthogonalise matrices, and these are none.

    Args:
        heads: of the attention.
        kind: "key_value" trains k' and v'; "sink_logits" a logit per query head; "off_by_one" nothing.
        start: "noop" adds the gate, which starts at 0; "random" has none.
        n: how many columns.
        std: of the normal distribution that k', v' and logits start from.

    Raises:
        ValueError, TypeError: an argument is none of these.
    """

    def __init__(
        self,
        heads: Heads,
        kind: str = "key_value",
        start: str = "noop",
        n: int = 1,
        std: float = PAPER_STD,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_bias(kind, start, n, std)
        super().__init__()
        self.heads, self.kind, self.start, self.n = heads, kind, start, n

        def vector(length: int, fill: float | None = None) -> nn.Parameter:
            made = torch.empty(length, device=device, dtype=dtype)
            return nn.Parameter(made.normal_(0.0, std) if fill is None else made.fill_(fill))

        self.key = self.value = self.logit = self.gate = None
        if kind == "key_value":
            self.key = vector(heads.key_value * n * heads.key_dim)
            self.value = vector(heads.key_value * n * heads.value_dim)
        elif kind == "sink_logits":
            self.logit = vector(heads.query * n)
        if start == "noop":
            self.gate = vector(heads.query, 0.0)

    def forward(self, device: torch.device) -> Columns:
        """The columns on a device: copies, which an engine that frees parameters after their use cannot empty."""
        heads, n = self.heads, self.n

        def copied(param: nn.Parameter | None, *shape: int) -> Tensor | None:
            return None if param is None else param.to(device, copy=True).view(shape)

        return Columns(
            key=copied(self.key, heads.key_value, n, heads.key_dim),
            value=copied(self.value, heads.key_value, n, heads.value_dim),
            logit=copied(self.logit, heads.query, n),
            gate=None if self.gate is None else self.gate.to(device).tanh(),
            n=n,
        )

    def extra_repr(self) -> str:
        return f"kind={self.kind}, start={self.start}, n={self.n}, heads={self.heads.query}/{self.heads.key_value}"
