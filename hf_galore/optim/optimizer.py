"""The shell that all GaLore optimizers share: parameter groups, projection, basis refresh, write-back, state dicts.

A subclass adds one rule: which moments it keeps, and the update they give. The rule sees a gradient, low-rank or full,
and knows nothing of bases, dtypes or state formats; those are chosen here, each once.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from hf_galore import resume
from hf_galore.checks import check_boolean, check_integer, check_number
from hf_galore.low_rank_options import LOW_RANK_DEFAULTS, check_low_rank, check_spread_batch, side_of_rows
from hf_galore.messages import no_average_of_gradients, only, std_is
from hf_galore.ops import BLOCK_ELEMENTS, add_, add_lowrank_, product_dtype, scale_
from hf_galore.optim.blockwise import BLOCK as QUANTIZATION_BLOCK
from hf_galore.optim.matrix import LowRankMatrix, working_dtype
from hf_galore.optim.moments import Float, MomentFormat, State
from hf_galore.optim.refreshing import Group, Member, refresh_bases
from hf_galore.rounding import RoundingKey, mix64
from hf_galore.schedule import offset
from hf_galore.shards import is_sharded, local, rows_of, spread
from hf_galore.sides import resolve_side
from hf_galore.statistics import Observer

Formats = dict[str, tuple[torch.Size, MomentFormat]]  # shape and format of each moment

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LowRankOptimizer(torch.optim.Optimizer):
    """Steps matrices in low-rank coordinates where their group has a `rank`, and everything else at full rank.

    For W (m, n) with gradient G in a group with `rank` (GaLore, arXiv 2403.03507; see `hf_galore.subspace` for the
    sides):

        every `update_proj_gap` steps:  basis from G
        R = project(G);  N = rule(R);  W ← (1 − lr·weight_decay)·W − lr·scale·back(N)

    Group keys, as in galore-torch: `rank` (projected if present), `update_proj_gap`, `scale`, `proj_type` (std,
    reverse_std, right, left, full). Ours, for groups with a rank:

        transposed    True where weights are stored as (in_features, out_features): `proj_type` always means that of
                      nn.Linear. `galore_param_groups` sets it for GPT-2's Conv1D and the experts of gpt-oss
        subspace      randomized (default), svd (the paper), gram, random, late_random: how a basis is made
                      (`hf_galore.bases`)
        random_from   the step from which `late_random` takes random bases
        moments       at a refresh: rotate (default; LDAdam's formulas), keep (the paper), align (keep, with the new
                      basis's signs as the old one's), reset (to zero, bias corrections included)
        source        what a basis is made of: gradient (the paper), or moment, the first moment as the gradient would
                      change it, (1 − β1)·G + β1·back(M)
        basis_dtype   how it is kept (`hf_galore.basis_store`): float32, bfloat16, int8, int4; None is as `state_dtype`
                      says, and a random basis as its seed
        equal_state   wide matrices on the right get the rank whose state is that of std (`hf_galore.sides.rank_of`)
        stagger       matrix i of L in its group refreshes i·T/L steps early, so that no step pays for all
        lazy          matrices whose basis hardly turns refresh less often (`hf_galore.schedule`)

    and for all: `state_dtype` (None: float32, and float64 for float64 parameters; or bfloat16), `stochastic_rounding`
    (of bfloat16 weights and states), `seed`. State of a parameter, created at its first step: `step`, the rule's
    moments, `basis` (with `basis_scale`, or `basis_seed` alone), and where they are asked for `refresh_schedule` and
    `reset_step`. Tensors only. Where `observe` is set, it is called with the parameter and the `SubspaceStatistics` of
    each refresh.

    Parameters may be DTensors whose rows are spread over ranks (FSDP2; `hf_galore.shards`): moments are then spread
    alike, a step communicates nothing, and matrices are projected on the right: `std` becomes `right`. A refresh
    brings each gradient together at one rank of several and hands out the basis (`hf_galore.optim.refreshing`).

    Raises:
        ValueError: a hyper-parameter is out of range or does not go with spread parameters, or a vector is in a group
            with `rank`.
        TypeError: a hyper-parameter has the wrong type.
        RuntimeError: a gradient is sparse.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._refresh_seconds = 0.0
        self._warned: set[str] = set()
        self.observe: Observer | None = None
        # Ranks whose parameters and gradients are the same (DDP): they divide the refreshes among them.
        self.replicas: dist.ProcessGroup | None = None
        # What takes the step (delta, in working precision) and the decay of a parameter in the parameter's place.
        self.write_backs: dict[Tensor, Callable[[Tensor, float], None]] = {}
        super().__init__(params, defaults)

    # What a rule defines.

    elementwise = False  # whether `update_` may be given a part of the rows of a parameter at a time

    def moment_shapes(self, shape: torch.Size, group: Group) -> dict[str, torch.Size]:
        """Names and shapes of the moments the rule keeps for a gradient of this shape."""
        raise NotImplementedError

    def rate(self, group: Group, step: int, param: Tensor) -> float:
        """The learning rate of a step, which is also that of the weight decay; `step` counts from 1."""
        return float(group["lr"])

    def update_(
        self, target: Tensor, grad: Tensor, moments: Mapping[str, Tensor], group: Group, step: int, lr: float
    ) -> None:
        """target ← target − lr·N, in place, and the moments with it; everything in the gradient's coordinates.

        All tensors are contiguous and in working precision; `lr` is what `rate` gave.
        """
        raise NotImplementedError

    def momentum(self, group: Group) -> float | None:
        """The decay rate of `exp_avg`, if that is an average of gradients."""
        return None

    def moment_format(
        self, name: str, shape: torch.Size, group: Group, work: torch.dtype, by_rows: bool = False
    ) -> MomentFormat:
        """How the named moment is kept between steps; `by_rows` where its rows are to be spread over ranks."""
        return Float(group["state_dtype"] or work, work)

    def check_group(self, group: Group) -> None:
        """Raises ValueError or TypeError for hyper-parameters of the rule that make no sense."""

    # What torch.optim.Optimizer asks for.

    @property
    def refresh_seconds(self) -> float:
        """Seconds spent in basis refreshes since this object was made."""
        return self._refresh_seconds

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("rank") is not None:
            param_group = {**LOW_RANK_DEFAULTS, **param_group}
        group = {**self.defaults, **param_group}
        if not isinstance(group["state_dtype"], torch.dtype | None):
            param_group = {**param_group, "state_dtype": STATE_DTYPES.get(group["state_dtype"], group["state_dtype"])}
            group.update(param_group)
        _check_common(group)
        self.check_group(group)
        if group.get("rank") is not None and group["source"] == "moment" and self.momentum(group) is None:
            raise ValueError(no_average_of_gradients(self))
        super().add_param_group(param_group)
        try:
            _check_params(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_refresh_seconds", 0.0)
        self.__dict__.setdefault("_warned", set())
        self.__dict__.setdefault("observe", None)
        self.__dict__.setdefault("replicas", None)
        self.__dict__.setdefault("write_backs", {})
        for group in self.param_groups:  # a state dict of an older version may lack keys that came later
            for key, value in (self.defaults | (LOW_RANK_DEFAULTS if group.get("rank") is not None else {})).items():
                group.setdefault(key, value)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict as torch does, but leaves every state tensor in the dtype it was saved in.

        torch casts floating-point state to the parameter's dtype, and 8-bit codes to floats; both would change the
        run. Hyper-parameters are those of the state dict, as ever, but for the options of projection, rounding and
        seed that only later steps depend on (`hf_galore.resume.FREE`): of these this optimizer's stay, with one
        warning that names those that have changed.

        Raises:
            ValueError: the state was written by galore-torch or by another class of ours, with options that it does
                not fit now, or its groups do not fit. Nothing has been loaded then.
        """
        seal = self.register_load_state_dict_pre_hook(_seal)
        unseal = self.register_load_state_dict_post_hook(_unseal, prepend=True)
        transposed = [group.get("transposed") for group in self.param_groups]  # what weights are, not an option
        try:
            super().load_state_dict(state_dict)
        finally:
            seal.remove()
            unseal.remove()
        for group, is_so in zip(self.param_groups, transposed, strict=True):
            group.update({"transposed": True} if is_so else {})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step on every parameter with a gradient; `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [param.grad for group in self.param_groups for param in group["params"]]
        if any(grad is not None and grad.is_sparse for grad in gradients):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        stepping = list(self._stepping())
        self._refresh_seconds += refresh_bases(self, [member for *_, member in stepping if member is not None])
        together: Together = {}
        for param, group, number, member in stepping:
            self._step_one(param, group, number, member, together)
        for call, matrices in together.items():
            call(matrices)
        return loss

    def _stepping(self) -> Iterator[tuple[Tensor, Group, int, Member | None]]:
        """The parameters with a gradient: each with its group, its number among all, and as a matrix to project."""
        number = 0
        for group in self.param_groups:
            count = len(group["params"])
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.numel() > 0:
                    state, member, rows = self.state[param], None, rows_of(param)
                    if rows is not None:
                        self._fit_to_rows(param, group)
                    if group.get("rank") is not None:
                        early = offset(index, count, group["update_proj_gap"], group["stagger"])
                        member = Member(LowRankMatrix(param, group), group, state, number, early, rows)
                    yield param, group, number, member
                number += 1

    def _fit_to_rows(self, param: Tensor, group: Group) -> None:
        """Makes sure that a rank can step its rows of a parameter alone.

        Raises:
            ValueError: it cannot.
        """
        if not self.elementwise:
            name = type(self).__name__
            raise ValueError(f"{name} cannot step parameters that are spread over ranks; use GaLoreAdamW")
        if group.get("rank") is None:
            return
        if param.dim() > 2:
            check_spread_batch(group)
        elif group["proj_type"] == "std":
            group["proj_type"] = side_of_rows(group)
            self.warn(std_is(group["proj_type"]))
        elif group["proj_type"] != side_of_rows(group):
            raise ValueError(only(side_of_rows(group), group["proj_type"]))

    # The step of one parameter, in the order of the paper.

    def _step_one(self, param: Tensor, group: Group, number: int, member: Member | None, together: "Together") -> None:
        """Steps parameter `number` (counted over all groups), which is `member` if it is projected."""
        grad, weight, first_row_of = local(param.grad), local(param), _first_row(param)
        state = self.state[param]
        work = working_dtype(param)
        done = int(state.get("step", 0))
        key = RoundingKey(group["seed"], done, number) if group["stochastic_rounding"] else None
        formats = self.formats_of(param, group)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            if group.get("moments") == "reset":  # the names of a state do not change from step to step
                state["reset_step"] = torch.zeros((), dtype=torch.float32)
            self._create_moments(param, formats)
        state["step"] += 1
        if weight.numel() == 0:  # all rows are on other ranks
            return
        lr = self.rate(group, done + 1, param)
        beta = 1.0 - lr * group["weight_decay"]
        step = Step(group, formats, done + 1 - int(state.get("reset_step", 0)), lr, number, key)
        here = self._here(param)
        if member is not None:
            self.step_low_rank_(weight, grad, here, member.matrix, step, beta, first_row_of, together)
        elif param in self.write_backs:
            delta = torch.zeros(grad.shape, dtype=work, device=param.device)
            self.step_full_(delta, grad, here, step, 1.0, first_row_of(delta))
            self.write_backs[param](delta, beta)
        else:
            for rows, of_grad, of_state, start in self._blocks(weight, grad, here, formats):
                self.step_full_(rows, of_grad, of_state, step, beta, first_row_of(weight) + start)

    def step_full_(
        self, target: Tensor, grad: Tensor, state: State, step: "Step", decay: float, first_row: int
    ) -> None:
        """target ← decay·target − lr·N, rounded as the target is, and the moments in `state`; all of one shape."""
        work = working_dtype(target)
        if target.dtype == work and target.is_contiguous():
            self._update(scale_(target, decay), grad, state, step, first_row)
        else:
            delta = torch.zeros(grad.shape, dtype=work, device=target.device)
            self._update(delta, grad, state, step, first_row)
            add_(target, delta, alpha=1.0, beta=decay, key=step.key, first_row=first_row)

    def step_low_rank_(
        self,
        weight: Tensor,
        grad: Tensor,
        state: State,
        matrix: LowRankMatrix,
        step: "Step",
        decay: float,
        first_row_of: Callable[[Tensor], int],
        together: "Together",
    ) -> None:
        """weight ← decay·weight − lr·scale·back(N), and the moments in `state`; or puts it into `together`."""
        work, basis = working_dtype(weight), matrix.basis(state)
        assert basis is not None
        low = matrix.side.project(grad, basis.to(product_dtype(grad.dtype, grad.device)))
        delta = torch.zeros(low.shape, dtype=work, device=weight.device)
        self.step_full_(delta, low, state, step, 1.0, first_row_of(delta))
        left, right = matrix.side.factors(delta, basis.to(work))
        row = first_row_of(weight)
        add_lowrank_(weight, left, right, alpha=step.group["scale"], beta=decay, key=step.key, first_row=row)

    def _update(self, target: Tensor, grad: Tensor, state: State, step: "Step", first_row: int = 0) -> None:
        """`update_` with the moments read from the state and written back."""
        moments = {name: kept.read(state, name) for name, (_, kept) in step.formats.items()}
        self.update_(target, grad.to(target.dtype).contiguous(), moments, step.group, step.number, step.lr)
        for index, (name, (_, kept)) in enumerate(step.formats.items(), start=1):
            key = step.key and step.key._replace(parameter=mix64(step.parameter, index))
            kept.write(state, name, moments[name], key, first_row)

    def _blocks(
        self, param: Tensor, grad: Tensor, state: State, formats: Formats
    ) -> Iterator[tuple[Tensor, Tensor, State, int]]:
        """(rows of the parameter, of its gradient, of its state, how many are before them) for a full-rank step.

        Where something is kept in another precision than the working one, a rule that works element by element takes a
        block of rows after the other: no copy is as large as the parameter then.
        """
        work = working_dtype(param)
        copies = param.dtype != work or any(kept.dtype != work for _, kept in formats.values())
        dense = param.is_contiguous() and grad.is_contiguous()
        if not (copies and dense and self.elementwise and param.dim() >= 2):
            yield param, grad, state, 0
            return
        width = param.shape[-1]
        height = param.numel() // width
        unit = QUANTIZATION_BLOCK // math.gcd(QUANTIZATION_BLOCK, width)  # rows that hold whole blocks
        step = max(1, BLOCK_ELEMENTS // width // unit) * unit
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            part: State = {}
            for name, (_, kept) in formats.items():
                part.update(kept.rows(state, name, rows, width))
            yield param.view(height, width)[rows], grad.view(height, width)[rows], part, start

    def formats_of(self, param: Tensor, group: Group) -> Formats:
        """Shape and format of each moment of a parameter, wherever its rows are."""
        is_projected = group.get("rank") is not None
        shape = LowRankMatrix(param, group).low_rank_shape if is_projected else param.shape
        work, by_rows = working_dtype(param), is_sharded(param)
        return {
            name: (moment, self.moment_format(name, moment, group, work, by_rows))
            for name, moment in self.moment_shapes(shape, group).items()
        }

    def _create_moments(self, param: Tensor, formats: Formats) -> None:
        made: State = {}
        rows = rows_of(param)
        for name, (shape, kept) in formats.items():
            here = shape if rows is None else torch.Size((rows.count, *shape[1:]))
            kept.create(made, name, here, param.device)
        self.state[param].update(made if rows is None else {name: spread(made[name], param) for name in made})

    def _here(self, param: Tensor) -> State:
        """The state of a parameter, with this rank's rows of what is spread over ranks."""
        state: State = self.state[param]
        return {name: local(value) for name, value in state.items()} if is_sharded(param) else state

    def change_moments(self, param: Tensor, group: Group, change: Callable[[dict[str, Tensor]], None]) -> None:
        """Lets `change` alter the moments of a parameter in place, in working precision, whatever they are kept in."""
        moments = self.read_moments(param, group)
        change(moments)
        here = self._here(param)
        for name, (_, kept) in self.formats_of(param, group).items():
            kept.write(here, name, moments[name], None)

    def read_moments(self, param: Tensor, group: Group) -> dict[str, Tensor]:
        """The moments of a parameter in working precision; this rank's rows of them."""
        here = self._here(param)
        return {name: kept.read(here, name) for name, (_, kept) in self.formats_of(param, group).items()}

    def reset_moments(self, param: Tensor, group: Group) -> None:
        """Makes the moments of a parameter zero, and lets their bias corrections start again."""
        self._create_moments(param, self.formats_of(param, group))
        self.state[param]["reset_step"] = self.state[param]["step"].clone()

    def warn(self, message: str) -> None:
        """Warns once for each kind of message (its first words)."""
        warn_once(self._warned, type(self).__name__, message)


def _first_row(param: Tensor) -> Callable[[Tensor], int]:
    """The number that the first row of a tensor has whose dimension 0 is spread over ranks as the parameter's is."""
    rows = rows_of(param)
    return lambda tensor: 0 if rows is None else rows.first * math.prod(tensor.shape[1:-1])


def warn_once(seen: set[str], owner: str, message: str) -> None:
    """Warns once for each kind of message (its first words), not once for each parameter and step."""
    kind = message[:40]
    if kind not in seen:
        seen.add(kind)
        warnings.warn(f"{owner}: {message}. Further cases are not reported", stacklevel=3)


# Steps that are put off and taken by one call for all that it goes for, with what it needs of each.
Together = dict[Callable[[list[Any]], None], list[Any]]


@dataclass(frozen=True)
class Step:
    """What a step of one parameter depends on besides its tensors."""

    group: Group
    formats: Formats
    number: int  # counts from 1
    lr: float
    parameter: int
    key: RoundingKey | None


GALORE_TORCH_STATE = (
    "this optimizer state was written by galore-torch, whose projector objects cannot be read safely. Start from the "
    "checkpoint's weights instead: load the checkpoint folder as the model and train without resume_from_checkpoint, "
    "or delete its optimizer.pt and scheduler.pt (the moments start again from zero)"
)


_READ_BY_THE_HOST = ("basis_seed", "refresh_schedule", "reset_step")  # beside `step`: small, and never on a device


class _Sealed:
    """A tensor that torch's load_state_dict passes on as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _seal(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with its tensors sealed, once it is clear that this optimizer can go on from it."""
    assert isinstance(optimizer, LowRankOptimizer)
    states = {index: state for index, state in state_dict["state"].items() if isinstance(state, dict)}
    if any("projector" in state for state in states.values()):
        raise ValueError(GALORE_TORCH_STATE)
    resume.check_groups(optimizer.param_groups, state_dict["param_groups"])
    if resume.sizes(optimizer.param_groups) != resume.sizes(state_dict["param_groups"]):
        return state_dict  # torch says so
    groups: list[Group] = []
    found: dict[str, str] = {}
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        ours = _as_spread(group)
        found |= resume.changes(ours, saved)
        groups.append({**saved, **{name: ours[name] for name in resume.OURS if name in ours}})
        for param, index in zip(group["params"], saved["params"], strict=True):
            if states.get(index):
                states[index] = _fitting(optimizer, param, {**group, **groups[-1]}, saved, states[index])
    resume.tell(found)
    sealed = {
        index: {name: _Sealed(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        for index, state in states.items()
    }
    return {**state_dict, "state": {**state_dict["state"], **sealed}, "param_groups": groups}


_OTHER_SIDE = (
    " (in older states proj_type meant the other side for weights that are stored transposed, such as those of Conv1D)"
)


def _as_spread(group: Group) -> Group:
    """The group as its first step makes it, where rows are spread over ranks."""
    is_std = group.get("proj_type") == "std" and any(is_sharded(param) for param in group["params"])
    return {**group, "proj_type": side_of_rows(group)} if is_std else group


def _fitting(
    optimizer: LowRankOptimizer, param: Tensor, group: Group, saved: Group, state: dict[str, Any]
) -> dict[str, Any]:
    """A parameter's saved state, for a group as it goes on.

    Raises:
        ValueError: it is not one of this optimizer, or not one of this parameter.
    """
    for name, (shape, kept) in optimizer.formats_of(param, group).items():
        moment = state.get(name)
        if not isinstance(moment, Tensor):
            owner = type(optimizer).__name__
            raise resume.refused(f"the state has no {name}, which {owner} keeps: another optim wrote it")
        if (moment.dtype == torch.uint8) != (kept.dtype == torch.uint8):
            raise resume.refused(
                f"{name} was saved as {moment.dtype}, and {type(optimizer).__name__} keeps it as {kept.dtype}: load "
                "this state into the optimizer class that wrote it"
            )
        if moment.shape != shape:
            raise resume.refused(
                f"{name} was saved with shape {tuple(moment.shape)} for a parameter of shape {tuple(param.shape)}, "
                f"and this run's has shape {tuple(shape)}{_OTHER_SIDE if group.get('transposed') else ''}"
            )
    return resume.with_schedule(state, group, saved) if group.get("rank") is not None else state


def _unseal(optimizer: torch.optim.Optimizer) -> None:
    for param, state in optimizer.state.items():
        for name, value in state.items() if isinstance(state, dict) else ():
            if name == "step":
                state[name] = torch.as_tensor(value.tensor if isinstance(value, _Sealed) else value).float().cpu()
            elif isinstance(value, _Sealed) and name in _READ_BY_THE_HOST:
                state[name] = value.tensor.cpu()
            elif isinstance(value, _Sealed):
                state[name] = value.tensor.to(param.device).contiguous()


def _check_params(group: Group) -> None:
    for param in group["params"]:
        if param.is_complex():
            raise ValueError("complex parameters are not supported")
        if group.get("rank") is not None:
            resolve_side(group["proj_type"], param.shape)


def _check_common(group: Group) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if lr is not None:
        check_number("learning rate", lr, low=0.0)
    check_number("weight_decay", group["weight_decay"], low=0.0)
    if group["state_dtype"] not in (None, torch.float64, *STATE_DTYPES.values()):
        raise ValueError(f"state_dtype={group['state_dtype']!r} is not one of None, {', '.join(STATE_DTYPES)}")
    check_boolean("stochastic_rounding", group["stochastic_rounding"])
    check_integer("seed", group["seed"], low=0)
    if group.get("rank") is not None:
        check_low_rank(group)
