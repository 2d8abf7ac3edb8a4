"""The refreshes of the optimizer path: which matrices are due, those of one shape at once, what moves with them."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_galore import schedule
from hf_galore.bases import BasisMethod, method_at, random, svd
from hf_galore.messages import clamped_rank, unfit_gradient
from hf_galore.optim.matrix import LowRankMatrix, working_dtype
from hf_galore.optim.moments import bias_corrections
from hf_galore.rounding import mix64
from hf_galore.shards import Rows, local
from hf_galore.sides import project_back
from hf_galore.statistics import Observer, shared, statistics_of
from hf_galore.subspace import align, refresh, rotate
from hf_galore.teamwork import divide

Group = dict[str, Any]
State = dict[str, Any]

# Elements of the gradients that are stacked for one call. On a CPU, where a call costs little, only small ones.
_STACKED = {"cpu": 1 << 20}
_STACKED_ELSEWHERE = 1 << 24


class Owner(Protocol):
    """What a refresh asks of the optimizer."""

    observe: Observer | None
    replicas: dist.ProcessGroup | None

    def momentum(self, group: Group) -> float | None: ...

    def read_moments(self, param: Tensor, group: Group) -> dict[str, Tensor]: ...

    def change_moments(self, param: Tensor, group: Group, change: Callable[[dict[str, Tensor]], None]) -> None: ...

    def reset_moments(self, param: Tensor, group: Group) -> None: ...

    def warn(self, message: str) -> None: ...


class Member(NamedTuple):
    """A parameter of a low-rank group in a step."""

    matrix: LowRankMatrix
    group: Group
    state: State
    number: int  # among all parameters
    early: int  # how many steps early it refreshes
    rows: Rows | None  # which of its rows this rank has, if they are spread over ranks

    @property
    def grad(self) -> Tensor:
        """The gradient, or this rank's rows of it."""
        return local(self.param.grad)

    @property
    def param(self) -> Tensor:
        return self.matrix.param

    @property
    def done(self) -> int:
        """Steps taken."""
        return int(self.state.get("step", 0))

    @property
    def started(self) -> bool:
        """Whether there is a basis."""
        return "basis" in self.state or "basis_seed" in self.state

    @property
    def due(self) -> bool:
        """Whether this step is a refresh."""
        lazy = self.state.get("refresh_schedule")
        return not self.started or schedule.due(self.done, self.group["update_proj_gap"], self.early, lazy)


def refresh_bases(owner: Owner, members: Sequence[Member]) -> float:
    """Refreshes the bases that are due and returns the seconds that took.

    Where several ranks hold the same gradients, or rows of the same ones, each makes the bases of its share of the
    matrices, with the whole gradients, and all get them. The bases are those of a single process.
    """
    started = time.perf_counter()
    by_team: dict[Any, list[_Batch]] = {}
    for alike in _batches([member for member in members if member.due]):
        batch = _Batch(owner, alike)
        by_team.setdefault(batch.team, []).append(batch)
    for team, batches in by_team.items():
        divide(batches, team)
    return time.perf_counter() - started if by_team else 0.0


