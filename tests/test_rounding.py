"""Stochastic rounding: its mean, its exact cases, and that its bits are hashed numbers and nothing else."""

import copy
import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.ops import add_
from hf_galore.rounding import RoundingKey, mix64, random_bits, round_stochastic

CPU = torch.device("cpu")
KEYS = {
    "the same key": RoundingKey(0, 0, 0),
    "next step": RoundingKey(0, 1, 0),
    "next parameter": RoundingKey(0, 0, 1),
    "next seed": RoundingKey(1, 0, 0),
}
numerics = settings(derandomize=True, deadline=None, max_examples=200)


def below_and_above(values):
    """The bfloat16 numbers next to float32 `values`, towards zero and away from it, as float64; equal where exact."""
    words = values.view(torch.int32)
    towards = (words >> 16 << 16).view(torch.float32)
    away = ((words + 0xFFFF) >> 16 << 16).view(torch.float32)
    return towards.double(), away.double()


def rounded(values, key):
    """`values` (rows, cols) rounded with the bits of `key`."""
    return round_stochastic(values, random_bits(key, range(values.shape[0]), values.shape[1], values.device))


def variance(values):
    """Of one rounding: f·(1 − f)·gap² with f the distance to the one neighbour as a part of the gap to the other."""
    towards, away = below_and_above(values)
    return (values.double() - towards).abs() * (away - values.double()).abs()


# The value.


def test_the_mean_is_the_value():
    """Over 1024 keys, within 5 standard deviations for each of 480 values from 1e-30 to 1e30 (1 in 3600 for all)."""
    keys = 1024
    values = (torch.randn(6, 80) * 10 ** torch.linspace(-30, 30, 6)[:, None]).float()
    # A quarter to three quarters of the way between two neighbours, where the mean of 1024 is a normal variable.
    values = (
        (values.view(torch.int32) & ~0xFFFF) | torch.randint(0x4000, 0xC000, values.shape, dtype=torch.int32)
    ).view(torch.float32)
    total = sum(rounded(values, RoundingKey(7, step, 3)).double() for step in range(keys))
    scores = (total / keys - values.double()) / (variance(values) / keys).sqrt()
    assert scores.abs().max() < 5
    # And no common drift: the mean of 480 uncorrelated scores has standard deviation 1/√480.
    assert scores.mean().abs() < 5 / math.sqrt(scores.numel())


@pytest.mark.parametrize("part", [1, 2, 0x1000, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF])
def test_the_chance_of_rounding_up_is_the_part_that_is_cut_off(part):
    """Of 2¹⁶ equally likely bit patterns exactly `part` round up: no approximation anywhere."""
    values = torch.full((1, 1 << 16), 0x3F800000 + part, dtype=torch.int32).view(torch.float32)
    bits = torch.arange(1 << 16, dtype=torch.int32)[None]
    assert (round_stochastic(values, bits) > 1).sum() == part


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_bfloat16_numbers_stay(key):
    """All 65536 of them: zeros with their sign, subnormals, infinities; every NaN stays a NaN."""
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)[None]
    out = rounded(every.float(), key)
    number = ~every.isnan()
    assert torch.equal(out.view(torch.int16)[number], every.view(torch.int16)[number])
    assert out[~number].isnan().all()


NANS = [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7FBFFFFF, 0x7FFF0001]


@pytest.mark.parametrize("bits", [0, 1, 0x8000, 0xFFFF])
@pytest.mark.parametrize("word", [sign | nan for nan in NANS for sign in (0, 1 << 31)], ids=hex)
def test_nan_stays_nan(word, bits):
    """Also those that are not bfloat16 numbers; 0x7fffffff is what NVIDIA GPUs produce."""
    values = torch.tensor([[word]]).to(torch.int32).view(torch.float32)
    assert values.isnan().all()
    assert round_stochastic(values, torch.tensor([[bits]], dtype=torch.int32)).isnan().all()


@given(
    value=st.floats(width=32, allow_nan=False, allow_subnormal=True),
    key=st.builds(RoundingKey, *[st.integers(0, 2**63)] * 3),
)
@numerics
def test_the_result_is_one_of_the_two_neighbours(value, key):
    """Of any float32; beyond the largest bfloat16 number the one away from zero is infinity."""
    values = torch.full((1, 8), value, dtype=torch.float32)
    out = rounded(values, key)
    towards, away = below_and_above(values)
    assert out.dtype == torch.bfloat16
    assert ((out.double() == towards) | (out.double() == away)).all()
    assert torch.equal(out.signbit(), values.signbit())


@given(value=st.floats(2.0**-149, 2.0**127, width=32), bits=st.lists(st.integers(0, 0xFFFF), min_size=2, max_size=2))
@numerics
def test_more_bits_never_round_lower(value, bits):
    assume(bits[0] <= bits[1])
    low, high = round_stochastic(torch.full((1, 2), value), torch.tensor([bits], dtype=torch.int32))[0]
    assert low <= high


# The bits.


