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


STD_IS_RIGHT = (
    "proj_type='std' is taken as 'right' where weights are spread over ranks, so that a rank can step its rows alone; "
    "ask for 'right' elsewhere, too, for the same training"
)


def only_right(proj_type: str) -> str:
    """A side whose projection adds up over the rows of a matrix."""
    return f"proj_type={proj_type!r} does not go with weights whose rows are spread over ranks; use 'right'"