def _batches(members: Sequence[Member]) -> Iterator[list[Member]]:
    """The members whose gradients go through one call: of one group, step, shape and dtype, up to a size.

    Not for `svd`: LAPACK gains nothing, and a GPU's batched routine is another algorithm than the one for one matrix.
    """
    kinds: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        param = member.param
        kind = (id(member.group), member.done, member.started, param.shape, param.dtype, param.device)
        kinds.setdefault(kind, []).append(member)
    for alike in kinds.values():
        param = alike[0].param
        count = max(1, _STACKED.get(param.device.type, _STACKED_ELSEWHERE) // param.numel())
        if _method(alike[0]) is svd:
            count = 1
        for first in range(0, len(alike), count):
            yield alike[first : first + count]


class _Batch:
    """Members that are alike, on their way to new bases: a job of `divide`."""

    def __init__(self, owner: Owner, members: Sequence[Member]) -> None:
        self.owner, self.members, self.first = owner, members, members[0]
        self.method = _method(self.first)
        self.seeds = [_seed(self.first)] * len(members)  # one for all: a matrix gets what it would get alone
        if self.method is random:  # each its own, from which its basis can be made again
            self.seeds = [_seed(member, member.number) for member in members]
        self.old: list[Tensor | None] = []
        self.grads: list[Tensor] = []  # at the rank that makes the bases
        self.bases: Sequence[Tensor] = []
        self.seconds = 0.0

    @property
    def team(self) -> dist.ProcessGroup | None:
        """The ranks that divide the work; None where each rank does all of it.

        That is so for random bases, which cost less than to hand them out (but where an observer asks for the
        gradient), and for experts, of which a rank has whole ones.
        """
        if self.method is random and (self._spread is None or self.owner.observe is None):
            return None
        return self.owner.replicas if self.first.rows is None else self._spread

    @property
    def _spread(self) -> dist.ProcessGroup | None:
        """The ranks over which the rows of the members' gradients are spread."""
        rows = self.first.rows if self.first.param.dim() == 2 else None
        return rows.group if rows is not None else None

    @property
    def cost(self) -> int:
        return len(self.members) * self.first.param.numel()

    def gather(self, rank: int, me: int) -> None:
        """Brings what the bases are made of together at this rank of the team, if it is not there."""
        self.old = [member.matrix.basis(member.state) for member in self.members]
        for member, basis in zip(self.members, self.old, strict=True):
            if self._spread is None and rank == me:
                self.grads.append(_source(self.owner, member, basis))
            elif self._spread is not None and self.team is None:
                self.grads.append(member.grad.new_empty(()).expand(member.param.shape))  # its shape is all that counts
            elif member.rows is not None and self._spread is not None:
                matrix = member.rows.gather(_source(self.owner, member, basis), rank)
                self.grads += [] if matrix is None else [matrix]

    def make(self) -> None:
        """The bases, from the gradients that are here."""
        started, shape, asked = time.perf_counter(), self.first.param.shape, self.first.group["rank"]
        if asked > min(shape[-2:]):
            self.owner.warn(clamped_rank(asked, shape))
        self.bases, reason = _together(self.first.matrix, self.grads, self.old, self.method, self.seeds)
        if reason is not None and not _is_rehearsal(self.first, self.grads):
            self.owner.warn(unfit_gradient(reason, shape, self.first.done))
        self.seconds = (time.perf_counter() - started) / len(self.members)

    def hand_out(self, rank: int, me: int) -> None:
        """Puts the bases that this rank has made in force on all ranks of the team."""
        team = self.team
        if team is not None:
            matrix, work = self.first.matrix, working_dtype(self.first.param)
            shape = (len(self.members), *matrix.param.shape[:-2], matrix.basis_rows, matrix.rank)
            device = local(self.first.param).device
            made = torch.stack(list(self.bases)) if rank == me else torch.empty(shape, dtype=work, device=device)
            dist.broadcast(made, dist.get_global_rank(team, rank), group=team)
            self.bases = [basis.clone() for basis in made]  # a view would keep the storage of all
        for member, basis, before, seed in zip(self.members, self.bases, self.old, self.seeds, strict=True):
            kept = _adopt(self.owner, member, basis, before, seed if self.method is random else None)
            if self.owner.observe is not None and (team is not None or member.grad.numel() > 0):
                self._report(member, kept, before, rank, me)
        self.old, self.grads, self.bases = [], [], []

    def _report(self, member: Member, basis: Tensor, before: Tensor | None, rank: int, me: int) -> None:
        """Tells the observer of a refresh; with a team every rank's."""
        team, rows, grad = self.team, member.rows, member.grad
        whole = grad if rows is None or team is None else rows.gather(grad, rank)
        found = None
        if rank == me:
            assert whole is not None
            found = statistics_of(whole, member.matrix.side, basis, before, member.done, self.seconds)
        if team is not None:
            found = shared(found, team, rank, grad.device)
        assert found is not None
        assert self.owner.observe is not None
        self.owner.observe(member.param, found)


def _is_rehearsal(member: Member, grads: Sequence[Tensor]) -> bool:
    """Whether this is a step without a rate and gradients, by which torch.distributed.checkpoint makes states."""
    return float(member.group["lr"] or 0.0) == 0.0 and not any(bool(grad.any()) for grad in grads)


def _method(member: Member) -> BasisMethod:
    return method_at(member.group["subspace"], member.done, member.group["random_from"])


def _seed(member: Member, *number: int) -> int:
    """Of a refresh: 63 bits, as torch's generators take them."""
    return mix64(member.group["seed"], member.done, *number) >> 1


def _source(owner: Owner, member: Member, basis: Tensor | None) -> Tensor:
    """What the new basis is made of: G, or the first moment as G would change it, (1 − β)·G + β·back(M).

    Of a matrix whose rows are spread over ranks, this rank's rows.
    """
    grad, group = member.grad, member.group
    if group["source"] == "gradient" or basis is None:
        return grad
    beta = owner.momentum(group)
    assert beta is not None
    moment = owner.read_moments(member.param, group)["exp_avg"]
    mean = project_back(moment, basis.to(moment), member.matrix.side)
    return mean.mul_(beta).add_(grad, alpha=1.0 - beta)


def _together(
    matrix: LowRankMatrix,
    grads: Sequence[Tensor],
    old: Sequence[Tensor | None],
    method: BasisMethod,
    seeds: Sequence[int],
) -> tuple[Sequence[Tensor], str | None]:
    """The new bases: those of several gradients in one call, but for random ones."""
    work = working_dtype(matrix.param)
    if grads[0].numel() == 0:  # experts, of which this rank has none
        return [grad.new_zeros(*grad.shape[:-2], matrix.basis_rows, matrix.rank, dtype=work) for grad in grads], None
    previous = [None if basis is None else basis.to(work) for basis in old]
    if method is random or len(grads) == 1:
        pairs = [
            refresh(grad, matrix.rank, matrix.side, method, before, seed)
            for grad, before, seed in zip(grads, previous, seeds, strict=True)
        ]
        return [basis for basis, _ in pairs], next((reason for _, reason in pairs if reason), None)
    known = [basis for basis in previous if basis is not None]
    stacked = torch.stack(known) if known else None
    bases, reason = refresh(torch.stack(list(grads)), matrix.rank, matrix.side, method, stacked, seeds[0])
    return [basis.clone() for basis in bases], reason  # a view would keep the storage of all


def _adopt(owner: Owner, member: Member, basis: Tensor, before: Tensor | None, seed: int | None) -> Tensor:
    """Puts the basis in force and returns it as it will be read.

    The moments move with it, as `moments` says, and the lazy schedule goes on.
    """
    param, group, state, matrix = member.param, member.group, member.state, member.matrix
    sizes = matrix.side.sizes(*param.shape[-2:])
    if before is None or before.shape != basis.shape or "step" not in state:
        before = None
    else:
        before = before.to(basis)
        if group["moments"] == "align":
            basis = align(basis, before, sizes)
    kept = matrix.keep_basis(state, basis, seed)
    if before is not None and group["moments"] == "rotate":
        bias1, bias2 = bias_corrections(group, member.done)
        turn = partial(rotate, new=kept, old=before, side=matrix.side, bias1=bias1, bias2=bias2)
        owner.change_moments(param, group, turn)
    elif before is not None and group["moments"] == "reset":
        owner.reset_moments(param, group)
    if group["lazy"]:
        state["refresh_schedule"] = schedule.postponed(
            state.get("refresh_schedule"), member.done, group["update_proj_gap"], member.early, kept, before, sizes
        )
    return kept
