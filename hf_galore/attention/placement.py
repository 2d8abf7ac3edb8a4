"""Where tokens of our own stand in the rows of a batch, how they get there and how they are taken out again."""

import torch
from torch import Tensor


def left_padding(mask: Tensor) -> Tensor:
    """How many columns of a mask (batch, tokens) are zero before the first that is not: (batch,)."""
    return (mask.cumsum(1) == 0).sum(1)


class Placement:
    """n tokens that stand behind the first `after` of each row (batch,); None: in front of all.

    Behind the padding on the left, then, a row with them is the row alone with them, whatever counts the distance
    between tokens: positions, sliding windows, slots of a cache.
    """

    def __init__(self, n: int, after: Tensor | None = None) -> None:
        self.n, self.after = n, after

    def put(self, own: Tensor, rows: Tensor) -> Tensor:
        """(batch, n + tokens, …) of our own (batch or 1, n, …) and rows (batch, tokens, …)."""
        whole = torch.cat([own.to(rows).expand(len(rows), *own.shape[1:]), rows], dim=1)
        if self.after is None:
            return whole
        after, place = self.after[:, None], torch.arange(whole.shape[1], device=rows.device)
        behind = torch.where(place < after + self.n, place - after, place)
        return _picked(whole, torch.where(place < after, place + self.n, behind), 1)

    def take(self, rows: Tensor, dim: int = 1) -> Tensor:
        """The rows (batch, …) without our own, which they have along `dim`."""
        length = rows.shape[dim] - self.n
        if self.after is None:
            return rows.narrow(dim, self.n, length)
        place = torch.arange(length, device=rows.device)
        return _picked(rows, torch.where(place < self.after[:, None], place, place + self.n), dim)


def _picked(rows: Tensor, index: Tensor, dim: int) -> Tensor:
    """Of each row b, what is at index[b] along `dim`."""
    batch = torch.arange(len(rows), device=rows.device)[:, None]
    return rows.movedim(dim, 1)[batch, index].movedim(1, dim)
