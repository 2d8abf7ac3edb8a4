"""DeepSpeed's Adam on the CPU goes on from its state with the bits of a run that was not cut."""

import copy

import pytest
import torch

pytest.importorskip("deepspeed")

from accelerate import PartialState
from deepspeed_ops import ENVIRONMENT, LIMIT, build_operators, remember_processor

from hf_galore import GaLoreAdamW
from hf_galore.integrations.deepspeed import _for_offload, _keep_powers

pytestmark = pytest.mark.timeout(2 * LIMIT)  # it is compiled once

STEPS, CUT = 60, 31  # by then a running product of β differs from its power
CONFIG = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.fixture
def operators(monkeypatch):
    build_operators()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    remember_processor()
    PartialState()  # for the log


def optimizer_on(params):
    chosen = _for_offload(GaLoreAdamW(params, lr=1e-2), dict(CONFIG))
    _keep_powers(chosen)
    return chosen


def stepped(params, optimizer, steps):
    for step in steps:
        for number, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * step + number))
        optimizer.step()


@pytest.mark.parametrize("used", [0, 3, CUT, STEPS])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_cut(used, operators):
    """Also where the optimizer has taken steps of its own meanwhile."""
    params, others = ([torch.nn.Parameter(torch.ones(1003)), torch.nn.Parameter(torch.ones(5))] for _ in range(2))
    whole, resumed = optimizer_on(params), optimizer_on(others)
    stepped(params, whole, range(CUT))
    stepped(others, resumed, range(used))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    stepped(params, whole, range(CUT, STEPS))
    stepped(others, resumed, range(CUT, STEPS))
    assert [torch.equal(*pair) for pair in zip(params, others, strict=True)] == [True, True]
