"""Rows of the tests of the basis options: what can be asked for, and what then stands in the state of a matrix."""

from typing import NamedTuple

import pytest
import torch
from optimizer_cases import BASE, make

from hf_galore import GaLoreAdafactor
from hf_galore.optim.matrix import LowRankMatrix

GAP = 4
WITH_MOMENTS = {cls: {**options, "beta1": 0.9} if cls is GaLoreAdafactor else options for cls, options in BASE.items()}


class Row(NamedTuple):
    """Keys of the group, and the dtypes of what the state has besides `step` and the moments after two refreshes.

    None stands for the dtype that `state_dtype` gives.
    """

    group: dict
    kept: dict


FLOATS = {"basis": None}
SEED = {"basis_seed": torch.int64}
BYTES, NIBBLES = ({"basis": dtype, "basis_scale": torch.float32} for dtype in (torch.int8, torch.uint8))
RESET, SCHEDULE = {"reset_step": torch.float32}, {"refresh_schedule": torch.int64}

ROWS = {
    "default": Row({}, FLOATS),
    "randomized": Row({"subspace": "randomized"}, FLOATS),
    "gram": Row({"subspace": "gram"}, FLOATS),
    "random": Row({"subspace": "random"}, SEED),
    "late_random": Row({"subspace": "late_random", "random_from": 3}, SEED),
    "late_random, not yet": Row({"subspace": "late_random", "random_from": 6}, FLOATS),
    "align": Row({"moments": "align"}, FLOATS),
    "rotate": Row({"moments": "rotate"}, FLOATS),
    "reset": Row({"moments": "reset"}, FLOATS | RESET),
    "source=moment": Row({"source": "moment"}, FLOATS),
    "float32": Row({"basis_dtype": "float32"}, {"basis": torch.float32}),
    "bfloat16": Row({"basis_dtype": "bfloat16"}, {"basis": torch.bfloat16}),
    "int8": Row({"basis_dtype": "int8"}, BYTES),
    "int4": Row({"basis_dtype": "int4"}, NIBBLES),
    "equal_state": Row({"equal_state": True, "proj_type": "right"}, FLOATS),
    "stagger": Row({"stagger": True}, FLOATS),
    "lazy": Row({"lazy": True, "update_proj_gap": 1}, FLOATS | SCHEDULE),
    "random, rotate": Row({"subspace": "random", "moments": "rotate"}, SEED),
    "random, rotate, int8": Row({"subspace": "random", "moments": "rotate", "basis_dtype": "int8"}, BYTES),
    "full, rotate, int4": Row({"proj_type": "full", "moments": "rotate", "basis_dtype": "int4"}, NIBBLES),
    "late_random, reset, lazy": Row(
        {"subspace": "late_random", "random_from": 3, "moments": "reset", "lazy": True}, SEED | RESET | SCHEDULE
    ),
    "many": Row(
        {
            "subspace": "randomized",
            "moments": "rotate",
            "source": "moment",
            "basis_dtype": "int4",
            "proj_type": "right",
            "equal_state": True,
            "stagger": True,
            "lazy": True,
        },
        NIBBLES | SCHEDULE,
    ),
}

each_row = pytest.mark.parametrize(
    ("cls", "row"),
    [
        pytest.param(cls, row, id=f"{cls.__name__}-{name}")
        for cls in BASE
        for name, row in ROWS.items()
        if not (cls is GaLoreAdafactor and row.group.get("source") == "moment")
    ],
)


def started(cls, row, dtype=torch.float32, state_dtype=None, **kwargs):
    """A problem and its optimizer, large enough for `randomized` to be itself."""
    options = {**WITH_MOMENTS[cls], "state_dtype": state_dtype}
    return make(cls, "low rank", dtype, options=options, size=4, **{"update_proj_gap": GAP, **row.group, **kwargs})


def projected(optimizer):
    """(parameter, its state, its group) of the matrices that are projected."""
    return [
        (param, optimizer.state[param], group)
        for group in optimizer.param_groups
        for param in group["params"]
        if "rank" in group
    ]


def basis_of(optimizer, param):
    """A copy of the basis in force, whatever it is kept in."""
    (found,) = (item for item in projected(optimizer) if item[0] is param)
    return LowRankMatrix(param, found[2]).basis(found[1]).clone()


def record(optimizer):
    """A list that every refresh from now on is added to: (parameter, statistics)."""
    seen = []
    optimizer.observe = lambda param, found: seen.append((param, found))
    return seen


def steps_of(seen, param):
    """The steps at which a parameter has been refreshed."""
    return [found.step for one, found in seen if one is param]
