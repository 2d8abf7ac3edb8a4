"""Checks of hyper-parameters, with errors that name the argument and the valid choices."""

import math
from collections.abc import Collection
from typing import Any

from torch import Tensor


def check_number(name: str, value: Any, *, low: float, high: float = math.inf) -> None:
    """Raises TypeError unless `value` is a number, ValueError unless it is finite and low <= value < high."""
    if isinstance(value, bool | str) or not isinstance(value, int | float | Tensor):
        raise TypeError(f"{name}={value!r} is not a number")
    if not low <= float(value) < high:
        raise ValueError(
            f"Invalid {name}: {value} - should be >= {low}" + (f" and < {high}" if high < math.inf else "")
        )


def check_integer(name: str, value: Any, *, low: int) -> None:
    """Raises TypeError unless `value` is an int, ValueError if it is below `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is not an integer")
    if value < low:
        raise ValueError(f"Invalid {name}: {value} - should be >= {low}")


def check_boolean(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is not True or False")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
