"""Stochastic rounding to bfloat16 with bits that are a function of (seed, step, parameter, element).

Nothing is drawn from a generator, so the bits are the same on every data-parallel rank, after a resume and on every
device, and torch's global generator is left alone.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


class RoundingKey(NamedTuple):
    """What the rounding bits of one parameter at one step depend on, besides the element's row and column."""

    seed: int
    step: int
    parameter: int


def key_numbers(key: RoundingKey | None) -> list[int] | None:
    """The key as an op takes it."""
    return None if key is None else signed_words(key)


def key_parts(key: RoundingKey | None) -> tuple[list[int] | None, list[int]]:
    """The key as an op takes it that has one (seed, step) for all parameters, and a list of these."""
    numbers = key_numbers(key)
    return (None, [0]) if numbers is None else (numbers[:2], numbers[2:])


def key_of(common: Sequence[int] | None, parameter: int) -> RoundingKey | None:
    """The key of one parameter, of the (seed, step) that all have in common: what `key_parts` took apart."""
    return None if common is None else RoundingKey(common[0], common[1], parameter)


def signed_words(numbers: Iterable[int]) -> list[int]:
    """Numbers of a key as signed 64-bit integers, which make the same bits."""
    return [((number & _MASK64) ^ (1 << 63)) - (1 << 63) for number in numbers]


def mix64(*numbers: int) -> int:
    """A 64-bit hash of a few integers (splitmix64's finaliser over a running sum): the same on every machine."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def random_words(key: RoundingKey, rows: range, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hashed odd 32-bit words (int32): one for each row, (len(rows),), and one for each column, (cols,).

    A word is a function of the key, of whether it is a row's or a column's, and of its number.
    """
    keys = [mix64(*key, which) for which in (0, 1)]
    z = torch.cat([torch.arange(rows.start, rows.stop, device=device), torch.arange(cols, device=device)])
    z *= -7046029254386353131
    parts = z.split([len(rows), cols])
    for part, number in zip(parts, keys, strict=True):
        part += number - (1 << 64) if number >> 63 else number
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))).mul_(factor)
    row_words, col_words = ((z >> 32) | 1).to(torch.int32).split([len(rows), cols])
    return row_words, col_words


def bits_of(row_words: Tensor, col_words: Tensor) -> Tensor:
    """16 random bits for each element of these rows: int32 (rows, cols) in [0, 65535].

    Element (i, j) gets the upper half of row_word(i) · col_word(j) mod 2³²: one multiplication for each element.
    Uniform for each element, and pairwise uncorrelated (tests/test_rounding.py).
    """
    products = row_words[:, None] * col_words
    return products.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def random_bits(key: RoundingKey, rows: range, cols: int, device: torch.device) -> Tensor:
    """`bits_of` rows `rows` of a (…, cols) matrix."""
    return bits_of(*random_words(key, rows, cols, device))


def round_stochastic(values: Tensor, bits: Tensor) -> Tensor:
    """float32 `values` rounded to bfloat16: up with the probability of the part that is cut off.

    Exact bfloat16 numbers and infinities stay as they are; NaN stays NaN.
    """
    words = values.view(torch.int32).add(bits).bitwise_and_(-(1 << 16)).view(torch.float32)
    if not math.isfinite(values.sum()):  # bits added to a NaN may overflow into a number; testing each one is slow
        words = torch.where(values.isnan(), values, words)
    return words.to(torch.bfloat16)
