"""When bases are refreshed: every T steps, staggered, or lazily, against a literal simulation."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_galore.schedule import due, offset, postponed, similarity
from references import qgalore_refreshes

EYE = torch.eye(12)
ONE, OTHER = EYE[:, :3], EYE[:, 3:6]  # bases that have nothing to do with each other


def between(cosine, signs=(1.0, 1.0, 1.0)):
    """A basis whose columns have this cosine with those of ONE, with signs."""
    return (cosine * ONE + math.sqrt(1 - cosine**2) * OTHER) * torch.tensor(signs)


# Every T steps.


@settings(max_examples=100, deadline=None, derandomize=True)
@given(gap=st.integers(1, 20), data=st.data())
def test_property_every_gap_steps(gap, data):
    """The first refresh; then `early` steps before each multiple of the gap."""
    early, first = data.draw(st.integers(0, gap - 1)), data.draw(st.integers(0, 30))
    expected = [first, *(k * gap - early for k in range(1, 200) if first < k * gap - early < 100)]
    assert [step for step in range(100) if due(step, gap, early, None, first)] == expected
    if first == 0:
        assert [step for step in range(100) if due(step, gap, early, None)] == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(gap=st.integers(1, 40), count=st.integers(1, 60))
def test_property_stagger_spreads_the_matrices_over_the_gap(gap, count):
    """In any T steps after the first, each matrix refreshes once, and no step has more than ⌈L/T⌉ refreshes."""
    early = [offset(index, count, gap, True) for index in range(count)]
    assert early[0] == 0
    assert early == sorted(early)
    assert all(0 <= steps < gap for steps in early)
    for start in range(1, gap + 2):
        window = range(start, start + gap)
        refreshes = [[step for step in window if due(step, gap, one, None)] for one in early]
        assert all(len(steps) == 1 for steps in refreshes)
        busy = [sum(step in steps for steps in refreshes) for step in window]
        assert max(busy) <= math.ceil(count / gap)
    assert [offset(index, count, gap, False) for index in range(count)] == [0] * count


# Lazily.


def simulated(gap, early, similar, first=0):
    """The steps of refreshes, with the schedule asked before every step whether it is due."""
    found, lazy, old, step = [], None, None, 0
    bases = iter(itertools.accumulate([ONE, *similar], lambda basis, alike: basis if alike else basis.roll(3, 0)))
    while len(found) <= len(similar):
        if due(step, gap, early, lazy, first):
            new = next(bases)
            lazy, old = postponed(lazy, step, gap, early, new, old), new
            found.append(step)
        step += 1
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(gap=st.integers(1, 5), similar=st.lists(st.booleans() | st.just(True), max_size=16), data=st.data())
def test_property_lazy_doubles_after_five_in_a_row(gap, similar, data):
    early, first = data.draw(st.integers(0, gap - 1)), data.draw(st.integers(0, 20))
    assert simulated(gap, early, similar, first) == qgalore_refreshes(gap, early, similar, first)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(gap=st.integers(1, 12), data=st.data())
def test_property_a_basis_that_turns_is_refreshed_as_without_lazy(gap, data):
    """Staggered matrices stay apart, whenever the first refresh was."""
    early, first = data.draw(st.integers(0, gap - 1)), data.draw(st.integers(0, 20))
    found = simulated(gap, early, [False] * 8, first)
    assert found == [step for step in range(found[-1] + 1) if due(step, gap, early, None, first)]


def test_lazy_by_example():
    """Gap 10, 3 steps early: a turn begins the count again, five similar refreshes make it 20, five more 40."""
    similar = [True] * 4 + [False] + [True] * 11
    expected = [0, 7, 17, 27, 37, 47, 57, 67, 77, 87, 97, 117, 137, 157, 177, 197, 237]
    assert simulated(10, 3, similar) == qgalore_refreshes(10, 3, similar) == expected


@pytest.mark.parametrize(("cosine", "counts"), [(0.0, 0), (0.39, 0), (0.41, 1), (1.0, 1)])
def test_four_tenths_are_similar(cosine, counts):
    first = postponed(None, 0, 10, 0, ONE, None)
    assert first.tolist() == [10, 10, 0]
    assert (first.dtype, first.device.type) == (torch.int64, "cpu")
    assert postponed(first, 10, 10, 0, between(cosine), ONE).tolist() == [20, 10, counts]


def test_the_gap_in_force_is_that_of_the_schedule():
    """It has grown; what the group says is where it began. Nothing is early after the first refresh."""
    assert postponed(torch.tensor([40, 20, 4]), 40, 10, 3, ONE, ONE).tolist() == [80, 40, 0]
    assert postponed(torch.tensor([40, 20, 4]), 40, 10, 3, OTHER, ONE).tolist() == [60, 20, 0]


# How similar two bases are.


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    cosine=st.floats(-1.0, 1.0),
    signs=st.tuples(*[st.sampled_from([1.0, -1.0])] * 3),
    lengths=st.tuples(*[st.floats(0.5, 2.0)] * 3),
)
def test_property_similarity_is_the_mean_cosine_whatever_the_signs(cosine, signs, lengths):
    """Nor does the length of a column count, which integers leave a little off 1."""
    new = between(cosine, signs) * torch.tensor(lengths)
    assert similarity(new, ONE) == pytest.approx(abs(cosine), abs=1e-6)
    assert similarity(new * 2, ONE * 3) == pytest.approx(abs(cosine), abs=1e-6)
    mixed = torch.cat((new[:, :1], ONE[:, 1:]), dim=1)
    assert similarity(mixed, ONE) == pytest.approx((abs(cosine) + 2) / 3, abs=1e-6)


def test_signs_of_both_sides_have_nothing_to_do_with_each_other():
    """P stays and Q turns round: that is the same basis, which the gradient −G may have of LAPACK."""
    both, turned = (torch.cat((ONE, sign * OTHER)) for sign in (1, -1))
    assert similarity(turned, both, (12, 12)) == pytest.approx(1.0)
    assert postponed(torch.tensor([10, 10, 0]), 10, 10, 0, turned, both, (12, 12)).tolist() == [20, 10, 1]


def test_a_basis_of_another_shape_is_not_similar():
    assert similarity(ONE, EYE[:, :4]) == 0.0
