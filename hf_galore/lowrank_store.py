"""Where the small parameters B of the projected backward, their moments and the rate of their step are.

An ordinary torch optimizer has all of them (`OptimizerStore`). An engine that shards them supplies another store, and
another storage of B where its parameters are not what a step writes to.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_galore.optim.moments import bias_corrections
from hf_galore.optim.optimizer import LowRankOptimizer
from hf_galore.shards import is_sharded, local, spread, whole

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
    """B where it is the parameter of its module, whole."""

    def read(self, layer: "LowRankLayer") -> Tensor:
        """B in working precision, or this rank's rows of it."""
        update: Tensor = local(layer.update.detach())
        return update.to(layer.work)

    def clear(self, layer: "LowRankLayer") -> None:
        """B ← 0."""
        with torch.no_grad():
            layer.wake().zero_()

    def has_gradient(self, layer: "LowRankLayer") -> bool:
        """Whether a backward pass has left B a gradient that nobody has thrown away since.

        FSDP2 puts another B into the module for a pass, without the gradients of those before; it is True there.
        """
        if layer.update is not layer.own_update:
            return True
        gradient = layer.update.grad
        return gradient is not None and bool(gradient.any())


class UpdateStore(Protocol):
    """What the steps of the projected backward ask of whoever steps the small parameters."""

    def stepping(self) -> Iterable["LowRankLayer"]:
        """The layers that the step at hand moves, in an order that does not change."""

    def decay(self, layer: "LowRankLayer") -> float:
        """1 − lr·weight_decay of the step just taken."""

    def first_moment(self, layer: "LowRankLayer") -> Tensor:
        """All of the first moment; of the low-rank gradient where the rule has none; zeros before there is either."""

    def momentum(self, layer: "LowRankLayer") -> Momentum:
        """The first moment with the gradient that went into it last; asked for by source='moment' alone."""

    def change_moments(self, layer: "LowRankLayer", change: Change) -> None:
        """Lets `change` alter the moments in place, in working precision; does nothing where there are none yet.

        On the right each row is changed for itself, and a rank may give it the rows that it has.
        """

    def reset_moments(self, layer: "LowRankLayer") -> None:
        """Makes the moments zero, and lets their bias corrections start again."""

    def keep(self, layer: "LowRankLayer", kept: dict[str, Tensor]) -> None:
        """Keeps what the next steps need of the layer's basis for the optimizer's state dict."""


class OptimizerStore:
    """The small parameters as a torch optimizer steps them, hf_galore's or any other."""

    def __init__(self, layers: Mapping[Tensor, "LowRankLayer"], optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.resets = any(layer.settings.moments == "reset" for layer in layers.values())
        # By its place in the optimizer, which stays when FSDP2 puts another parameter there.
        self._places = {
            layers[param]: (number, index)
            for number, group in enumerate(optimizer.param_groups)
            for index, param in enumerate(group["params"])
            if param in layers
        }

    @property
    def layers(self) -> dict[Tensor, "LowRankLayer"]:
        """The layers by their B as the optimizer has it, in the optimizer's order."""
        return {self.param(layer): layer for layer in self._places}

    def param(self, layer: "LowRankLayer") -> Tensor:
        """B as the optimizer has it."""
        param: Tensor = self._group(layer)["params"][self._places[layer][1]]
        return param

    def _group(self, layer: "LowRankLayer") -> Group:
        return self.optimizer.param_groups[self._places[layer][0]]

    def groups(self) -> dict[Tensor, Group]:
        """The group of each parameter, in the optimizer's order."""
        return {param: group for group in self.optimizer.param_groups for param in group["params"]}

    def stepping(self) -> list["LowRankLayer"]:
        return [layer for param, layer in self.layers.items() if param.grad is not None]

    def decay(self, layer: "LowRankLayer") -> float:
        group = self._group(layer)
        return 1.0 - self._rate(layer, group) * (group.get("weight_decay") or 0.0)

    def _rate(self, layer: "LowRankLayer", group: Group) -> float:
        if isinstance(self.optimizer, LowRankOptimizer):
            return self.optimizer.rate(group, layer.basis.steps, self.param(layer))
        return float(group["lr"])

    def first_moment(self, layer: "LowRankLayer") -> Tensor:
        param = self.param(layer)
        state, gradient = self.optimizer.state.get(param), param.grad
        if state and isinstance(self.optimizer, LowRankOptimizer):
            moment: Tensor | None = self.optimizer.read_moments(param, self._group(layer)).get("exp_avg")
            if moment is not None:
                return whole(spread(moment, param) if is_sharded(param) else moment)
        found = (state or {}).get("exp_avg", gradient)
        return whole(torch.zeros_like(param) if found is None else found)

    def momentum(self, layer: "LowRankLayer") -> Momentum:
        param = self.param(layer)
        low = whole(torch.zeros_like(param) if param.grad is None else param.grad)
        return Momentum(self.first_moment(layer), low, float(self._group(layer)["betas"][0]))

    def change_moments(self, layer: "LowRankLayer", change: Change) -> None:
        param, group = self.param(layer), self._group(layer)
        state = self.optimizer.state.get(param)
        if not state:
            return
        bias1, bias2 = bias_corrections(group, int(state.get("step", 0)))
        if isinstance(self.optimizer, LowRankOptimizer):
            self.optimizer.change_moments(param, group, lambda moments: change(moments, bias1, bias2))
            return
        names = {_meaning(name): name for name, value in state.items() if _is_moment(name, value)}
        moments = {meaning: local(state[name]).to(layer.work) for meaning, name in names.items()}
        change(moments, bias1, bias2)
        for meaning, name in names.items():
            local(state[name]).copy_(moments[meaning])

    def reset_moments(self, layer: "LowRankLayer") -> None:
        param = self.param(layer)
        state = self.optimizer.state.get(param)
        if not state:
            return
        if isinstance(self.optimizer, LowRankOptimizer):
            self.optimizer.reset_moments(param, self._group(layer))
            return
        for name, value in state.items():
            if _is_moment(name, value):
                value.zero_()
        if "step" in state:
            state["step"] = state["step"] * 0  # a number or a tensor; it counts for the bias corrections alone

    def keep(self, layer: "LowRankLayer", kept: dict[str, Tensor]) -> None:
        """The names do not change from step to step: torch.distributed.checkpoint asks for those of a first step.

        So U is not kept where it can be made from the first moment again.
        """
        state = self.optimizer.state[self.param(layer)]
        state.pop("test_matrix", None)
        state.update({name: value for name, value in kept.items() if name != "test_matrix" or "exp_avg" not in state})
        if self.resets and isinstance(self.optimizer, LowRankOptimizer):
            state.setdefault("reset_step", torch.zeros(()))


def _is_moment(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and (name.startswith("exp_avg") or name == "momentum_buffer")


def _meaning(name: str) -> str:
    """What `rotate` calls a moment of torch's optimizers: SGD's momentum is a first moment."""
    return "exp_avg" if name == "momentum_buffer" else name
