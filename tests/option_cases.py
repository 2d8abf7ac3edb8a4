"""Basis options that are wrong, for both engines: the error, and what it must say."""

import pytest
import torch

_BOOLEANS = {name: [(value, TypeError) for value in (1, 0.0, "yes")] for name in ("equal_state", "stagger", "lazy")}
_VALUES = {
    "moments": [(value, ValueError) for value in ("rotated", "KEEP", 1, True)],
    "source": [(value, ValueError) for value in ("momentum", "Gradient", None, 1)],
    "subspace": [(value, ValueError) for value in ("late", "SVD", None)],
    "basis_dtype": [(value, ValueError) for value in ("int16", "INT8", "float64", torch.int8, torch.bfloat16, 8)],
    "random_from": [(-1, ValueError), ("5", TypeError), (2.0, TypeError), (True, TypeError)],
    **_BOOLEANS,
}
_CHOICES = {
    "moments": "keep, align, rotate, reset",
    "source": "gradient, moment",
    "subspace": "svd, randomized, gram, random, late_random",
    "basis_dtype": "float32, bfloat16, int8, int4",
    "random_from": "",
    **dict.fromkeys(_BOOLEANS, "True or False"),
}
_TOGETHER = [
    ({"subspace": "late_random"}, "subspace='late_random' and random_from"),
    ({"random_from": 5}, "subspace='late_random' and random_from"),
    ({"subspace": "random", "random_from": 5}, "subspace='late_random' and random_from"),
    ({"subspace": "random", "moments": "align"}, "moments='align'.*rotate, reset or keep"),
    ({"subspace": "late_random", "random_from": 5, "moments": "align"}, "moments='align'.*rotate, reset or keep"),
]
_ROWS = [
    *(({name: value}, kind, f"{name}.*{_CHOICES[name]}") for name, rows in _VALUES.items() for value, kind in rows),
    *((group, ValueError, regex) for group, regex in _TOGETHER),
]

each_wrong_option = pytest.mark.parametrize(
    ("options", "kind", "regex"), _ROWS, ids=[str(options) for options, *_ in _ROWS]
)
