"""λ schedules: their shape, their ends and their errors."""

import math

import pytest
from torch import nn

from hf_galore import replace_linear
from hf_galore.nn.convert import bitlinears
from hf_galore.nn.warmup import SCHEDULES, LambdaSchedule, set_lambdas


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 4, 7, 1000])
def test_every_schedule_rises_from_0_to_1(kind, steps):
    values = [LambdaSchedule(kind, steps).at(step) for step in range(steps + 3)]
    assert values[0] == 0.0
    assert values[steps:] == [1.0] * 3
    assert values == sorted(values)
    assert all(0.0 <= value <= 1.0 for value in values)


def test_what_they_are_in_between():
    assert LambdaSchedule("linear", 10).at(3) == pytest.approx(0.3)
    assert LambdaSchedule("cosine", 10).at(5) == pytest.approx(0.5)
    assert LambdaSchedule("cosine", 10).at(2) == pytest.approx((1 - math.cos(0.2 * math.pi)) / 2)
    assert LambdaSchedule("sigmoid", 10).at(5) == pytest.approx(0.5)
    assert LambdaSchedule("sigmoid", 10).at(2) == pytest.approx(1 / (1 + math.exp(3)), abs=0.01)
    assert [LambdaSchedule("step", 8).at(step) for step in range(8)] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("exponential", 10), ValueError, "kind='exponential' is not one of linear, cosine, sigmoid, step"),
        (("linear", 0), ValueError, "Invalid steps: 0 - should be >= 1"),
        (("linear", 0.5), TypeError, "steps=0.5 is not an integer"),
    ],
)
def test_bad_schedules_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        LambdaSchedule(*arguments)


def test_lambda_is_that_of_all_layers():
    model = replace_linear(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    set_lambdas(model, 0.25, 0.75)
    assert {(one.weight_lambda, one.activation_lambda) for one in bitlinears(model).values()} == {(0.25, 0.75)}
    with pytest.raises(ValueError, match=r"no BitLinear.*replace_linear or BitLinearConfig"):
        set_lambdas(nn.Linear(4, 4), 1.0, 1.0)
