"""What happens around an optimizer's step in the projected backward: bases adopted, updates folded, state kept."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_galore.lowrank_basis import LayerBasis, Momentum
from hf_galore.lowrank_layer import LowRankLayer, Settings
from hf_galore.messages import no_average_of_gradients
from hf_galore.optim.moments import bias_corrections
from hf_galore.optim.optimizer import LowRankOptimizer
from hf_galore.subspace import rotate

Group = dict[str, Any]

# What the projected backward keeps in the state of B.
_BASIS = ("basis", "basis_scale")
_KEPT = (*_BASIS, "basis_steps", "test_matrix", "refresh_schedule")
_READ_BY_THE_HOST = ("basis_steps", "refresh_schedule")  # small, and never on a device


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
        if engine.settings.source == "moment" and any("betas" not in groups[update] for update in engine.layers):
            raise ValueError(no_average_of_gradients(optimizer))
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
                self._adopt(basis, groups, basis.steps)
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
            basis.finish_sketch(self._momenta(basis, groups))
            if basis.candidate is not None:
                self._adopt(basis, groups, basis.steps - 1)
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
                state.update(basis.kept, basis_steps=torch.tensor(float(basis.steps)))
                if basis.lazy is not None:
                    state["refresh_schedule"] = basis.lazy
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

    def _adopt(self, basis: LayerBasis, groups: dict[Tensor, Group], step: int) -> None:
        """Puts the candidate in force: folds what is in the old coordinates, moves the moments if asked to."""
        for layer in basis.layers:
            layer.fold()
        new, old = basis.adopt(step)
        for layer in basis.layers:
            state, group = self.optimizer.state.get(layer.update), groups[layer.update]
            if state and self.engine.settings.moments == "rotate":
                bias1, bias2 = bias_corrections(group, int(state.get("step", 0)))
                turn = partial(rotate, new=new, old=old, side=layer.side, bias1=bias1, bias2=bias2)
                self._change_moments(layer, group, turn)
            elif state and self.engine.settings.moments == "reset":
                self._reset_moments(layer, group)

    # The moments of a small parameter, in any optimizer.

    def _change_moments(self, layer: LowRankLayer, group: Group, change: Callable[[dict[str, Tensor]], None]) -> None:
        if isinstance(self.optimizer, LowRankOptimizer):
            self.optimizer.change_moments(layer.update, group, change)
            return
        state = self.optimizer.state[layer.update]
        names = {_meaning(name): name for name, value in state.items() if _is_moment(name, value)}
        moments = {meaning: state[name].to(layer.work) for meaning, name in names.items()}
        change(moments)
        for meaning, name in names.items():
            state[name].copy_(moments[meaning])

    def _reset_moments(self, layer: LowRankLayer, group: Group) -> None:
        if isinstance(self.optimizer, LowRankOptimizer):
            self.optimizer.reset_moments(layer.update, group)
            return
        state = self.optimizer.state[layer.update]
        for name, value in state.items():
            if _is_moment(name, value):
                value.zero_()
        if "step" in state:
            state["step"] = state["step"] * 0  # a number or a tensor; it counts for the bias corrections alone

    def _momenta(self, basis: LayerBasis, groups: dict[Tensor, Group]) -> list[Momentum] | None:
        """What the basis's sketch is mixed with, where `source` asks for that."""
        if self.engine.settings.source != "moment" or basis.sketch is None:
            return None
        found = []
        for layer in basis.layers:
            gradient, group = layer.update.grad, groups[layer.update]
            low = torch.zeros_like(layer.update) if gradient is None else gradient
            found.append(Momentum(self._first_moment(layer, group), low, float(group["betas"][0])))
        return found

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
        """torch casts state to the parameter's dtype; the bases keep theirs.

        Raises:
            ValueError: a basis was saved as other integers than it is kept as, or as floats instead.
        """
        for index, param in enumerate(self._groups()):
            layer, basis = self.engine.layers.get(param), state_dict["state"].get(index, {}).get("basis")
            if layer is not None and basis is not None:
                saved, kept = basis.dtype, layer.basis.kept["basis"].dtype
                if saved != kept and not (saved.is_floating_point and kept.is_floating_point):
                    raise ValueError(
                        f"basis_dtype: a basis was saved as {saved}, and this model keeps it as {kept}. Enable the "
                        "projected backward with the basis_dtype of the run that goes on"
                    )
        self._loaded = {
            index: {name: state[name] for name in _KEPT if name in state}
            for index, state in state_dict["state"].items()
        }

    def _restore(self) -> None:
        params = list(self._groups())
        for index, kept in self._loaded.items():
            param = params[index]
            self.optimizer.state[param].update(
                {name: value.to("cpu" if name in _READ_BY_THE_HOST else param.device) for name, value in kept.items()}
            )
        self._loaded = {}
        for basis in self.engine.bases:
            basis.forget()
            for layer in basis.layers:
                layer.fold()
                state = self.optimizer.state.get(layer.update, {})
                if "basis" in state:
                    basis.kept = {name: state[name] for name in _BASIS if name in state}
                    basis.steps, basis.lazy = int(state["basis_steps"]), state.get("refresh_schedule")
                    layer.test_matrix = state.get("test_matrix", layer.test_matrix)
                    basis.tapping = basis.due()
            if basis.tapping and any(layer.test_matrix is None for layer in basis.layers):
                basis.aim_anywhere()  # the state is that of a run with refresh='exact'


def _is_moment(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and (name.startswith("exp_avg") or name == "momentum_buffer")


def _meaning(name: str) -> str:
    """What `rotate` calls a moment of torch's optimizers: SGD's momentum is a first moment."""
    return "exp_avg" if name == "momentum_buffer" else name
