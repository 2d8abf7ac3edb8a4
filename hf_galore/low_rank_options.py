"""The options of a low-rank group, with their defaults and checks: those of galore-torch, and ours."""

from collections.abc import Mapping
from typing import Any

from hf_galore.bases import subspace_names
from hf_galore.basis_store import BASIS_DTYPES
from hf_galore.checks import check_boolean, check_choice, check_integer, check_number
from hf_galore.sides import PROJ_TYPES

# Besides `rank`, which makes a group a low-rank one.
LOW_RANK_DEFAULTS: dict[str, Any] = {
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "subspace": "randomized",
    "random_from": None,
    "moments": "rotate",
    "source": "gradient",
    "basis_dtype": None,
    "equal_state": False,
    "stagger": False,
    "lazy": False,
}
MOMENTS = ("keep", "align", "rotate", "reset")
SOURCES = ("gradient", "moment")


def check_low_rank(options: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError for options of a low-rank group that make no sense."""
    check_integer("rank", options["rank"], low=1)
    check_integer("update_proj_gap", options["update_proj_gap"], low=1)
    check_number("scale", options["scale"], low=0.0)
    choices = {"proj_type": PROJ_TYPES, "subspace": subspace_names(), "moments": MOMENTS, "source": SOURCES}
    for name, valid in choices.items():
        check_choice(name, options[name], valid)
    if options["basis_dtype"] is not None:
        check_choice("basis_dtype", options["basis_dtype"], tuple(BASIS_DTYPES))
    for name in ("equal_state", "stagger", "lazy"):
        check_boolean(name, options[name])
    check_boolean("transposed", options.get("transposed", False))
    if options["random_from"] is not None:
        check_integer("random_from", options["random_from"], low=0)
    if (options["subspace"] == "late_random") != (options["random_from"] is not None):
        raise ValueError("subspace='late_random' and random_from, the step from which bases are random, go together")
    if options["moments"] == "align" and options["subspace"] in ("random", "late_random"):
        raise ValueError("moments='align': the signs of random bases mean nothing; use rotate, reset or keep")


def check_spread_batch(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options that fused experts which are spread over ranks cannot have.

    Their bases are spread with them, so blocks of codes would cross ranks, and schedules differ from rank to rank.
    """
    if options["basis_dtype"] in ("int8", "int4"):
        raise ValueError(
            f"basis_dtype={options['basis_dtype']!r} does not go with fused experts that are spread over ranks; use "
            "float32 or bfloat16"
        )
    if options["lazy"]:
        raise ValueError("lazy=True does not go with fused experts that are spread over ranks; use lazy=False")


def side_of_rows(options: Mapping[str, Any]) -> str:
    """The `proj_type` with which every row of a matrix, as it is stored, is projected by itself."""
    return "left" if options.get("transposed") else "right"
