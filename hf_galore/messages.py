"""What both engines warn of and refuse."""

from collections.abc import Sequence


def clamped_rank(rank: int, shape: Sequence[int]) -> str:
    """A rank above that of the matrix."""
    return f"rank={rank} is larger than a matrix of shape {tuple(shape)} has: it is clamped"


def unfit_gradient(reason: str, shape: Sequence[int], step: int) -> str:
    """A refresh that could not give what was asked for."""
    return (
        f"a basis refresh found that {reason} (parameter of shape {tuple(shape)}, step {step}): keeping the old "
        "basis, or taking seeded random directions for what is missing"
    )


def no_average_of_gradients(optimizer: object) -> str:
    """source='moment' with an optimizer that has no such moment."""
    return f"source='moment': {type(optimizer).__name__} keeps no average of the gradients; use source='gradient'"


def std_is(side: str) -> str:
    """`std` where rows are spread over ranks; `side` is `right`, and for transposed weights `left`."""
    kind = "transposed weights (Conv1D)" if side == "left" else "weights"
    return (
        f"proj_type='std' is taken as {side!r} where {kind} are spread over ranks, so that a rank can step its rows "
        f"alone; ask for {side!r} elsewhere, too, for the same training"
    )


def only(side: str, proj_type: str) -> str:
    """A side whose projection adds up over the rows of a matrix as it is stored."""
    if side == "left":
        return (
            f"proj_type={proj_type!r} does not go with transposed weights (Conv1D) whose rows, the in_features, are "
            "spread over ranks; use 'left' or 'std', or galore_adamw_layerwise for 'right'"
        )
    return f"proj_type={proj_type!r} does not go with weights whose rows are spread over ranks; use 'right'"
