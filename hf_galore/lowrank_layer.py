"""One layer of the projected backward: its module, the frozen weight and the small parameter beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_galore.checks import check_boolean, check_choice, check_integer
from hf_galore.frozen_weight import FrozenWeight
from hf_galore.link import HOST, Link, StandIn
from hf_galore.low_rank_options import LOW_RANK_DEFAULTS, check_low_rank
from hf_galore.lowrank_parameters import UPDATE
from hf_galore.lowrank_store import UpdateStorage
from hf_galore.ops import product_dtype
from hf_galore.param_groups import is_conv1d
from hf_galore.projected_linear import ProjectedLinear, TapGradient, dense
from hf_galore.rounding import RoundingKey
from hf_galore.shards import is_sharded, spread, whole
from hf_galore.siblings import SIBLINGS
from hf_galore.sides import Right, resolve_side

if TYPE_CHECKING:
    from hf_galore.lowrank_basis import LayerBasis


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
    moments: str = LOW_RANK_DEFAULTS["moments"]
    subspace: str = LOW_RANK_DEFAULTS["subspace"]
    random_from: int | None = None
    source: str = "gradient"
    basis_dtype: str | None = None
    equal_state: bool = False
    stagger: bool | None = None
    lazy: bool = False
    fold_every: int = 1
    state_dtype: torch.dtype | None = None
    stochastic_rounding: bool = True
    seed: int = 0
    gradient_accumulation_steps: int = 1
    share_inputs: bool | Sequence[Sequence[str]] = False
    offload_masters: bool = False

    def __post_init__(self) -> None:
        if self.stagger is None:
            object.__setattr__(self, "stagger", self.refresh == "streaming")
        check_choice("refresh", self.refresh, ("exact", "streaming"))
        check_choice("proj_type", self.proj_type, ("right", "left", "std"))
        check_low_rank(vars(self))
        for name in ("fold_every", "gradient_accumulation_steps"):
            check_integer(name, getattr(self, name), low=1)
        check_integer("seed", self.seed, low=0)
        if self.source == "moment" and self.refresh != "streaming":
            raise ValueError("source='moment' needs refresh='streaming'")
        check_boolean("offload_masters", self.offload_masters)
        if self.offload_masters and self.refresh != "streaming":
            raise ValueError("offload_masters needs refresh='streaming', which forms no full gradient on the device")
        if self.siblings and (self.refresh != "streaming" or self.proj_type != "right"):
            raise ValueError("share_inputs needs refresh='streaming' and proj_type='right'")

    @property
    def siblings(self) -> Sequence[Sequence[str]]:
        """Names of modules that share one basis where they are siblings."""
        if isinstance(self.share_inputs, bool):
            return SIBLINGS if self.share_inputs else ()
        return self.share_inputs


class LowRankLayer:
    """One target: its module, the frozen weight W, the small parameter B, and the basis it is projected with.

    For a transposed weight (Conv1D) everything is that of W as nn.Linear would store it, (out_features, in_features).
    """

    def __init__(self, module: nn.Module, weight: FrozenWeight, rank: int, index: int, settings: Settings) -> None:
        self.modules = [module]  # more than one where modules share W
        self.weight, self.rank, self.index, self.settings = weight, rank, index, settings
        self.transposed = is_conv1d(module)
        m, n = weight.shape
        self.side = resolve_side(settings.proj_type, (m, n))
        self.right = isinstance(self.side, Right)
        self.work = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.decay, self.pending = 1.0, False
        self.full: Tensor | None = None  # G, in an exact refresh
        self.uses = 0  # forward passes through it in the step of a refresh
        shape = (m, self.rank) if self.right else (self.rank, n)
        device = HOST if settings.offload_masters else self.weight.stored.device
        self.own_update = nn.Parameter(torch.zeros(shape, dtype=self.weight.dtype, device=device))
        self.link: Link | None = None  # to the device that computes, where W and B are in host memory
        self.storage = UpdateStorage()
        self.attached = False  # to an optimizer, whose steps wake B and fold it
        self.basis: LayerBasis  # it sets both of these
        self.test_matrix: Tensor | None  # U, its rows of the basis's orthonormal test matrix; None if no sketch is due
        self._listen()

    def with_pending(self, weight: Tensor) -> Tensor:
        """decay·W + scale·back(B), for W in floating point (m, n); W itself where nothing is pending."""
        if not self.pending:
            return weight
        left, right = self.side.factors(
            whole(self.update.detach()).to(weight.dtype), self.basis.matrix.to(weight.dtype)
        )
        return torch.addmm(weight, left, right, beta=self.decay, alpha=self.settings.scale)

    def _listen(self) -> None:
        self.own_update.register_post_accumulate_grad_hook(lambda _: self.basis.gradient_added(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies: torch copies a parameter without its hooks."""
        self.__dict__.update(state)
        self._listen()

    @property
    def module(self) -> nn.Module:
        """The first of its modules."""
        return self.modules[0]

    @property
    def update(self) -> nn.Parameter:
        """B as its module has it, where an engine may have put another in its place; `own_update` outside a model."""
        update: nn.Parameter | None = self.module._parameters.get(UPDATE)
        return self.own_update if update is None else update

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """What stands in for the module's forward."""
        if self.basis.tapping and module.training and not torch.compiler.is_compiling():
            self.uses += torch._C._current_graph_task_id() == -1  # what a backward pass computes again is no new use
        bias: Any = module.bias
        device, dtype = x.device.type, x.dtype
        back = None  # the dtype of y, where that is not the one it is computed in
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        elif self.weight.compute_dtype is not None:
            dtype, back = self.weight.compute_dtype, dtype
        given, round_input = x, self.weight.round_input
        x = x.to(dtype) if round_input is None else round_input(x, dtype)
        bias = None if bias is None else bias.to(dtype)
        weight, decode = self.weight.stored, self.weight.decode
        pending = self.pending and round_input is None  # what is rounded is rounded with B in it
        if not (torch.is_grad_enabled() or pending):
            y = nn.functional.linear(x, dense(weight, decode, dtype), bias)
            return y if back is None else y.to(back)
        product = product_dtype(x.dtype, x.device) if device == "cpu" else x.dtype
        basis = self.basis.on(x.device, self.link).to(product)
        kept = self.basis.project(given, x, basis) if self.right else x.detach()
        numbers = (self.right, self.decay, self.settings.scale, pending)
        update = self.update if self.link is None else StandIn.apply(self.update, self.link)
        y = ProjectedLinear.apply(x, weight, decode, bias, update, kept, basis, *numbers)
        if self.basis.tapping and y.requires_grad:
            y = TapGradient.apply(y, x.detach(), self._receive)
        return y if back is None else y.to(back)

    def _receive(self, x: Tensor, gy: Tensor) -> None:
        self.basis.receive(self, x, gy)

    def fold(self) -> None:
        """W ← decay·W + scale·back(B), B ← 0."""
        if self.pending:
            self._add(self.storage.read(self), self.decay, self.basis.steps)
            self.drop()

    def write_back(self, delta: Tensor, beta: float) -> None:
        """W ← beta·W + scale·back(delta): a step and its fold at once, with B left at zero. During the step."""
        self._add(delta, beta, self.basis.steps + 1)

    def _add(self, delta: Tensor, beta: float, step: int) -> None:
        if self.transposed and is_sharded(self.update):  # its rows are the columns of what is stored by rows
            delta = whole(spread(delta, self.update))
        left, right = self.side.factors(delta, self.basis.matrix.to(self.work))
        key = RoundingKey(self.settings.seed, step, self.index) if self.settings.stochastic_rounding else None
        self.weight.add_lowrank_(left, right, alpha=self.settings.scale, beta=beta, key=key)

    def fold_first(self, *_: Any) -> None:
        """`fold` as a hook."""
        self.fold()

    def drop(self, *_: Any) -> None:
        """Forgets what is pending: B ← 0. Also as a hook, where another W is about to be loaded."""
        self.storage.clear(self)
        self.decay, self.pending = 1.0, False
        self.rest()

    def rest(self) -> None:
        """Gives up the storage of B, which is zero from one step to the next: one element stands for all.

        Not where nobody would wake it, nor where it is pending between folds, nor among several ranks, whose engines
        write to every parameter.
        """
        if self.attached and self.settings.fold_every == 1 and data_parallel_ranks() is None:
            self.update.data = self.update.new_zeros(()).expand(self.update.shape)

    def leave_original(self) -> None:
        """Gives up the storage of the B that an engine has put another one in the place of."""
        if self.update is not self.own_update:
            self.own_update.data = self.own_update.new_zeros(()).expand(self.own_update.shape)

    def wake(self) -> nn.Parameter:
        """B with storage of its own, for a step to write to."""
        if not self.update.is_contiguous():
            self.update.data = torch.zeros_like(self.update, memory_format=torch.contiguous_format)
        return self.update


def data_parallel_ranks() -> dist.ProcessGroup | None:
    """The processes that this one trains with, all that there are; None if it is alone."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None