@given(
    key=st.builds(RoundingKey, *[st.integers(0, 2**40)] * 3),
    start=st.integers(0, 50),
    height=st.integers(2, 20),
    cut=st.integers(1, 19),
    width=st.integers(1, 40),
    more=st.integers(0, 9),
)
@numerics
def test_bits_are_a_function_of_key_row_and_column(key, start, height, cut, width, more):
    """Not of which rows are asked for together, nor of how wide the matrix is."""
    whole = random_bits(key, range(start + height), width + more, CPU)
    rows = range(start, start + height)
    cut = min(start + cut, rows.stop - 1)
    parts = [random_bits(key, part, width, CPU) for part in (range(start, cut), range(cut, rows.stop))]
    assert whole.dtype == torch.int32
    assert whole.shape == (rows.stop, width + more)
    assert torch.equal(torch.cat(parts), whole[start:, :width])
    assert ((whole >= 0) & (whole <= 0xFFFF)).all()


@pytest.mark.parametrize("name", [name for name in KEYS if name != "the same key"])
def test_bits_depend_on_every_part_of_the_key(name):
    """Two matrices of independent 16-bit numbers agree in 1 of 65536 places: 1 of 2¹⁶ here, 8 at most."""
    one, other = (random_bits(KEYS[which], range(256), 256, CPU) for which in ("the same key", name))
    assert (one == other).sum() <= 8


@pytest.mark.parametrize("shape", [(4096, 64), (512, 512), (64, 4096), (1, 1 << 18)], ids=str)
@pytest.mark.parametrize("shift", [8, 0], ids=["high byte", "low byte"])
def test_bits_are_uniform(shape, shift):
    """χ² over 256 bins has mean 255 and standard deviation √(2·255); five of those on either side."""
    counts = torch.bincount(
        (random_bits(RoundingKey(1, 2, 3), range(shape[0]), shape[1], CPU).flatten() >> shift) & 255, minlength=256
    ).double()
    expected = shape[0] * shape[1] / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < 5 * math.sqrt(510)


@pytest.mark.parametrize("cells", [4, 16])
def test_rows_and_columns_are_uniform_each(cells):
    """No row and no column is biased: the mean of k uniform numbers has standard deviation 1/√(12k).

    5.5 of those for up to 8704 means: 1 in 3000 that any is further off.
    """
    uniform = (random_bits(RoundingKey(0, 5, 0), range(512 * cells), 512, CPU).double() + 0.5) / 65536 - 0.5
    for means, count in ((uniform.mean(dim=1), 512), (uniform.mean(dim=0), 512 * cells)):
        assert means.abs().max() < 5.5 / math.sqrt(12 * count)


LAGS = {
    "right neighbour": (0, 1, RoundingKey(0, 0, 0)),
    "lower neighbour": (1, 0, RoundingKey(0, 0, 0)),
    "diagonal neighbour": (1, 1, RoundingKey(0, 0, 0)),
    "two rows on": (2, 0, RoundingKey(0, 0, 0)),
    **{name: (0, 0, key) for name, key in KEYS.items() if name != "the same key"},
    "next step and parameter": (0, 0, RoundingKey(0, 1, 1)),
    "step for parameter": (1, 0, RoundingKey(0, 1, 0)),
}


@pytest.mark.parametrize("lag", LAGS)
def test_bits_are_uncorrelated(lag):
    """The mean of N products of independent numbers, uniform in ±1/2, has standard deviation 1/(12√N)."""
    down, right, key = LAGS[lag]
    height, width = 1024, 512
    one, other = (
        (random_bits(which, rows, width + 1, CPU)[:, cols].double() + 0.5) / 65536 - 0.5
        for which, rows, cols in (
            (RoundingKey(0, 0, 0), range(height), slice(width)),
            (key, range(down, down + height), slice(right, right + width)),
        )
    )
    assert (one * other).mean().abs() < 5 / (12 * math.sqrt(height * width))


def test_rows_and_columns_are_hashed_apart():
    """Element (i, j) knows nothing of (j, i): as above, over the pairs with i < j."""
    uniform = (random_bits(RoundingKey(0, 0, 0), range(512), 512, CPU).double() + 0.5) / 65536 - 0.5
    pairs = (uniform * uniform.T)[tuple(torch.triu_indices(512, 512, offset=1))]
    assert pairs.mean().abs() < 5 / (12 * math.sqrt(pairs.numel()))


def test_an_element_has_no_memory_of_the_step_before():
    """One element over 4096 steps: uniform in the mean, and uncorrelated from one step to the next."""
    steps = 4096
    bits = torch.cat([random_bits(RoundingKey(0, step, 9), range(3, 4), 5, CPU)[:, 4] for step in range(steps)])
    uniform = (bits.double() + 0.5) / 65536 - 0.5
    assert uniform.mean().abs() < 5 / math.sqrt(12 * steps)
    assert (uniform[1:] * uniform[:-1]).mean().abs() < 5 / (12 * math.sqrt(steps))


