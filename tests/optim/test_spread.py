"""Parameters whose rows are spread over ranks, and ranks with the same gradients: three real processes (gloo).

The file is its own script: torchrun starts it three times, each rank writes what it has, the tests compare with a
single process. Three ranks do not divide the sizes: rows are shared out unevenly, and the last rank may have none.
"""

import functools
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from torchrun import leave_together, results_of

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, shards
from hf_galore.statistics import SubspaceStatistics

RANKS, STEPS, RANK, GAP = 3, 7, 4, 3
SHAPES = {"tall": (16, 6), "wide": (8, 20), "more": (8, 20), "few": (2, 9)}
EXPERTS = {"experts": (4, 8, 6), "pair": (2, 8, 6)}
FULL = {"vector": (7,), "table": (10, 12)}

# What an optimizer is made of: its class, keywords of it, keys of the low-rank group, and what is in that.
ROWS: dict[str, tuple[type, dict[str, Any], dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "svd": (GaLoreAdamW, {}, {}, SHAPES | EXPERTS),
    "randomized, rotate": (GaLoreAdamW, {}, {"subspace": "randomized", "moments": "rotate"}, SHAPES | EXPERTS),
    "gram, align": (GaLoreAdamW, {}, {"subspace": "gram", "moments": "align"}, SHAPES | EXPERTS),
    "random, reset": (GaLoreAdamW, {}, {"subspace": "random", "moments": "reset"}, SHAPES),
    "moment, stagger": (GaLoreAdamW, {}, {"source": "moment", "stagger": True}, SHAPES | EXPERTS),
    "int4, lazy": (GaLoreAdamW, {}, {"basis_dtype": "int4", "lazy": True}, SHAPES),
    "equal state": (GaLoreAdamW, {}, {"equal_state": True}, SHAPES),
    "bfloat16 state": (GaLoreAdamW, {"state_dtype": "bfloat16"}, {"moments": "rotate"}, SHAPES | EXPERTS),
    "8 bits": (GaLoreAdamW8bit, {"min_8bit_size": 0}, {"moments": "rotate"}, SHAPES | EXPERTS),
    "8 bits, small": (GaLoreAdamW8bit, {"min_8bit_size": 4096}, {"moments": "rotate"}, SHAPES | EXPERTS),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
CELLS = list(itertools.product(ROWS, DTYPES))
Place = Callable[[Tensor], Parameter]


def parameters(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def gradient(param: Tensor, step: int, number: int) -> Tensor:
    """Of full rank, with singular values far enough apart that a basis does not turn with rounding."""
    values = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * step + number)).double()
    if param.dim() < 2:
        return values.to(param.dtype)
    left, _, right = torch.linalg.svd(values, full_matrices=False)
    scale = 2.0 ** -torch.arange(left.shape[-1], dtype=torch.float64)
    return ((left * scale) @ right).to(param.dtype)


def train(
    row: str, dtype: torch.dtype, place: Place = Parameter, replicas: dist.ProcessGroup | None = None, **changes: Any
) -> dict[str, Any]:
    """Parameters, states and statistics after STEPS steps on parameters and gradients as `place` makes them."""
    cls, keywords, low_rank, shapes = ROWS[row]
    params = {name: place(value) for name, value in parameters(shapes | FULL, dtype).items()}
    group = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.5, "proj_type": "right", **low_rank, **changes}
    groups = [{"params": [params[name] for name in shapes], **group}, {"params": [params[name] for name in FULL]}]
    optimizer = cls(groups, lr=0.05, weight_decay=0.1, **keywords)
    optimizer.replicas = replicas
    found: list[SubspaceStatistics] = []
    optimizer.observe = lambda _, statistics: found.append(statistics)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "GaLore.* is clamped")
        for step in range(STEPS):
            for number, param in enumerate(params.values()):
                param.grad = place(gradient(param, step, number)).detach()
            optimizer.step()
    state = optimizer.state
    return {
        "params": {name: shards.whole(param.detach()) for name, param in params.items()},
        "state": {f"{name}/{key}": shards.whole(v) for name, p in params.items() for key, v in state[p].items()},
        "here": {name: shards.local(state[param]["exp_avg"]).shape for name, param in params.items()},
        "statistics": [vars(one) for one in found],
    }


alone = functools.cache(train)  # in one process, for tests that only read what it gives


