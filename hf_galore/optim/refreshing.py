"""The refreshes of the optimizer path: which matrices are due, those of one shape at once, what moves with them."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_galore import schedule
from hf_galore.bases import BasisMethod, method_at, random, svd
from hf_galore.messages import clamped_rank, unfit_gradient
from hf_galore.optim.matrix import LowRankMatrix, working_dtype
from hf_galore.optim.moments import bias_corrections
from hf_galore.rounding import mix64
from hf_galore.sides import project_back
from hf_galore.statistics import Observer, statistics_of
from hf_galore.subspace import align, refresh, rotate

Group = dict[str, Any]
State = dict[str, Any]

# Elements of the gradients that are stacked for one call. On a CPU, where a call costs little, only small ones.
_STACKED = {"cpu": 1 << 20}
_STACKED_ELSEWHERE = 1 << 24


class Owner(Protocol):
    """What a refresh asks of the optimizer."""

    observe: Observer | None

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
    """Refreshes the bases that are due and returns the seconds that took."""
    started = time.perf_counter()
    due = [member for member in members if member.due]
    for alike in _batches(due):
        _refresh(owner, alike)
    return time.perf_counter() - started if due else 0.0


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


def _refresh(owner: Owner, batch: Sequence[Member]) -> None:
    """New bases for members that are alike."""
    started = time.perf_counter()
    first, method = batch[0], _method(batch[0])
    shape, asked = first.param.shape, first.group["rank"]
    if asked > min(shape[-2:]):
        owner.warn(clamped_rank(asked, shape))
    old = [member.matrix.basis(member.state) for member in batch]
    grads = [_source(owner, member, basis) for member, basis in zip(batch, old, strict=True)]
    seeds = [_seed(first)] * len(batch)  # one for all: a matrix gets what it would get alone
    if method is random:  # each its own, from which its basis can be made again
        seeds = [_seed(member, member.number) for member in batch]
    bases, reason = _together(first.matrix, grads, old, method, seeds)
    if reason is not None:
        owner.warn(unfit_gradient(reason, shape, first.done))
    seconds = (time.perf_counter() - started) / len(batch)
    for member, basis, before, seed in zip(batch, bases, old, seeds, strict=True):
        kept = _adopt(owner, member, basis, before, seed if method is random else None)
        if owner.observe is not None:
            grad = member.param.grad
            assert grad is not None
            owner.observe(member.param, statistics_of(grad, member.matrix.side, kept, before, member.done, seconds))


def _method(member: Member) -> BasisMethod:
    return method_at(member.group["subspace"], member.done, member.group["random_from"])


def _seed(member: Member, *number: int) -> int:
    """Of a refresh: 63 bits, as torch's generators take them."""
    return mix64(member.group["seed"], member.done, *number) >> 1


def _source(owner: Owner, member: Member, basis: Tensor | None) -> Tensor:
    """What the new basis is made of: G, or the first moment as G would change it, (1 − β)·G + β·back(M)."""
    grad, group = member.param.grad, member.group
    assert grad is not None
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
