"""The projected backward: train every weight of a model without ever forming a full gradient.

`enable` freezes the target weights W and puts a small parameter B beside each. In the backward pass B receives the
low-rank gradient R (see `hf_galore.projected_linear`), so gradient accumulation, clipping, GradScaler and any torch
optimizer work on B as on any parameter. After `optimizer.step()` B holds −lr·N, which is folded into W:

    W ← (1 − lr·weight_decay)·W + scale·back(B);  B ← 0

That is GaLore (arXiv 2403.03507), to rounding. Clipping acts on the norm of the R's, at most that of the full
gradients.

A refresh of the basis, every `update_proj_gap` steps, is one of

    exact      from the layer's own full gradient, as in the paper: m·n more elements for every layer that refreshes in
               the same step, until that step is taken, and an SVD for each micro-batch;
    streaming  never m x n: during the step a sketch Z = Gᵀ U (n, r) accumulates beside R, with U an orthonormal basis
               of the last first moment; the left singular vectors of Z are the basis from the next step on. It keeps x
               for the backward pass and costs 2·tokens·r·(m + n) flops more, in that step alone.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hf_galore.lowrank_layer import UPDATE, LowRankLayer, Settings
from hf_galore.optim.adafactor import learning_rate
from hf_galore.optim.optimizer import LowRankOptimizer, warn_once
from hf_galore.param_groups import ALL_LINEAR, find_targets, group_parameters, is_conv1d
from hf_galore.subspace import rotate

_ENABLED = "_hf_galore_lowrank_backward"  # the attribute of a model that holds its LowRankBackward


class LowRankBackward:
    """The projected backward of one model: its layers and their settings. Made by `enable`."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.layers: dict[Tensor, LowRankLayer] = {}  # by B
        self.unswapped: set[str] = set()  # names of targets that stay with the optimizer
        self.gradients_complete: Callable[[], bool] = lambda: True  # False while further micro-batches are to come
        self._hooks: list[Any] = []
        self._warned: set[str] = set()
        self._stepped = False

    @property
    def count(self) -> int:
        """The number of layers."""
        return len(self.layers)

    def param_groups(
        self,
        model: nn.Module,
        *,
        weight_decay: float | None = None,
        decay_parameters: Collection[str] | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Parameter groups for everything that trains: at full rank, through the optimizer's own projection, small.

        Targets that could not be swapped are in a group with `rank`, for hf_galore's optimizers to project.

        Args:
            weight_decay, decay_parameters: as in `galore_param_groups`. A small parameter has the weight decay of its
                weight, on which it acts.
            options: further keys of the group with `rank`.
        """
        small, full = {}, []
        for name, param in model.named_parameters():
            if param in self.layers:
                small[name] = name.removesuffix(UPDATE) + "weight"
            elif param.requires_grad and name not in self.unswapped:
                full.append(name)
        if decay_parameters is not None:
            decay_parameters = {
                *decay_parameters,
                *(name for name, weight in small.items() if weight in decay_parameters),
            }
        low_rank = {
            "subspace": self.settings.subspace,
            "rank": self.settings.rank,
            "update_proj_gap": self.settings.update_proj_gap,
            "scale": self.settings.scale,
            "proj_type": self.settings.proj_type,
            **options,
        }
        kinds = [({}, full), (low_rank, self.unswapped), ({}, list(small))]
        return group_parameters(model, kinds, weight_decay, decay_parameters)

    def warn(self, message: str) -> None:
        """Warns once for each kind of message (its first words)."""
        warn_once(self._warned, "projected backward", message)

    def add(self, module: nn.Module) -> None:
        """Makes a layer of the module; `install` puts it to work."""
        weight = module.get_parameter("weight")
        for layer in self.layers.values():
            if layer.module.get_parameter("weight") is weight:
                layer.modules.append(module)
                return
        layer = LowRankLayer(module, len(self.layers), self)
        self.layers[layer.update] = layer

    def install(self) -> None:
        """Swaps the layers' forwards, freezes their weights and registers the small parameters. Idempotent."""
        if self._hooks:
            return
        object.__setattr__(self.model, _ENABLED, self)  # not through nn.Module: this is no part of the model
        for layer, module in self._modules():
            module.get_parameter("weight").requires_grad_(False)
            module.register_parameter(UPDATE, layer.update)
            module.forward = _Forward(layer, module)
            self._hooks += [
                module.register_state_dict_pre_hook(layer.fold_first),
                module.register_state_dict_post_hook(_drop_update),
                module.register_load_state_dict_pre_hook(_spare_update),
                module.register_load_state_dict_pre_hook(layer.replaced),
            ]

    def uninstall(self) -> None:
        """Folds, and gives every module back its own forward, its trainable weight and its parameters. Idempotent.

        The optimizer keeps its state: after another `install` training goes on where it was.
        """
        if not self._hooks:
            return
        self.fold()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        object.__delattr__(self.model, _ENABLED)
        for layer, module in self._modules():
            layer.update.grad = None
            del module.forward, module._parameters[UPDATE]
            module.get_parameter("weight").requires_grad_(True)

    def _modules(self) -> list[tuple[LowRankLayer, nn.Module]]:
        return [(layer, module) for layer in self.layers.values() for module in layer.modules]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes every `optimizer.step()` fold and refresh, and keeps the bases in the optimizer's state.

        Raises:
            ValueError: the optimizer lacks the small parameters.
        """
        held = {param for group in optimizer.param_groups for param in group["params"]}
        if not held.issuperset(self.layers):
            raise ValueError("optimizer: it does not have the small parameters; pass it param_groups() of this object")
        optimizer.register_step_pre_hook(lambda opt, *_: self._before_step(opt))
        optimizer.register_step_post_hook(lambda opt, *_: self._after_step(opt))
        loaded: dict[int, dict[str, Any]] = {}

        def keep(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            """torch casts state to the parameter's dtype; the bases keep theirs."""
            loaded.clear()
            for index, state in state_dict["state"].items():
                loaded[index] = {k: v for k, v in state.items() if k in ("basis", "basis_steps", "test_matrix")}

        def restore(opt: torch.optim.Optimizer) -> None:
            params = [param for group in opt.param_groups for param in group["params"]]
            for index, kept in loaded.items():
                opt.state[params[index]].update({k: v.to(params[index].device) for k, v in kept.items()})
            loaded.clear()
            self._after_load(opt)

        optimizer.register_load_state_dict_pre_hook(keep)
        optimizer.register_load_state_dict_post_hook(restore)

    def fold(self) -> None:
        """Folds whatever is pending, in every layer."""
        for layer in self.layers.values():
            layer.fold()

    def _stepping(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[LowRankLayer, dict[str, Any]]]:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param in self.layers and param.grad is not None:
                    yield self.layers[param], group

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._stepped:
            self._stepped = True
            names = {module: name for name, module in self.model.named_modules()}
            idle = [names[layer.module] for layer in self.layers.values() if layer.update.grad is None]
            if idle:
                self.warn(
                    f"{len(idle)} modules got no gradient in the first step: {', '.join(idle[:4])}. A module that is "
                    "never called, because the model reads its weight, does not train: leave it out of target_modules"
                )
        for layer, group in self._stepping(optimizer):
            if layer.candidate is not None:
                self._adopt(layer, optimizer, group)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for layer, group in self._stepping(optimizer):
            layer.steps += 1
            layer.pending = True
            if group.get("weight_decay"):
                layer.decay *= 1.0 - _rate(layer, group) * group["weight_decay"]
            layer.full = None
            layer.finish_sketch()
            if layer.candidate is not None:
                self._adopt(layer, optimizer, group)
            if layer.steps % self.settings.fold_every == 0:
                layer.fold()
            layer.tapping = layer.due()
            state = optimizer.state[layer.update]
            state["basis"], state["basis_steps"] = layer.basis, torch.tensor(float(layer.steps))
            state.pop("test_matrix", None)
            if layer.tapping and self.settings.refresh == "streaming":
                layer.aim(self._first_moment(layer, optimizer, group))
                state["test_matrix"] = layer.test_matrix

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        for param, layer in self.layers.items():
            state = optimizer.state.get(param, {})
            layer.fold()
            layer.forget()
            if "basis" in state:
                layer.basis, layer.steps = state["basis"], int(state["basis_steps"])
                layer.test_matrix = state.get("test_matrix", layer.test_matrix)
                layer.tapping = layer.due()

    def _adopt(self, layer: LowRankLayer, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        """Puts the candidate basis in force: folds what is in the old coordinates, moves the moments if asked to."""
        layer.fold()
        assert layer.candidate is not None
        overlap = layer.candidate.to(layer.work).mT @ layer.basis.to(layer.work)
        layer.basis, layer.candidate = layer.candidate, None
        state = optimizer.state.get(layer.update)
        if self.settings.moments == "rotate" and state:
            bias1 = bias2 = 1.0
            if "betas" in group and group.get("correct_bias", True):
                bias1, bias2 = (1.0 - beta ** int(state["step"]) for beta in group["betas"])
            self._change_moments(layer, optimizer, group, lambda m: rotate(m, overlap, layer.side, bias1, bias2))

    def _first_moment(self, layer: LowRankLayer, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Tensor:
        """The first moment, or the low-rank gradient where the rule keeps none."""
        if isinstance(optimizer, LowRankOptimizer):
            moments: dict[str, Tensor] = optimizer.read_moments(layer.update, group)
        else:
            moments = optimizer.state[layer.update]
        assert layer.update.grad is not None
        return moments.get("exp_avg", layer.update.grad)

    def _change_moments(
        self,
        layer: LowRankLayer,
        optimizer: torch.optim.Optimizer,
        group: dict[str, Any],
        change: Callable[[dict[str, Tensor]], None],
    ) -> None:
        if isinstance(optimizer, LowRankOptimizer):
            optimizer.change_moments(layer.update, group, change)
        else:
            state = optimizer.state[layer.update]
            moments = {name: value.to(layer.work) for name, value in state.items() if name.startswith("exp_avg")}
            change(moments)
            for name, value in moments.items():
                state[name].copy_(value)


class _Forward:
    """Stands in for a module's forward, and follows it into a deep copy."""

    def __init__(self, layer: LowRankLayer, module: nn.Module) -> None:
        self.layer, self.module = layer, module

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.layer.forward(self.module, *args, *kwargs.values())


def _rate(layer: LowRankLayer, group: dict[str, Any]) -> float:
    """The learning rate of the step just taken, which is also that of the weight decay."""
    if group.get("relative_step"):  # Adafactor's own
        return learning_rate(group, layer.steps, layer.stored_weight)
    return float(group["lr"])


def _drop_update(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    state_dict.pop(prefix + UPDATE, None)


def _spare_update(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Loading the unpatched model's keys leaves B as it is, and strict=True does not miss it."""
    state_dict.setdefault(prefix + UPDATE, module._parameters[UPDATE])


def enable(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "right",
    *,
    refresh: str = "streaming",
    moments: str | None = None,
    subspace: str = "svd",
    fold_every: int = 1,
    stagger: bool = False,
    state_dtype: torch.dtype | None = None,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> LowRankBackward:
    """Swaps the model's target layers for the projected backward, in place, and returns the object that steers it.

    Module names and classes, state-dict keys and values stay those of the unpatched model. Targets whose forward is
    not plain nn.Linear's or Conv1D's (quantized layers, fused experts) and output heads stay as they are: train them
    through the optimizer.

    Args:
        target_modules: as in `galore_param_groups`.
        rank, update_proj_gap, scale: as in `galore_param_groups`.
        proj_type: `right` (default; keeps x Q (tokens, r) for the backward pass instead of x), `left` (must keep x),
            or `std`, the paper's choice by shape.
        refresh: `streaming` or `exact`; see the module's first lines.
        moments: at a refresh, `rotate` (LDAdam's formulas; default of `streaming`) or `keep` (the paper; default of
            `exact`).
        subspace: the basis method, applied to G or to the sketch.
        fold_every: steps between folds; in between the layers add x·(scale·back(B))ᵀ.
        stagger: layer i of L refreshes at steps ≡ −i·T/L, so that no step pays for all.
        state_dtype: of the bases; None for float32 (float64 for float64 weights).
        stochastic_rounding: fold into bfloat16 weights stochastically; the bits depend on (seed, step, layer,
        element).

    Raises:
        ValueError: an option is unknown, or nothing can be swapped.
    """
    settings = Settings(
        rank,
        update_proj_gap,
        scale,
        proj_type,
        refresh,
        moments,
        subspace,
        fold_every,
        stagger,
        state_dtype,
        stochastic_rounding,
        seed,
    )
    disable(model)
    targets = find_targets(model, target_modules)
    wanted = {id(param) for name, param in model.named_parameters() if name in targets}
    swappable = list(_swappable(model))
    ours = {id(module) for module in swappable}
    elsewhere = {id(p) for other in model.modules() if id(other) not in ours for p in other.parameters(recurse=False)}
    modules = [module for module in swappable if id(module.weight) in wanted - elsewhere]
    if not modules:
        raise ValueError(f"target_modules={target_modules!r}: none of the {len(targets)} targets can be swapped")
    engine = LowRankBackward(model, settings)
    for module in modules:
        engine.add(module)
    swapped = {id(module.weight) for module in modules}
    engine.unswapped = {
        name for name, param in model.named_parameters() if name in targets and id(param) not in swapped
    }
    if engine.unswapped:
        warnings.warn(
            f"{len(engine.unswapped)} of {len(targets)} target weights keep their full gradients, because their "
            f"modules do more than nn.Linear does (such as {min(engine.unswapped)!r}): the optimizer projects those",
            stacklevel=2,
        )
    engine.install()
    return engine


def disable(model: nn.Module) -> None:
    """Folds what is pending and makes the model what it was before `enable`; does nothing to any other model."""
    engine = getattr(model, _ENABLED, None)
    if engine is not None:
        engine.uninstall()


@contextmanager
def lowrank_backward(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[LowRankBackward]:
    """`enable` for the length of a with block; `disable` at its end, also after an exception."""
    engine = enable(model, *args, **kwargs)
    try:
        yield engine
    finally:
        disable(model)


def _plain_forward(module: nn.Module) -> bool:
    """Whether the module computes x Wᵀ + bias and nothing else."""
    if is_conv1d(module):
        base = next(cls for cls in reversed(type(module).__mro__) if cls.__name__ == "Conv1D")
        return type(module).forward is vars(base)["forward"]
    return type(module).forward is nn.Linear.forward


def _swappable(model: nn.Module) -> Iterator[nn.Module]:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    heads = set(head.modules()) if head is not None else set()  # some losses read its weight and never call it
    for module in model.modules():
        plain = _plain_forward(module) and not isinstance(module, NonDynamicallyQuantizableLinear)
        if plain and "forward" not in vars(module) and module not in heads:
            yield module
