"""What happens around an optimizer's step in the projected backward: bases adopted, updates folded, state kept."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_galore.lowrank_basis import LayerBasis
from hf_galore.lowrank_layer import LowRankLayer, Settings
from hf_galore.optim.optimizer import LowRankOptimizer
from hf_galore.subspace import rotate

Group = dict[str, Any]

_KEPT = ("basis", "basis_steps", "test_matrix")  # what the projected backward keeps in the state of B


class Engine(Protocol):
    """What the steps ask of the projected backward they belong to."""

    model: nn.Module
    settings: Settings
    layers: dict[Tensor, LowRankLayer]  # by B
    bases: list[LayerBasis]

    def warn(self, message: str) -> None:
        """Warns once for each kind of message."""


class OptimizerSteps:
    """Makes every step of the optimizer fold and refresh, and keeps the bases in its state, by hooks on it.

    Raises:
        ValueError: the optimizer lacks small parameters, or measures parameters by their size (Adafactor's
            scale_parameter=True), which is not that of the weights.
    """

    def __init__(self, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
        self.engine, self.optimizer = engine, optimizer
        groups = self._groups()
        if not groups.keys() >= engine.layers.keys():
            raise ValueError("optimizer: it does not have the small parameters; pass it param_groups() of this object")
        if any(groups[update].get("scale_parameter") for update in engine.layers):
            raise ValueError("optimizer: scale_parameter=True would measure the small parameters; pass False")
        self._first = True
        self._loaded: dict[int, dict[str, Any]] = {}
        for layer in engine.layers.values():
            layer.attached = True
            layer.fold()
            layer.rest()
        self._at_once = False  # whether the optimizer folds each step as it computes it
        if isinstance(optimizer, LowRankOptimizer) and engine.settings.fold_every == 1:
            self._at_once = True
            optimizer.write_backs.update({update: layer.write_back for update, layer in engine.layers.items()})
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())
        optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: self._keep(state_dict))
        optimizer.register_load_state_dict_post_hook(lambda _: self._restore())

    def _groups(self) -> dict[Tensor, Group]:
        return {param: group for group in self.optimizer.param_groups for param in group["params"]}

    def _stepping(self, groups: dict[Tensor, Group]) -> dict[LayerBasis, list[LowRankLayer]]:
        """The layers with a gradient, by basis, in the optimizer's order."""
        found: dict[LayerBasis, list[LowRankLayer]] = {}
        for param in groups:
            if param in self.engine.layers and param.grad is not None:
                layer = self.engine.layers[param]
                found.setdefault(layer.basis, []).append(layer)
        return found

    def _before_step(self) -> None:
        if self._first:
            self._first = False
            self._warn_of_idle_modules()
        groups = self._groups()
        for basis, stepping in self._stepping(groups).items():
            if basis.candidate is not None:
                self._adopt(basis, groups)
            for layer in stepping if not self._at_once else ():
                layer.wake()

    def _after_step(self) -> None:
        groups = self._groups()
        for basis, stepped in self._stepping(groups).items():
            basis.steps += 1
            for layer in stepped:
                layer.uses = 0
                if not self._at_once:
                    group = groups[layer.update]
                    layer.pending = True
                    layer.decay *= 1.0 - self._rate(layer, group) * (group.get("weight_decay") or 0.0)
            basis.finish_sketch()
            if basis.candidate is not None:
                self._adopt(basis, groups)
            basis.forget()
            if basis.steps % self.engine.settings.fold_every == 0:
                for layer in basis.layers:
                    layer.fold()
            basis.tapping = basis.due()
            aims = basis.tapping and self.engine.settings.refresh == "streaming"
            for layer in basis.layers:
                layer.test_matrix = None
            if aims:
                basis.aim([self._first_moment(layer, groups[layer.update]) for layer in basis.layers])
            for layer in stepped:
                state = self.optimizer.state[layer.update]
                state["basis"], state["basis_steps"] = basis.matrix, torch.tensor(float(basis.steps))
                state.pop("test_matrix", None)
                if aims:
                    state["test_matrix"] = layer.test_matrix

    def _warn_of_idle_modules(self) -> None:
        names = {module: name for name, module in self.engine.model.named_modules()}
        idle = [names[layer.module] for layer in self.engine.layers.values() if layer.update.grad is None]
        if idle:
            self.engine.warn(
                f"{len(idle)} modules got no gradient in the first step: {', '.join(idle[:4])}. A module that is "
                "never called, because the model reads its weight, does not train: leave it out of target_modules. "
                "An expert trains as soon as it gets tokens"
            )

    def _rate(self, layer: LowRankLayer, group: Group) -> float:
        """The learning rate of the step just taken, which is also that of the weight decay."""
        if isinstance(self.optimizer, LowRankOptimizer):
            return self.optimizer.rate(group, layer.basis.steps, layer.update)
        return float(group["lr"])

    def _adopt(self, basis: LayerBasis, groups: dict[Tensor, Group]) -> None:
        """Puts the candidate in force: folds what is in the old coordinates, moves the moments if asked to."""
        assert basis.candidate is not None
        for layer in basis.layers:
            layer.fold()
        overlap = basis.candidate.to(basis.work).mT @ basis.matrix.to(basis.work)
        basis.matrix, basis.candidate = basis.candidate, None
        if self.engine.settings.moments == "rotate":
            for layer in basis.layers:
                self._rotate(layer, groups[layer.update], overlap)

    # The moments of a small parameter, in any optimizer.

    def _rotate(self, layer: LowRankLayer, group: Group, overlap: Tensor) -> None:
        state = self.optimizer.state.get(layer.update)
        if not state:
            return
        bias1 = bias2 = 1.0
        if "betas" in group and group.get("correct_bias", True):
            bias1, bias2 = (1.0 - beta ** int(state["step"]) for beta in group["betas"])
        turn: Callable[[dict[str, Tensor]], None] = partial(
            rotate, overlap=overlap, side=layer.side, bias1=bias1, bias2=bias2
        )
        if isinstance(self.optimizer, LowRankOptimizer):
            self.optimizer.change_moments(layer.update, group, turn)
        else:
            moments = {name: value.to(layer.work) for name, value in state.items() if name.startswith("exp_avg")}
            turn(moments)
            for name, value in moments.items():
                state[name].copy_(value)

    def _first_moment(self, layer: LowRankLayer, group: Group) -> Tensor:
        """The first moment; the low-rank gradient where the rule keeps none; zeros where there is neither yet."""
        state, gradient = self.optimizer.state.get(layer.update), layer.update.grad
        if not state:
            return torch.zeros_like(layer.update) if gradient is None else gradient
        if isinstance(self.optimizer, LowRankOptimizer):
            state = self.optimizer.read_moments(layer.update, group)
        moment: Tensor | None = state.get("exp_avg", gradient)
        return torch.zeros_like(layer.update) if moment is None else moment

    # State dicts.

    def _keep(self, state_dict: dict[str, Any]) -> None:
        """torch casts state to the parameter's dtype; the bases keep theirs."""
        self._loaded = {
            index: {name: state[name] for name in _KEPT if name in state}
            for index, state in state_dict["state"].items()
        }

    def _restore(self) -> None:
        params = list(self._groups())
        for index, kept in self._loaded.items():
            param = params[index]
            self.optimizer.state[param].update({name: value.to(param.device) for name, value in kept.items()})
        self._loaded = {}
        for basis in self.engine.bases:
            basis.forget()
            for layer in basis.layers:
                layer.fold()
                state = self.optimizer.state.get(layer.update, {})
                if "basis" in state:
                    basis.matrix, basis.steps = state["basis"], int(state["basis_steps"])
                    layer.test_matrix = state.get("test_matrix", layer.test_matrix)
                    basis.tapping = basis.due()
            if basis.tapping and any(layer.test_matrix is None for layer in basis.layers):
                basis.aim_anywhere()  # the state is that of a run with refresh='exact'
