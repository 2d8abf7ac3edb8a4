"""Rounding to code books: to nearest it is exact, stochastically it is unbiased, and levels stay where they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_galore.codebook import quantize_blocks, round_to_integers, round_to_levels
from hf_galore.rounding import RoundingKey, random_bits

BOOKS = {
    "even": torch.linspace(-1, 1, 16),
    "uneven": torch.tensor([-1.0, -0.7, -0.1, 0.0, 0.005, 0.3, 1.0]),
    "with two zeros": torch.tensor([-1.0, -0.005, 0.0, 0.0, 0.005, 1.0]),
    "two levels": torch.tensor([-1.0, 1.0]),
}
each_book = pytest.mark.parametrize("levels", BOOKS.values(), ids=BOOKS)
EVERY_BIT = torch.arange(1 << 16, dtype=torch.int32)


def bits(count, step=0):
    return random_bits(RoundingKey(0, step, 0), range(1), count, torch.device("cpu"))[0]


@each_book
def test_nearest_is_the_level_at_the_least_distance(levels):
    values = torch.rand(1000) * 2.4 - 1.2
    found = levels[round_to_levels(values, levels, None)]
    torch.testing.assert_close((values - found).abs(), (values[:, None] - levels).abs().amin(1), rtol=0, atol=0)


@each_book
def test_stochastic_rounding_takes_a_neighbour_with_the_right_probability(levels):
    """Over all 65536 bits the mean is the value, to the bits' resolution of half a 65536th of the gap."""
    for value in [-1.0, -0.9, -0.05, -1e-4, 0.0, 1e-3, 0.2, 0.77, 1.0]:
        found = levels[round_to_levels(torch.full((1 << 16,), value), levels, EVERY_BIT)].double()
        below, above = levels[levels <= value].max(), levels[levels >= value].min()
        assert set(found.unique().tolist()) <= {float(below), float(above)}
        assert abs(float(found.mean()) - value) <= float(above - below) * 2**-17 + 1e-7


@each_book
def test_levels_stay_also_when_a_rounding_error_has_moved_them(levels):
    for moved in (levels, levels * (1 + 1e-7), levels * (1 - 1e-7)):
        for bit in (0, 65535):
            found = round_to_levels(moved, levels, torch.full(levels.shape, bit, dtype=torch.int32))
            assert torch.equal(levels[found], levels)


@each_book
def test_beyond_the_ends(levels):
    values = torch.tensor([-9.0, 9.0, float("-inf"), float("inf"), float("nan")])
    for how in (None, torch.tensor([0, 0, 65535, 65535, 0], dtype=torch.int32)):
        found = round_to_levels(values, levels, how)
        assert found.tolist()[:4] == [0, len(levels) - 1] * 2
        assert 0 <= found[4] < len(levels)


@settings(max_examples=100, deadline=None)
@given(st.floats(-127, 127, width=32))
def test_whole_numbers(value):
    values = torch.full((1 << 16,), value)
    assert round_to_integers(values, 127, None)[0] == torch.tensor(value).round()
    found = round_to_integers(values, 127, EVERY_BIT)
    assert found.min() >= torch.tensor(value).floor()
    assert found.max() <= torch.tensor(value).ceil()
    assert abs(float(found.double().mean()) - value) <= 2**-17 + 1e-5  # 65536ths, and float32 sums near 127


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
@each_book
def test_blocks(levels, count):
    """Each block's largest magnitude is its scale; nearest is the nearest; random is within one gap."""
    values = torch.randn(count)
    scales = torch.stack([block.abs().max() for block in values.split(64)])
    of = scales.repeat_interleave(64)[:count]
    gap = (levels[1:] - levels[:-1]).max()
    for how, share in ((None, 0.5), (bits(count), 1.0)):
        ranks, maxima = quantize_blocks(values, 64, levels, how)
        assert torch.equal(maxima, scales)
        assert ((levels[ranks] * of - values).abs() <= share * gap * of * (1 + 1e-5)).all()


@each_book
@pytest.mark.parametrize("how", ["random", "on levels", "near levels"])
def test_many_values_at_once_are_rounded_as_few_are(levels, how):
    """Many take another way, which may differ for a value within a rounding error of a level, and then by that."""
    values = {
        "random": torch.rand(20_000) * 2.2 - 1.1,
        "on levels": levels.repeat(2000),
        "near levels": (levels.repeat(2000) * (1 + torch.randn(2000 * len(levels)) * 1e-7)),
    }[how]
    random = bits(len(values))
    many = levels[round_to_levels(values, levels, random)]
    parts = zip(values.split(100), random.split(100), strict=True)
    few = levels[torch.cat([round_to_levels(part, levels, its) for part, its in parts])]
    assert torch.equal(many, few)
    values[7] = float("nan")
    assert 0 <= round_to_levels(values, levels, random)[7] < len(levels)


def test_blocks_of_zeros_and_with_a_nan():
    levels = BOOKS["uneven"]
    values = torch.randn(192)
    values[:64], values[70] = 0.0, float("nan")
    for how in (None, bits(192)):
        ranks, maxima = quantize_blocks(values, 64, levels, how)
        decoded = levels[ranks] * maxima.repeat_interleave(64)
        assert maxima[0] == 0
        assert not decoded[:64].any()
        assert decoded[64:128].isnan().all()
        assert decoded[128:].isfinite().all()


def test_blocks_are_unbiased():
    """The mean over 400 keys is within six standard deviations, each from the two neighbours' distances."""
    levels, keys = BOOKS["uneven"], 400
    values = torch.randn(256)
    mean = torch.zeros(256, dtype=torch.float64)
    for step in range(keys):
        ranks, maxima = quantize_blocks(values, 64, levels, bits(256, step))
        mean += (levels[ranks] * maxima.repeat_interleave(64)).double() / keys
    of = maxima.repeat_interleave(64)
    x = values / of
    below = torch.stack([levels[levels <= one].max() for one in x.clamp(-1, 1)])
    above = torch.stack([levels[levels >= one].min() for one in x.clamp(-1, 1)])
    deviation = ((x - below) * (above - x)).clamp(min=0).sqrt() * of
    assert ((mean - values).abs() <= 6 * deviation / keys**0.5 + 2e-5).all()
