"""Where the small parameters B of the projected backward, their moments and the rate of their step are.

An ordinary torch optimizer has all of them (`OptimizerStore`). An engine that shards them supplies another store, and
another storage of B where its parameters are not what a step writes to.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_galore.optim.moments import bias_corrections
from hf_galore.optim.optimizer import LowRankOptimizer

if TYPE_CHECKING:
    from hf_galore.lowrank_layer import LowRankLayer

Group = dict[str, Any]
Moments = dict[str, Tensor]
Change = Callable[[Moments, float, float], None]  # of the moments and the bias corrections of both, in place


class Momentum(NamedTuple):
    """The first moment of a small parameter after a step, the gradient of that step, and the moment's decay rate."""

    after: Tensor
    low: Tensor
    beta: float


class UpdateStorage:
    """Reads and zeroes B where it is the parameter of its module, whole."""

    def read(self, layer: "LowRankLayer") -> Tensor:
        """B in working precision."""
        return layer.update.detach().to(layer.work)

    def clear(self, layer: "LowRankLayer") -> None:
        """B ← 0."""
        with torch.no_grad():
            layer.wake().zero_()


class UpdateStore(Protocol):
    """What the steps of the projected backward ask of whoever steps the small parameters."""

    def stepping(self) -> Iterable["LowRankLayer"]:
        """The layers that the step at hand moves, in an order that does not change."""

    def decay(self, layer: "LowRankLayer") -> float:
        """1 − lr·weight_decay of the step just taken."""

    def first_moment(self, layer: "LowRankLayer") -> Tensor:
        """The first moment; the low-rank gradient where the rule keeps none; zeros where there is neither yet."""

    def momentum(self, layer: "LowRankLayer") -> Momentum:
        """The first moment with the gradient that went into it last; asked for by source='moment' alone."""

    def change_moments(self, layer: "LowRankLayer", change: Change) -> None:
        """Lets `change` alter the moments in place, in working precision; does nothing where there are none yet."""

    def reset_moments(self, layer: "LowRankLayer") -> None:
        """Makes the moments zero, and lets their bias corrections start again."""

    def keep(self, layer: "LowRankLayer", kept: dict[str, Tensor]) -> None:
        """Keeps what the next steps need of the layer's basis for the optimizer's state dict."""


class OptimizerStore:
    """The small parameters as a torch optimizer steps them, hf_galore's or any other."""

    def __init__(self, layers: dict[Tensor, "LowRankLayer"], optimizer: torch.optim.Optimizer) -> None:
        self.layers, self.optimizer = layers, optimizer
        self._known = self.groups()

    def _group(self, layer: "LowRankLayer") -> Group:
        return self._known[layer.update]

    def groups(self) -> dict[Tensor, Group]:
        """The group of each parameter, in the optimizer's order."""
        return {param: group for group in self.optimizer.param_groups for param in group["params"]}

    def stepping(self) -> list["LowRankLayer"]:
        self._known = self.groups()  # a state dict that was loaded has replaced them
        return [self.layers[p] for p in self._known if p in self.layers and p.grad is not None]

    def decay(self, layer: "LowRankLayer") -> float:
        group = self._group(layer)
        return 1.0 - self._rate(layer, group) * (group.get("weight_decay") or 0.0)

    def _rate(self, layer: "LowRankLayer", group: Group) -> float:
        if isinstance(self.optimizer, LowRankOptimizer):
            return self.optimizer.rate(group, layer.basis.steps, layer.update)
        return float(group["lr"])

    def first_moment(self, layer: "LowRankLayer") -> Tensor:
        state, gradient = self.optimizer.state.get(layer.update), layer.update.grad
        if not state:
            return torch.zeros_like(layer.update) if gradient is None else gradient
        if isinstance(self.optimizer, LowRankOptimizer):
            state = self.optimizer.read_moments(layer.update, self._group(layer))
        moment: Tensor | None = state.get("exp_avg", gradient)
        return torch.zeros_like(layer.update) if moment is None else moment

    def momentum(self, layer: "LowRankLayer") -> Momentum:
        gradient = layer.update.grad
        low = torch.zeros_like(layer.update) if gradient is None else gradient
        return Momentum(self.first_moment(layer), low, float(self._group(layer)["betas"][0]))

    def change_moments(self, layer: "LowRankLayer", change: Change) -> None:
        state, group = self.optimizer.state.get(layer.update), self._group(layer)
        if not state:
            return
        bias1, bias2 = bias_corrections(group, int(state.get("step", 0)))
        if isinstance(self.optimizer, LowRankOptimizer):
            self.optimizer.change_moments(layer.update, group, lambda moments: change(moments, bias1, bias2))
            return
        names = {_meaning(name): name for name, value in state.items() if _is_moment(name, value)}
        moments = {meaning: state[name].to(layer.work) for meaning, name in names.items()}
        change(moments, bias1, bias2)
        for meaning, name in names.items():
            state[name].copy_(moments[meaning])

    def reset_moments(self, layer: "LowRankLayer") -> None:
        state = self.optimizer.state.get(layer.update)
        if not state:
            return
        if isinstance(self.optimizer, LowRankOptimizer):
            self.optimizer.reset_moments(layer.update, self._group(layer))
            return
        for name, value in state.items():
            if _is_moment(name, value):
                value.zero_()
        if "step" in state:
            state["step"] = state["step"] * 0  # a number or a tensor; it counts for the bias corrections alone

    def keep(self, layer: "LowRankLayer", kept: dict[str, Tensor]) -> None:
        state = self.optimizer.state[layer.update]
        state.pop("test_matrix", None)
        state.update(kept)


def _is_moment(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and (name.startswith("exp_avg") or name == "momentum_buffer")


def _meaning(name: str) -> str:
    """What `rotate` calls a moment of torch's optimizers: SGD's momentum is a first moment."""
    return "exp_avg" if name == "momentum_buffer" else name
