"""What a refresh says about a matrix: how much of its gradient the basis captures, how far the basis has turned, …"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from hf_galore.sides import Side
from hf_galore.subspace import captured_energy, overlap, stable_rank


@dataclass(frozen=True)
class SubspaceStatistics:
    """One refresh of one matrix; of a batch of matrices (experts) the means. NaN where something is not known.

    Attributes:
        step: the step, from 0, that the refresh belongs to.
        captured_energy: ‖project(G)‖² / ‖G‖², at most 1 but for the rounding of a basis that is kept as integers.
        overlap: mean squared cosine between the new subspace and the old one, in [0, 1].
        stable_rank: ‖G‖² / ‖G‖₂², from 1 to min(m, n): how many directions the gradient has.
        seconds: that the refresh took.
    """

    step: int
    captured_energy: float
    overlap: float
    stable_rank: float
    seconds: float


Observer = Callable[[Tensor, SubspaceStatistics], None]  # is told of each refresh of a parameter's basis


def statistics_of(
    grad: Tensor, side: Side, basis: Tensor, before: Tensor | None, step: int, seconds: float
) -> SubspaceStatistics:
    """The statistics of a refresh that has the full gradient (..., m, n)."""
    return SubspaceStatistics(
        step,
        float(captured_energy(grad, basis, side).nanmean()),
        turned(basis, before, side, grad.shape),
        float(stable_rank(grad).nanmean()),
        seconds,
    )


def shared(
    found: SubspaceStatistics | None, team: dist.ProcessGroup, rank: int, device: torch.device
) -> SubspaceStatistics:
    """What this rank of a team has found, on every rank of it; a collective, on tensors of the device."""
    numbers = torch.zeros(len(fields(SubspaceStatistics)), dtype=torch.float64, device=device)
    if found is not None:
        numbers[:] = torch.tensor(astuple(found))
    dist.broadcast(numbers, dist.get_global_rank(team, rank), group=team)
    step, *others = numbers.tolist()
    return SubspaceStatistics(int(step), *others)


def turned(basis: Tensor, before: Tensor | None, side: Side, shape: tuple[int, ...]) -> float:
    """The `overlap` of a new basis with the one before, the mean over both where there are two sides."""
    if before is None or before.shape != basis.shape:
        return float("nan")
    sizes = list(side.sizes(*shape[-2:]))
    pairs = zip(basis.split(sizes, dim=-2), before.to(basis).split(sizes, dim=-2), strict=True)
    overlaps = [float(overlap(new, old).mean()) for new, old in pairs]
    return sum(overlaps) / len(overlaps)
