"""One layer of the projected backward: its frozen weight, the small parameter beside it, its basis and its refresh."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_galore.ops import add_lowrank_
from hf_galore.optim.optimizer import check_integer, check_number
from hf_galore.param_groups import is_conv1d
from hf_galore.projected_linear import ProjectedLinear, TapGradient
from hf_galore.rounding import RoundingKey, mix64
from hf_galore.subspace import SUBSPACES, Left, Right, Side, refresh, resolve_side, svd

UPDATE = "lowrank_update"  # the name of B among its module's parameters; never in a state dict


@dataclass(frozen=True)
class Settings:
    """How a model is trained with the projected backward; the arguments of `hf_galore.lowrank_backward.enable`.

    Raises:
        ValueError: an option is out of range, with the valid choices.
    """

    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "right"
    refresh: str = "streaming"
    moments: str | None = None
    subspace: str = "svd"
    fold_every: int = 1
    stagger: bool = False
    state_dtype: torch.dtype | None = None
    stochastic_rounding: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.moments is None:
            object.__setattr__(self, "moments", "keep" if self.refresh == "exact" else "rotate")
        choices = {
            "refresh": ("exact", "streaming"),
            "moments": ("keep", "rotate"),
            "subspace": tuple(SUBSPACES),
            "proj_type": ("right", "left", "std"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(valid)}")
        for name in ("rank", "update_proj_gap", "fold_every"):
            check_integer(name, getattr(self, name), low=1)
        check_integer("seed", self.seed, low=0)
        check_number("scale", self.scale, low=0.0)


class Steering(Protocol):
    """What a layer asks of the engine it belongs to."""

    settings: Settings
    gradients_complete: Callable[[], bool]

    def warn(self, message: str) -> None:
        """Warns of a refresh that could not give what was asked for, once for each kind of message."""

    @property
    def count(self) -> int:
        """The number of layers."""


class LowRankLayer:
    """One target: its module, the frozen weight W, the small parameter B, and the basis in force.

    For a transposed weight (Conv1D) everything is that of W as nn.Linear would store it, (out_features, in_features).
    """

    def __init__(self, module: nn.Module, index: int, engine: Steering) -> None:
        self.modules = [module]  # more than one where modules share W
        self.index, self.engine, self.settings = index, engine, engine.settings
        settings = self.settings
        self.transposed = is_conv1d(module)
        m, n = self.weight.shape
        self.side = resolve_side(settings.proj_type, (m, n))
        self.right = isinstance(self.side, Right)
        self.rank = min(settings.rank, m, n)
        self.work = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.steps, self.decay, self.pending, self.tapping = 0, 1.0, False, True
        self.full: Tensor | None = None  # G, in an exact refresh
        self.sketch: Tensor | None = None  # Z, in a streaming one
        self.candidate: Tensor | None = None  # the basis that the next step adopts
        self._pass = -1  # the backward pass that added last
        shape = (m, self.rank) if self.right else (self.rank, n)
        self.update = nn.Parameter(self.weight.new_zeros(shape))
        self._listen()
        self.basis = self._random(n if self.right else m)
        self.test_matrix = self._random(m if self.right else n)  # U

    def _listen(self) -> None:
        self.update.register_post_accumulate_grad_hook(lambda _: self._received())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies: torch copies a parameter without its hooks."""
        self.__dict__.update(state)
        self._listen()

    @property
    def module(self) -> nn.Module:
        """The first of its modules."""
        return self.modules[0]

    @property
    def weight(self) -> Tensor:
        """W (m, n)."""
        return self.stored_weight.mT if self.transposed else self.stored_weight

    @property
    def stored_weight(self) -> Tensor:
        """The weight as its module has it."""
        return self.modules[0].get_parameter("weight").detach()

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """What stands in for the module's forward."""
        bias: Any = module.bias
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if bias is not None:
            bias = bias.to(x.dtype)
        if not (torch.is_grad_enabled() or self.pending):
            return nn.functional.linear(x, self.weight.to(x.dtype), bias)
        basis = self.basis.to(device=x.device, dtype=x.dtype)
        numbers = (self.right, self.decay, self.settings.scale, self.pending)
        y: Tensor = ProjectedLinear.apply(x, self.weight, bias, self.update, basis, *numbers)
        if self.tapping and y.requires_grad:
            y = TapGradient.apply(y, x.detach(), self._receive)
        return y

    def due(self) -> bool:
        """Whether the step after `steps` steps is a refresh."""
        gap = self.settings.update_proj_gap
        offset = self.index * gap // self.engine.count if self.settings.stagger else 0
        return self.steps == 0 or (self.steps + offset) % gap == 0

    def fold(self) -> None:
        """W ← decay·W + scale·back(B), B ← 0."""
        if not self.pending:
            return
        left, right = self.side.factors(self.update.detach().to(self.work), self.basis.to(self.work))
        if self.transposed:
            left, right = right.mT, left.mT
        key = RoundingKey(self.settings.seed, self.steps, self.index) if self.settings.stochastic_rounding else None
        add_lowrank_(self.stored_weight, left, right, alpha=self.settings.scale, beta=self.decay, key=key)
        with torch.no_grad():
            self.update.zero_()
        self.decay, self.pending = 1.0, False

    def forget(self) -> None:
        """Drops what a step in progress has gathered."""
        self.full = self.sketch = self.candidate = None

    def replaced(self, *_: Any) -> None:
        """Before W is loaded: what is pending belongs to the old one."""
        with torch.no_grad():
            self.update.zero_()
        self.decay, self.pending = 1.0, False

    def fold_first(self, *_: Any) -> None:
        """`fold` as a hook."""
        self.fold()

    # The data of a refresh.

    def _receive(self, x: Tensor, gy: Tensor) -> None:
        """Adds one use of the layer in the backward pass, x (tokens, n) and gy (tokens, m), to G or to Z."""
        grad, this_pass = self.update.grad, torch._C._current_graph_task_id()
        if this_pass != self._pass and (grad is None or not grad.any()):
            self.full = self.sketch = None  # gradients that were thrown away, or a pass that failed, left something
        self._pass = this_pass
        if self.settings.refresh == "exact":
            grad = (gy.mT @ x).to(self.update.dtype)
            self.full = grad if self.full is None else self.full.add_(grad)
        else:
            test = self.test_matrix.to(device=x.device, dtype=x.dtype)
            part = (x.mT @ (gy @ test) if self.right else gy.mT @ (x @ test)).to(self.work)
            self.sketch = part if self.sketch is None else self.sketch.add_(part)

    def _received(self) -> None:
        """After a backward pass has added to B's gradient: an exact refresh puts G in the new coordinates there."""
        if self.full is not None and self.engine.gradients_complete():
            # As the optimizer path takes it, from the gradient as stored: the signs of an SVD depend on that.
            stored_side = {False: self.side, True: Left() if self.right else Right()}[self.transposed]
            self.candidate = self._new_basis(self.full.mT if self.transposed else self.full, stored_side)
            assert self.update.grad is not None
            self.update.grad.copy_(self.side.project(self.full, self.candidate.to(self.full.dtype)))

    def finish_sketch(self) -> None:
        """The basis for the next step from Z, summed over the ranks of a process group: its left singular vectors."""
        if self.tapping and self.settings.refresh == "streaming" and _several_ranks():
            if self.sketch is None:  # a layer without tokens on this rank
                self.sketch = self.basis.new_zeros(self.basis.shape, dtype=self.work)
            dist.all_reduce(self.sketch)
        if self.sketch is not None:
            self.candidate = self._new_basis(self.sketch, Left())
            self.sketch = None

    def aim(self, moment: Tensor) -> None:
        """Takes U for the next refresh from a first moment or a low-rank gradient, (m, r) or (r, n)."""
        rows = moment.detach().to(self.work)
        rows = rows if self.right else rows.mT
        self.test_matrix = refresh(rows, self.rank, Left(), svd, None, self._seed(1))[0]

    def _new_basis(self, matrix: Tensor, side: Side) -> Tensor:
        method = SUBSPACES[self.settings.subspace]
        basis, reason = refresh(matrix, self.rank, side, method, self.basis, self._seed(2))
        if reason is not None:
            shape, step = tuple(self.stored_weight.shape), self.steps
            self.engine.warn(
                f"a basis refresh found that {reason} (parameter of shape {shape}, step {step}): keeping the old basis"
            )
        return basis.to(self.settings.state_dtype or self.work)

    def _random(self, size: int) -> Tensor:
        zero = torch.zeros(size, self.rank, dtype=self.work, device=self.weight.device)
        return refresh(zero, self.rank, Left(), svd, None, self._seed(0, size))[0]

    def _seed(self, *purpose: int) -> int:
        return mix64(self.settings.seed, self.index, self.steps, *purpose) >> 1


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
