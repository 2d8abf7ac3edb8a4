"""Work that ranks divide among them: each does some of the jobs, and hands out what it has made."""

from collections.abc import Iterable
from typing import Protocol

import torch.distributed as dist


class Job(Protocol):
    """One piece of work that one rank does; the same jobs are known to all of them."""

    @property
    def cost(self) -> int:
        """How much work it is, in any unit; the same on all ranks."""

    def gather(self, rank: int, me: int) -> None:
        """Brings what it takes to this rank of the team; a collective. `me` is the rank of this process."""

    def make(self) -> None:
        """The work, at the rank that does it."""

    def hand_out(self, rank: int, me: int) -> None:
        """Gives what that rank has made to all; a collective."""


def divide(jobs: Iterable[Job], team: dist.ProcessGroup | None) -> None:
    """Does all jobs, one rank each: as many at a time as there are ranks, the largest first."""
    size, me = (1, 0) if team is None else (team.size(), team.rank())
    ordered = sorted(jobs, key=lambda job: -job.cost)
    for first in range(0, len(ordered), size):
        turn = ordered[first : first + size]
        for rank, job in enumerate(turn):
            job.gather(rank, me)
        if me < len(turn):
            turn[me].make()
        for rank, job in enumerate(turn):
            job.hand_out(rank, me)