def refusals(place: Place) -> dict[str, str]:
    """What the optimizers say to rows that they cannot train."""
    found = {}
    asked: dict[str, dict[str, Any]] = {
        "left": {"proj_type": "left"},
        "full": {"proj_type": "full"},
        "reverse_std": {"proj_type": "reverse_std"},
        "int8": {"basis_dtype": "int8"},
        "lazy": {"lazy": True},
    }
    for name, changes in asked.items():
        with pytest.raises(ValueError, match="spread over ranks") as caught:
            train("svd", torch.float32, place, **changes)
        found[name] = str(caught.value)
    param = place(torch.ones(4, 3))
    param.grad = place(torch.ones(4, 3)).detach()
    with pytest.raises(ValueError, match="spread over ranks") as caught:
        GaLoreAdafactor([param]).step()
    return found | {"adafactor": str(caught.value)}


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,))

    def rows(tensor: Tensor) -> Parameter:
        return Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))

    def columns(tensor: Tensor) -> Parameter:
        return Parameter(distribute_tensor(tensor, mesh, [Shard(1)]))

    results: dict[Any, Any] = {}
    for row, dtype in CELLS:
        results["rows", row, dtype] = train(row, DTYPES[dtype], rows)
        results["replicas", row, dtype] = train(row, DTYPES[dtype], replicas=dist.group.WORLD)
    with pytest.warns(UserWarning, match="proj_type='std' is taken as 'right'"):
        results["std"] = train("svd", torch.float64, rows, proj_type="std")
    results["refused"] = refusals(rows)
    optimizer = GaLoreAdamW([columns(torch.ones(4, 3))])
    optimizer.param_groups[0]["params"][0].grad = columns(torch.ones(4, 3)).detach()
    with pytest.raises(ValueError, match="only shards of dimension 0") as caught:
        optimizer.step()
    results["refused"]["columns"] = str(caught.value)
    torch.save(results, output / f"rank{dist.get_rank()}.pt")
    leave_together()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the ranks wrote."""
    return results_of(__file__, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize(("row", "dtype"), CELLS)
@pytest.mark.parametrize("how", ["rows", "replicas"])
def test_ranks_agree_bit_for_bit(ranks, how, row, dtype):
    first, *others = (rank[how, row, dtype] for rank in ranks)
    for other in others:
        for part in ("params", "state"):
            assert first[part].keys() == other[part].keys()
            assert not [name for name, value in first[part].items() if not torch.equal(value, other[part][name])]


@pytest.mark.parametrize(("row", "dtype"), CELLS)
def test_ranks_with_the_same_gradients_are_a_single_process(ranks, row, dtype):
    """Each made a third of the bases, and all have the bits that one process has."""
    single, together = alone(row, DTYPES[dtype]), ranks[1]["replicas", row, dtype]
    for part in ("params", "state"):
        assert single[part].keys() == together[part].keys()
        assert not [name for name, value in single[part].items() if not torch.equal(value, together[part][name])]


@pytest.mark.parametrize(
    ("row", "dtype"), [cell for cell in CELLS if cell[1] != "bfloat16" and cell != ("8 bits", "float32")]
)
def test_rows_on_ranks_are_a_single_process(ranks, row, dtype):
    """But for the order of sums in products: some eps in each step, which Adam carries over as they are.

    Moments of float64 parameters are kept in floats also where 8 bits are asked for.
    """
    single, spread = alone(row, DTYPES[dtype]), ranks[0]["rows", row, dtype]
    for name, value in single["params"].items():
        atol = 1e3 * torch.finfo(DTYPES[dtype]).eps
        torch.testing.assert_close(spread["params"][name], value, rtol=0.0, atol=atol)


def test_8_bits_in_rows_are_no_further_from_floats_than_those_of_a_single_process(ranks):
    """Their blocks do not cross rows and are smaller, so the codes are others; the error of one is a random number."""
    floats = alone("8 bits, small", torch.float32)["params"]
    runs = {"alone": alone("8 bits", torch.float32), "spread": ranks[0]["rows", "8 bits", "float32"]}
    errors = {
        name: sum(float((run["params"][key] - value).square().sum()) for key, value in floats.items()) ** 0.5
        for name, run in runs.items()
    }
    assert 0 < errors["spread"] <= 1.1 * errors["alone"]


@pytest.mark.parametrize("row", [row for row in ROWS if row != "8 bits"])
def test_rows_on_ranks_are_rounded_with_the_bits_of_a_single_process(ranks, row):
    """bfloat16 weights: what differs are the few elements whose float32 value is next to where the bits round up."""
    single, spread = alone(row, torch.bfloat16), ranks[0]["rows", row, "bfloat16"]
    different = sum(int((value != spread["params"][name]).sum()) for name, value in single["params"].items())
    assert different <= 0.01 * sum(value.numel() for value in single["params"].values())


@pytest.mark.parametrize("row", ROWS)
def test_states_are_spread_as_their_parameters_are(ranks, row):
    for name, shape in parameters(ROWS[row][3] | FULL, torch.float32).items():
        counts = [rank["rows", row, "float32"]["here"][name][0] for rank in ranks]
        share = -(-shape.shape[0] // RANKS)
        assert counts == [max(0, min(share, shape.shape[0] - rank * share)) for rank in range(RANKS)]


def test_statistics_are_those_of_a_single_process(ranks):
    """Of matrices; of experts a rank sees its own."""
    for row in ("int4, lazy", "equal state", "random, reset"):
        usual = alone(row, torch.float64)["statistics"]
        for how in ("rows", "replicas"):
            found = ranks[0][how, row, "float64"]["statistics"]
            assert len(found) == len(usual)
            for key in ("step", "captured_energy", "overlap", "stable_rank"):
                got, want = (sorted(one[key] for one in several if one[key] == one[key]) for several in (found, usual))
                assert got == pytest.approx(want, rel=1e-6)  # computed in float32


def test_std_becomes_right(ranks):
    for name, value in ranks[0]["rows", "svd", "float64"]["params"].items():
        assert torch.equal(ranks[0]["std"]["params"][name], value)


def test_what_rows_cannot_have_is_refused(ranks):
    refused = ranks[2]["refused"]
    for side in ("left", "full", "reverse_std"):
        assert f"proj_type='{side}'" in refused[side]
        assert "use 'right'" in refused[side]
    assert "use float32 or bfloat16" in refused["int8"]
    assert "use lazy=False" in refused["lazy"]
    assert "GaLoreAdafactor cannot step" in refused["adafactor"]
    assert "leave out shard_placement_fn" in refused["columns"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
