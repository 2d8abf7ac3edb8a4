"""Rows of the optimizers' tests: the classes, how their groups are laid out, and a small problem to step on."""

import copy
import io
from typing import NamedTuple

import pytest
import torch
from torch.nn import Parameter

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit

LAYOUTS = ("full rank", "low rank", "mixed")
LOW_RANK = {"rank": 2, "update_proj_gap": 3, "scale": 1.0}
ADAFACTOR = {"lr": 0.01, "relative_step": False, "scale_parameter": False}

# The keyword arguments that make the row a fair test of its class: 8 bits also for these small moments, and a learning
# rate where Adafactor would choose its own.
BASE = {
    GaLoreAdamW: {"lr": 0.01},
    GaLoreAdamW8bit: {"lr": 0.01, "min_8bit_size": 0},
    GaLoreAdafactor: ADAFACTOR,
}


class Problem(NamedTuple):
    """Parameters, their groups, and the loss of a small regression whose gradients have full rank."""

    params: dict[str, Parameter]
    groups: list[dict]
    inputs: torch.Tensor

    def loss(self):
        high, low, bias = self.params["tall"], self.params["wide"], self.params["bias"]
        hidden = self.inputs.to(high.dtype) @ high.T + bias
        return (hidden.square().mean() + (self.inputs.to(low.dtype) @ low).square().mean()).float()

    def backward(self):
        for param in self.params.values():
            param.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def weights(self):
        return {name: param.detach().clone() for name, param in self.params.items()}


def problem(layout, dtype=torch.float32, contiguous=True, seed=0, size=1, **low_rank):
    """`size` multiplies the sides of the matrices."""
    generator = torch.Generator().manual_seed(seed)

    def parameter(*shape):
        if contiguous:
            return Parameter(torch.randn(shape, generator=generator).to(dtype))
        return Parameter(torch.randn((*shape, 2), generator=generator).to(dtype)[..., 0])

    shapes = {"tall": (10, 6), "wide": (6, 12), "bias": (10,)}
    params = {name: parameter(*(side * size for side in shape)) for name, shape in shapes.items()}
    inputs = torch.randn(16, 6 * size, generator=generator)
    projected = {"full rank": (), "low rank": ("tall", "wide"), "mixed": ("wide",)}[layout]
    groups = [
        {"params": [param for name, param in params.items() if name not in projected]},
        {"params": [params[name] for name in projected], **LOW_RANK, **low_rank},
    ]
    if layout == "low rank":  # a vector cannot be projected, and this row is to have no other group
        params["bias"].requires_grad_(False)
        groups = groups[1:]
    return Problem(params, [group for group in groups if group["params"]], inputs)


def train(task, optimizer, steps):
    for _ in range(steps):
        task.backward()
        optimizer.step()


def make(cls, layout, dtype=torch.float32, options=None, **kwargs):
    """A problem and its optimizer."""
    task = problem(layout, dtype, **kwargs)
    return task, cls(task.groups, **(BASE[cls] if options is None else options))


def assert_same(left, right):
    """Equal bit for bit, through dictionaries and lists, dtypes included."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def contents(optimizer):
    """A copy of the state dict, without the flag that torch gives to whatever has been loaded or copied."""
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        group.pop("differentiable", None)
    return state_dict


def saved(optimizer):
    """The state dict after torch.save and torch.load(weights_only=True)."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


each_class = pytest.mark.parametrize("cls", list(BASE), ids=lambda cls: cls.__name__)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
