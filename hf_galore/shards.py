"""Parameters whose rows are spread over ranks (FSDP2's DTensors): this rank's rows, and whole matrices at one rank.

Rows are those of dimension 0, in torch.chunk's shares: each rank has ⌈m/N⌉ of the m rows but for the last ones, which
have fewer or none. A second mesh dimension may replicate the shards (HSDP).
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor; does not import their module, which takes longer than all of ours."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """What this rank holds of a tensor: all of it unless it is sharded. Anything else is returned as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; a collective if it is sharded."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


@dataclass(frozen=True)
class Rows:
    """Which rows of a sharded parameter this rank holds, and the group of ranks that hold all of them."""

    group: dist.ProcessGroup
    first: int
    count: int
    total: int

    @property
    def share(self) -> int:
        """Rows of a rank that has no fewer than others."""
        return -(-self.total // self.group.size())

    def gather(self, rows: Tensor, rank: int) -> Tensor | None:
        """The whole of (total, …), at this rank of the group alone; a collective. `rows` are this rank's."""
        padded = rows.new_zeros(self.share, *rows.shape[1:])
        padded[: self.count] = rows
        mine = self.group.rank() == rank
        parts = [torch.empty_like(padded) for _ in range(self.group.size())] if mine else None
        dist.gather(padded, parts, dst=dist.get_global_rank(self.group, rank), group=self.group)
        return torch.cat(parts)[: self.total] if parts is not None else None


def rows_of(param: Tensor) -> Rows | None:
    """The rows of a sharded parameter that this rank holds; None for a plain tensor.

    Raises:
        ValueError: it is sharded in another way than by its rows.
    """
    if not is_sharded(param):
        return None
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    shards = [index for index, placement in enumerate(placements) if not placement.is_replicate()]
    if len(shards) != 1 or type(placements[shards[0]]).__name__ != "Shard" or placements[shards[0]].dim != 0:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is sharded as {placements}: only shards of dimension 0 can be "
            "trained (FSDP2's default; leave out shard_placement_fn and tensor parallelism)"
        )
    group, total = mesh.get_group(shards[0]), param.shape[0]
    share = -(-total // group.size())
    first = min(group.rank() * share, total)
    return Rows(group, first, min(share, total - first), total)


def spread(rows: Tensor, like: Tensor) -> Tensor:
    """A DTensor of which this rank holds `rows`, spread over the ranks as the parameter `like` is."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(rows.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)
