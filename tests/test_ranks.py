"""Ways of going wide that the Trainer does not take by itself, with torch alone: DDP's options, FSDP2's policies.

The file is its own script: torchrun starts it on two ranks (gloo), the tests compare with a single process.
"""

import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchrun import leave_together, results_of

from hf_galore import GaLoreAdamW, galore_param_groups
from hf_galore.lowrank_backward import enable
from hf_galore.lowrank_parameters import UPDATE
from hf_galore.shards import whole

RANKS, STEPS, WIDTH = 2, 5, 12
LOW_RANK: dict[str, Any] = {"rank": 4, "update_proj_gap": 2, "scale": 1.0, "proj_type": "right", "moments": "keep"}
TARGETS = ["up", "down", "experts"]
ENGINES = ("optimizer", "layerwise")


class Mixture(nn.Module):
    """Two layers and two experts; a sample goes to the expert that its first number's sign says."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.tanh(self.up(x)))
        for number, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0) == bool(number)
            if chosen.any():
                y = y.index_add(0, chosen.nonzero()[:, 0], expert(y[chosen]))
        return y.square().mean()


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Mixture().to(dtype)


def batch(step: int, rank: int, case: str) -> Tensor:
    """Of one rank. In `experts` the second rank has nothing for expert 1, in `unequal` it ends with less."""
    x = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() * torch.tensor([1, -1] * 6)
    if case == "experts" and rank == 1:
        x[:, 0] = -x[:, 0].abs()
    return x[:6] if case == "unequal" and rank == 1 and step == STEPS - 1 else x


def optimizer_of(network: nn.Module, engine: str) -> GaLoreAdamW:
    if engine == "optimizer":
        return GaLoreAdamW(galore_param_groups(network, TARGETS, **LOW_RANK), lr=1e-2)
    lowrank = enable(network, TARGETS, **LOW_RANK)
    optimizer = GaLoreAdamW(lowrank.param_groups(network), lr=1e-2)
    lowrank.attach(optimizer)
    return optimizer


def train(
    network: nn.Module,
    optimizer: GaLoreAdamW,
    batches: Callable[[int], list[Tensor]],
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Steps on the mean over the batches of a step; gradients are exchanged with the last of them."""
    for step in range(STEPS):
        optimizer.zero_grad()
        several = batches(step)
        for number, x in enumerate(several, start=1):
            with no_sync() if number < len(several) else nullcontext():
                (network(x) / len(several)).backward()
        optimizer.step()


def outcome(network: nn.Module, optimizer: GaLoreAdamW) -> dict[str, dict[str, Tensor]]:
    bases = [state["basis"] for state in optimizer.state.values() if "basis" in state]
    return {
        "weights": {
            name.removeprefix("module."): whole(param.detach()).clone()
            for name, param in network.named_parameters()
            if UPDATE not in name
        },
        "bases": {str(number): basis for number, basis in enumerate(bases)},
    }


def alone(engine: str, case: str) -> dict[str, Tensor]:
    """The weights of one process that has the batches of both ranks."""
    network = model()
    optimizer = optimizer_of(network, engine)
    micro = range(2) if case == "no_sync" else range(1)
    train(network, optimizer, lambda step: [batch(step + 100 * m, rank, case) for m in micro for rank in range(RANKS)])
    return outcome(network, optimizer)["weights"]


DDP: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "experts": {"find_unused_parameters": True},
    "unequal": {},
    "no_sync": {},
    "views": {"gradient_as_bucket_view": True},
}


def with_ddp(engine: str, case: str) -> dict[str, dict[str, Tensor]]:
    network, rank = model(), dist.get_rank()
    optimizer = optimizer_of(network, engine)
    optimizer.replicas = dist.group.WORLD
    wrapped = DistributedDataParallel(network, **DDP[case])
    micro = range(2) if case == "no_sync" else range(1)
    train(wrapped, optimizer, lambda step: [batch(step + 100 * m, rank, case) for m in micro], wrapped.no_sync)
    return outcome(wrapped, optimizer)


FSDP: dict[str, dict[str, Any]] = {
    "sharded": {},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "policy": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)},
}


def with_fsdp(engine: str, case: str) -> dict[str, dict[str, Tensor]]:
    """The projected backward goes in before the model is sharded, and its optimizer is made afterwards."""
    network, rank = model(), dist.get_rank()
    if engine == "layerwise":
        lowrank = enable(network, TARGETS, **LOW_RANK)
    for part in (network.up, network.down, *network.experts, network):
        fully_shard(part, **FSDP[case])
    if engine == "layerwise":
        optimizer = GaLoreAdamW(lowrank.param_groups(network), lr=1e-2)
        lowrank.attach(optimizer)
    else:
        optimizer = optimizer_of(network, engine)
    train(network, optimizer, lambda step: [batch(step, rank, case)])
    return outcome(network, optimizer)


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    results: dict[Any, Any] = {}
    for engine in ENGINES:
        results |= {(engine, case): with_ddp(engine, case) for case in DDP}
        results |= {(engine, case): with_fsdp(engine, case) for case in FSDP}
    torch.save(results, output / f"rank{dist.get_rank()}.pt")
    leave_together()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the ranks wrote."""
    return results_of(__file__, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize(("engine", "case"), list(itertools.product(ENGINES, [*DDP, *FSDP])))
def test_two_ranks_are_a_single_process(ranks, engine, case):
    """In float64 to 1e-11 of steps of 1e-2; in the float32 of a mixed-precision policy to 1e-3 of them."""
    expected, found = alone(engine, case), ranks[0][engine, case]["weights"]
    atol = 1e-5 if case == "policy" else 1e-11
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.0, atol=atol, msg=name)


@pytest.mark.parametrize(("engine", "case"), list(itertools.product(ENGINES, [*DDP, *FSDP])))
def test_ranks_agree_bit_for_bit(ranks, engine, case):
    """Weights and bases, also where one rank had no tokens for an expert or fewer samples than the other."""
    one, other = (rank[engine, case] for rank in ranks)
    assert len(one["bases"]) == 4
    for part in ("weights", "bases"):
        assert one[part].keys() == other[part].keys()
        assert not [name for name in one[part] if not torch.equal(one[part][name], other[part][name])]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
