"""Tables of which the fast run has a part, and `make test-all` the whole."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any, **named: Any) -> Any:
    """A row for `make test-all` alone: it differs from one of the fast run in what the code does not look at."""
    return pytest.param(*values, marks=pytest.mark.slow, **named)


def in_part(values: Iterable[Any], *fast: Any) -> list[Any]:
    """All of the values, those that are not in `fast` as slow rows."""
    rows = list(values)
    assert [one for one in fast if one not in rows] == []
    return [one if one in fast else slow(*one) if isinstance(one, tuple) else slow(one) for one in rows]
