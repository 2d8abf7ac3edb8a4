"""The projected backward around an ordinary torch optimizer: hooks on its steps and on its state dict."""

from typing import Any

import torch
from torch import Tensor

from hf_galore import resume
from hf_galore.lowrank_steps import (
    KEPT,
    READ_BY_THE_HOST,
    Engine,
    Steps,
    aim_if_lost,
    check_basis,
    options_of,
    restore,
)
from hf_galore.lowrank_store import OptimizerStore
from hf_galore.messages import no_average_of_gradients
from hf_galore.optim.optimizer import LowRankOptimizer

_STEPS = "_hf_galore_steps"  # the attribute of an optimizer that holds its OptimizerSteps


def detach(optimizer: torch.optim.Optimizer) -> None:
    """Leaves the optimizer and the small parameters to others, as before `OptimizerSteps`; or does nothing."""
    steps: OptimizerSteps | None = getattr(optimizer, _STEPS, None)
    if steps is not None:
        steps.detach()


def engine_stepped_by(optimizer: Any) -> Engine | None:
    """The projected backward that the optimizer, or the one that it wraps, has been attached to; None for others."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    steps: OptimizerSteps | None = getattr(optimizer, _STEPS, None)
    return None if steps is None else steps.engine


class OptimizerSteps:
    """Makes every step of the optimizer fold and refresh, and keeps the bases in its state, by hooks on it.

    Raises:
        ValueError: the optimizer lacks small parameters, or measures parameters by their size (Adafactor's
            scale_parameter=True), which is not that of the weights.
    """

    def __init__(self, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
        self.engine, self.optimizer = engine, optimizer
        self.store = OptimizerStore(engine.layers, optimizer)
        _check(engine, self.store)
        self._first = True
        self._loaded: dict[Tensor, dict[str, Any]] = {}
        for layer in engine.layers.values():
            layer.attached = True
            layer.fold()
            layer.rest()
        self._describe()
        at_once = isinstance(optimizer, LowRankOptimizer) and engine.settings.fold_every == 1
        self.steps = Steps(engine, self.store, at_once)
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
            optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: self._goes_on_from(state_dict)),
            optimizer.register_load_state_dict_post_hook(lambda _: self._restore()),
        ]
        setattr(optimizer, _STEPS, self)

    def detach(self) -> None:
        """Undoes what it has done to the optimizer and gives every B storage of its own."""
        delattr(self.optimizer, _STEPS)
        for hook in self._hooks:
            hook.remove()
        for group in self.optimizer.param_groups:
            group.pop(resume.BACKWARD, None)
        for layer in self.engine.layers.values():
            layer.attached = False
            layer.wake()
            if isinstance(self.optimizer, LowRankOptimizer):
                self.optimizer.write_backs.pop(layer.update, None)

    def _before_step(self) -> None:
        if self._first:
            self._first = False
            self.engine.hide()
            self._warn_of_idle_modules()
            for param, layer in self.store.layers.items():  # an engine may have moved the model meanwhile
                layer.basis.to(param.device)
        if self.steps.at_once:
            assert isinstance(self.optimizer, LowRankOptimizer)
            self.optimizer.write_backs = {param: layer.write_back for param, layer in self.store.layers.items()}
        self.steps.before()

    def _after_step(self) -> None:
        self.steps.after()
        for param in self.store.layers:  # `zero_grad()` of the model does not find them
            param.grad = None

    def _warn_of_idle_modules(self) -> None:
        names = {module: name for name, module in self.engine.model.named_modules()}
        idle = [names[layer.module] for param, layer in self.store.layers.items() if param.grad is None]
        if idle:
            self.engine.warn(
                f"{len(idle)} modules got no gradient in the first step: {', '.join(idle[:4])}. A module that is "
                "never called, because the model reads its weight, does not train: leave it out of target_modules. "
                "An expert trains as soon as it gets tokens"
            )

    # State dicts.

    def _describe(self) -> None:
        """Writes into the groups of small parameters what a run that goes on from the optimizer's state must know."""
        layers = self.store.layers
        for group in self.optimizer.param_groups:
            members = [layers[param] for param in group["params"] if param in layers]
            if members:
                group[resume.BACKWARD] = options_of(self.engine, members)

    def _goes_on_from(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict with this run's options; torch casts state to the parameter's dtype, the bases keep theirs.

        Raises:
            ValueError: the engine cannot go on from it.
        """
        layers, ours_and_saved = self.store.layers, (self.optimizer.param_groups, state_dict["param_groups"])
        resume.check_groups(*ours_and_saved)
        self._loaded, groups = {}, []
        found: dict[str, str] = {}
        for group, saved in zip(*ours_and_saved, strict=True):
            ours, before = group.get(resume.BACKWARD, {}), saved.get(resume.BACKWARD, {})
            found |= resume.changes(ours, before)
            groups.append({**saved, resume.BACKWARD: ours} if ours else saved)
            for param, key in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(key, {})
                if param in layers and state:
                    check_basis(layers[param], state)
                    state = resume.with_schedule(state, ours, before)
                if state:
                    self._loaded[param] = {name: state[name] for name in KEPT if name in state}
        resume.tell(found)
        return {**state_dict, "param_groups": groups}

    def _restore(self) -> None:
        for param, kept in self._loaded.items():
            self.optimizer.state[param].update(
                {name: value.to("cpu" if name in READ_BY_THE_HOST else param.device) for name, value in kept.items()}
            )
        self._loaded = {}
        for basis in self.engine.bases:
            basis.forget()
            for layer in basis.layers:
                layer.fold()
                restore(layer, self.optimizer.state.get(self.store.param(layer), {}))
            aim_if_lost(basis, self.store)


def _check(engine: Engine, store: OptimizerStore) -> None:
    """Raises ValueError for an optimizer that does not fit."""
    groups, layers = store.groups(), engine.layers
    if not groups.keys() >= layers.keys():
        raise ValueError("optimizer: it does not have the small parameters; pass it param_groups() of this object")
    if engine.settings.source == "moment" and any("betas" not in groups[update] for update in layers):
        raise ValueError(no_average_of_gradients(store.optimizer))
    if any(groups[update].get("scale_parameter") for update in layers):
        raise ValueError("optimizer: scale_parameter=True would measure the small parameters; pass False")
