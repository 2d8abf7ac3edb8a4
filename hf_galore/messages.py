"""What both engines warn of."""

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
