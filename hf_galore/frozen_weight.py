"""The weight that a projected layer keeps frozen: a plain tensor, stored as it is or transposed, or a quantized one.

A quantized layer's class becomes trainable here by an entry in `QUANTIZED`, one that rounds a plain weight and its
input by one in `ROUNDING`, and parameters that an engine keeps in parts show their shapes by one in `WHOLE`.
`hf_galore.register()` makes those of bitsandbytes and DeepSpeed, importing BitLinear its own.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_galore.ops import add_lowrank_
from hf_galore.param_groups import is_conv1d
from hf_galore.rounding import RoundingKey
from hf_galore.shards import local, rows_of


class FrozenWeight(Protocol):
    """W (m, n) of one module, however the module stores it."""

    @property
    def stored(self) -> Tensor:
        """What the backward pass needs to get W: W itself if `decode` is None, else its codes."""

    @property
    def decode(self) -> Callable[[Tensor], Tensor] | None:
        """W (m, n) from its codes; None where `stored` is W."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of W; for a quantized weight that of W before it was quantized, or of what it decodes to."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What the module computes in, whatever its input's dtype; None: in that of its input."""

    @property
    def round_input(self) -> Callable[[Tensor, torch.dtype], Tensor] | None:
        """What the module multiplies with W, in this dtype, for its input; None: the input itself."""

    def add_lowrank_(self, left: Tensor, right: Tensor, *, alpha: float, beta: float, key: RoundingKey | None) -> None:
        """W ← beta·W + alpha·left (m, k) @ right (k, n), in place; rounded stochastically if there is a key.

        Where the rows of W are spread over ranks, `left` has this rank's; where those of a transposed W are, all.
        """


class PlainWeight:
    """A floating-point weight, (m, n), or (n, m) where the module stores it transposed (Conv1D)."""

    decode: Callable[[Tensor], Tensor] | None = None
    compute_dtype = None
    round_input: Callable[[Tensor, torch.dtype], Tensor] | None = None

    def __init__(self, module: nn.Module) -> None:
        self.module, self.transposed = module, is_conv1d(module)
        self._shape = self.master.shape  # an engine may take the weight out of its module between uses

    @property
    def master(self) -> Tensor:
        """W (m, n), as a view where it is stored transposed."""
        weight = self.module.get_parameter("weight").detach()
        return weight.mT if self.transposed else weight

    @property
    def stored(self) -> Tensor:
        return self.master

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self._shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        return self.module.get_parameter("weight").dtype

    def add_lowrank_(self, left: Tensor, right: Tensor, *, alpha: float, beta: float, key: RoundingKey | None) -> None:
        weight = self.module.get_parameter("weight").detach()
        rows = rows_of(weight)
        first = 0 if rows is None else rows.first
        if self.transposed:  # rows and columns as stored: a row is what is contiguous, and what the bits go by
            left, right = right.mT, left.mT
            left = left if rows is None else left[first : first + rows.count]
        add_lowrank_(local(weight), left, right, alpha=alpha, beta=beta, key=key, first_row=first)


# What shows, inside, the parameters of a model in their whole shapes.
WHOLE: list[Callable[[nn.Module], AbstractContextManager[None]]] = []


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter has the shape it has when it is used."""
    with ExitStack() as stack:
        for shown in WHOLE:
            stack.enter_context(shown(model))
        yield


# Quantized module classes → what makes a FrozenWeight of a module.
QUANTIZED: dict[type[nn.Module], Callable[[nn.Module], FrozenWeight]] = {}

# Classes of layers that round their weight and their input → what makes a FrozenWeight of one; also of subclasses.
ROUNDING: dict[type[nn.Module], Callable[[nn.Module], FrozenWeight]] = {}


def rounding(module: nn.Module) -> Callable[[nn.Module], FrozenWeight] | None:
    """The entry of the module's class in `ROUNDING`."""
    return next((ROUNDING[cls] for cls in type(module).__mro__ if cls in ROUNDING), None)


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is a quantized layer that we can train."""
    return type(module) in QUANTIZED and holds_codes(module)


def holds_codes(module: nn.Module) -> bool:
    """Whether this is one of bitsandbytes' linear layers with a quantized weight, trainable by us or not."""
    weight = getattr(module, "weight", None)
    kinds = {cls.__name__ for cls in type(weight).__mro__} & {"Params4bit", "Int8Params"}
    return isinstance(module, nn.Linear) and bool(kinds) and not getattr(weight, "has_fp16_weights", False)


def frozen_weight(module: nn.Module) -> FrozenWeight:
    """The weight of a linear layer."""
    if is_quantized(module):
        return QUANTIZED[type(module)](module)
    return (rounding(module) or PlainWeight)(module)