@given(numbers=st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=5), where=st.integers(0, 4))
@numerics
def test_mix64_is_a_hash(numbers, where):
    """64 bits, order matters, and one changed number changes it (2⁻⁶⁴ by chance)."""
    first = mix64(*numbers)
    assert 0 <= first < 2**64
    changed = list(numbers)
    changed[where % len(changed)] += 1
    assert mix64(*changed) != first
    assert len(numbers) < 2 or numbers[0] == numbers[1] or mix64(numbers[1], numbers[0], *numbers[2:]) != first


# What it is for.


def test_small_updates_are_lost_to_nearest_and_kept_by_chance():
    """lr·scale = 2.5e-5 on N(0, 1) weights: most of bfloat16's gaps are 100 times as large.

    To nearest only weights below about 0.01 can move: under 1 %. Stochastically the mean movement is the update,
    within 5 standard deviations of the mean of a million uncorrelated roundings of known variance.
    """
    start = torch.randn(1000, 1000).bfloat16()
    delta = torch.full((1000, 1000), 2.5e-5)
    plain, chance = start.clone(), start.clone()
    add_(plain, delta, alpha=-1.0, beta=1.0, key=None)
    add_(chance, delta, alpha=-1.0, beta=1.0, key=RoundingKey(0, 0, 0))
    assert (plain != start).double().mean() < 0.01
    exact = start.float() - delta
    error = (chance.double() - exact.double()).mean().abs()
    assert error < 5 * (variance(exact).sum().sqrt() / exact.numel())
    # The test sees a loss of the update: it is many times the error allowed.
    assert (plain.double() - exact.double()).mean().abs() > 5 * (variance(exact).sum().sqrt() / exact.numel())


def test_movement_adds_up_over_steps():
    """400 steps of 2.5e-5 move a weight of 1 by 0.01 in the mean; to nearest by nothing (a gap below 1 is 2⁻⁸).

    A step's variance is at most u·gap, for an update u and a gap of at most 2⁻⁷, as f·(1−f) <= f.
    """
    size, steps, update = 4096, 400, 2.5e-5
    plain, chance = torch.ones(1, size).bfloat16(), torch.ones(1, size).bfloat16()
    delta = torch.full((1, size), update)
    for step in range(steps):
        add_(plain, delta, alpha=-1.0, beta=1.0, key=None)
        add_(chance, delta, alpha=-1.0, beta=1.0, key=RoundingKey(0, step, 0))
    assert (plain == 1).all()
    moved = (1 - chance.double()).mean().item()
    assert abs(moved - steps * update) < 5 * math.sqrt(steps * update * 2**-7 / size)


CLASSES = {
    GaLoreAdamW: {"lr": 1e-3},
    GaLoreAdamW8bit: {"lr": 1e-3, "min_8bit_size": 0},
    GaLoreAdafactor: {"lr": 1e-3, "relative_step": False, "scale_parameter": False, "beta1": 0.9},
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_a_resumed_run_rounds_as_an_uninterrupted_one(cls, state_dtype):
    """The bits follow the step count of the state: nothing else has to be saved."""
    start = [torch.randn(16, 12).bfloat16(), torch.randn(12).bfloat16()]
    gradients = [[torch.randn_like(param) for param in start] for _ in range(6)]

    def run(params, steps, state_dict=None):
        params = [Parameter(param.detach().clone()) for param in params]
        groups = [{"params": params[:1], "rank": 3, "update_proj_gap": 2}, {"params": params[1:]}]
        optimizer = cls(groups, **CLASSES[cls], state_dtype=state_dtype)
        if state_dict is not None:
            optimizer.load_state_dict(state_dict)
        for grads in steps:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
        return params, copy.deepcopy(optimizer.state_dict())

    straight, _ = run(start, gradients)
    half, state_dict = run(start, gradients[:3])
    resumed, _ = run(half, gradients[3:], state_dict)
    for one, other in zip(straight, resumed, strict=True):
        assert torch.equal(one, other)


FINGERPRINT = """
import hashlib, torch
from hf_galore import GaLoreAdamW
from hf_galore.rounding import RoundingKey, random_bits

def fingerprint():
    bits = random_bits(RoundingKey(11, 22, 33), range(5, 900), 700, torch.device("cpu"))
    param = torch.nn.Parameter((torch.arange(600).reshape(20, 30) / 64).bfloat16())
    optimizer = GaLoreAdamW([param], lr=1e-3, state_dtype="bfloat16", seed=5)
    for step in range(4):
        param.grad = (param.detach() - step).bfloat16()
        optimizer.step()
    words = (bits.to(torch.uint16), param.detach().view(torch.int16))
    return hashlib.sha256(b"".join(word.numpy().tobytes() for word in words)).hexdigest()
"""


def test_two_processes_round_alike():
    """Another interpreter, hash seed, generator seed and number of threads: the same bits and the same weights."""
    here = {"__name__": "fingerprint"}
    exec(FINGERPRINT, here)
    there = subprocess.run(
        [sys.executable, "-c", f"{FINGERPRINT}\ntorch.manual_seed(99)\nprint(fingerprint())"],
        env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.strip()
    assert len(there) == len(hashlib.sha256().hexdigest())
    assert here["fingerprint"]() == there
