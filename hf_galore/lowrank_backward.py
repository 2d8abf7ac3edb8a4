"""The projected backward: train every weight of a model without ever forming a full gradient.

`enable` freezes the target weights W and puts a small parameter B beside each. In the backward pass B receives the
low-rank gradient R (see `hf_galore.projected_linear`), so gradient accumulation, clipping, GradScaler and any torch
optimizer work on B as on any parameter. After `optimizer.step()` B holds −lr·N, which is folded into W:

    W ← (1 − lr·weight_decay)·W + scale·back(B);  B ← 0

That is GaLore (arXiv 2403.03507), to rounding. Clipping acts on the norm of the R's, at most that of the full
gradients.

A refresh of the basis, every `update_proj_gap` steps, is one of

    exact      from the layer's own full gradient, as in the paper: 2·tokens·m·n flops and an SVD of (m, n) more. With
               gradient_accumulation_steps=1 that gradient is formed and freed inside the layer's backward: m·n more
               elements, for one layer at a time. With more, the gradients of all layers that refresh in the same step
               live until that step is taken: `stagger` makes that one layer (or few).
    streaming  never m x n: during the step a sketch Z = Gᵀ U (n, r) accumulates beside R, with U an orthonormal basis
               of the last first moment; the left singular vectors of Z are the basis from the next step on. It keeps x
               for the backward pass and costs 2·tokens·r·(m + n) flops more, in that step alone, and an SVD of (n, r).
               In perplexity it is level with the SVD of G (examples/benchmarks/results/README.md).
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_galore import lowrank_parameters
from hf_galore.frozen_weight import frozen_weight, holds_codes, is_quantized, rounding, whole_shapes
from hf_galore.link import Link
from hf_galore.low_rank_options import LOW_RANK_DEFAULTS
from hf_galore.lowrank_basis import LayerBasis
from hf_galore.lowrank_layer import LowRankLayer, Settings, data_parallel_ranks
from hf_galore.lowrank_optimizer import OptimizerSteps
from hf_galore.lowrank_parameters import UPDATE
from hf_galore.lowrank_targets import forward_name, sharing_inputs, swappable
from hf_galore.messages import clamped_rank
from hf_galore.nn.host_weight import HostWeight, check_ternary, to_device, to_host
from hf_galore.optim.optimizer import warn_once
from hf_galore.param_groups import ALL_LINEAR, find_targets, group_parameters, low_rank_kinds
from hf_galore.shards import is_sharded
from hf_galore.sides import rank_of, resolve_side
from hf_galore.statistics import Observer

_ENABLED = "_hf_galore_lowrank_backward"  # the attribute of a model that holds its LowRankBackward


class LowRankBackward:
    """The projected backward of one model: its layers and their settings. Made by `enable`."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self._layers: list[LowRankLayer] = []
        self.bases: list[LayerBasis] = []
        self.unswapped: set[str] = set()  # names of targets that stay with the optimizer
        self.observe: Observer | None = None  # is told of each refresh, with B of the (first) layer of the basis
        self.hides_updates = True  # state dicts have no small parameters
        self.gradients_complete: Callable[[], bool] = lambda: True  # False while further micro-batches are to come
        self.link: Link | None = None  # between host and device, with offload_masters
        self._hooks: list[Any] = []
        self._until_hidden: Any = None  # the hook that hides the small parameters in the first forward pass
        self._cleared_with: list[nn.Module] = []  # the model and what wraps it
        self._trained: dict[nn.Module, bool] = {}  # whether each target's weight was to be trained
        self._warned: set[str] = set()

    @property
    def layers(self) -> dict[Tensor, LowRankLayer]:
        """By B."""
        return {layer.update: layer for layer in self._layers}

    @property
    def count(self) -> int:
        """The number of bases."""
        return len(self.bases)

    @property
    def refresh_seconds(self) -> float:
        """Seconds spent in the decompositions of basis refreshes since `enable`."""
        return sum(basis.seconds for basis in self.bases)

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
        with self.shown():
            return self._groups(model, weight_decay, decay_parameters, options)

    def _groups(
        self,
        model: nn.Module,
        weight_decay: float | None,
        decay_parameters: Collection[str] | None,
        options: dict[str, Any],
    ) -> list[dict[str, Any]]:
        small, full, layers = {}, [], self.layers
        for name, param in model.named_parameters():
            if param in layers:
                small[name] = name.removesuffix(UPDATE) + "weight"
            elif param.requires_grad and name not in self.unswapped:
                full.append(name)
        if decay_parameters is not None:
            decay_parameters = {
                *decay_parameters,
                *(name for name, weight in small.items() if weight in decay_parameters),
            }
        low_rank = {name: getattr(self.settings, name) for name in ("rank", *LOW_RANK_DEFAULTS)} | options
        kinds = [({}, full), *low_rank_kinds(model, low_rank, self.unswapped), ({}, list(small))]
        return group_parameters(model, kinds, weight_decay, decay_parameters)

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """All parameters of the model or of what wraps it, the small ones included: what is to be clipped."""
        with self.shown():
            return list(model.parameters())

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the small parameters are among the model's parameters, for engines that look for them there."""
        hidden = [(layer, module) for layer, module in self.members() if not lowrank_parameters.is_shown(module)]
        self._show(hidden, True)
        try:
            yield
        finally:
            self._show(hidden, False)

    def hide(self) -> None:
        """Makes `model.parameters()` those of the plain model: when all that wraps it has found the small ones."""
        if self._until_hidden is not None:
            self._until_hidden.remove()
            self._until_hidden = None
            self._show(self.members(), False)

    def _show(self, modules: Iterable[tuple[LowRankLayer, nn.Module]], shown: bool) -> None:
        for layer, module in modules:
            lowrank_parameters.show(module, layer.own_update, shown)

    def _first_forward(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():  # there the first step hides them
            self.hide()

    def clear_with(self, holder: nn.Module) -> None:
        """Makes the `zero_grad` of the model, or of what wraps it, clear the small parameters too."""
        if holder not in self._cleared_with:
            vars(holder)["zero_grad"] = _ZeroGrad(self, holder)
            self._cleared_with.append(holder)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have none of the wrappers."""
        return vars(self) | {"_cleared_with": [self.model]}

    def drop_gradients(self) -> None:
        """Does for the small parameters what `model.zero_grad()` does for all that it finds."""
        for layer in self._layers:
            layer.update.grad = None

    def warn(self, message: str) -> None:
        """Warns once for each kind of message (its first words)."""
        warn_once(self._warned, "projected backward", message)

    def add(self, groups: Sequence[Sequence[nn.Module]]) -> None:
        """Makes layers of the modules, with one basis for each group; `install` puts them to work."""
        known: dict[int, LowRankLayer] = {}
        for modules in groups:
            fresh = {id(module.weight): module for module in modules if id(module.weight) not in known}
            if fresh:
                known.update(zip(fresh, self._add(fresh.values()), strict=True))
            for module in modules:
                layer = known[id(module.weight)]
                if module not in layer.modules:
                    layer.modules.append(module)
        for basis in self.bases:
            basis.start()

    def _add(self, modules: Collection[nn.Module]) -> list[LowRankLayer]:
        """The layers of modules with weights of their own, which share a basis."""
        weights = [frozen_weight(module) for module in modules]
        settings, shape = self.settings, weights[0].shape
        stacked = (sum(weight.shape[0] for weight in weights), shape[1])
        rank = rank_of(settings.rank, stacked, resolve_side(settings.proj_type, shape), settings.equal_state)
        if rank < settings.rank:
            self.warn(clamped_rank(settings.rank, shape))
        layers = [
            LowRankLayer(module, weight, rank, len(self._layers) + number, self.settings)
            for number, (module, weight) in enumerate(zip(modules, weights, strict=True))
        ]
        self._layers += layers
        self.bases.append(LayerBasis(layers, len(self.bases), self))
        return layers

    def warn_of_full_gradients(self) -> None:
        """Warns where the full gradients of many layers live together in an exact refresh, with their bytes."""
        settings = self.settings
        if settings.refresh == "exact" and settings.gradient_accumulation_steps > 1 and not settings.stagger:
            weights = [layer.weight for layer in self._layers]
            total = sum(weight.shape[0] * weight.shape[1] * weight.dtype.itemsize for weight in weights)
            self.warn(
                "refresh='exact' with gradient accumulation holds the full gradients of all layers, "
                f"{total / 2**20:.0f} MiB, in every refresh. stagger=True holds those of a few, refresh='streaming' "
                "holds none"
            )

    def install(self) -> None:
        """Swaps the layers' forwards, freezes their weights and registers the small parameters, for all to see.

        Idempotent. They are hidden again by `hide`, at the latest in the first forward pass or step.
        """
        if self.settings.offload_masters and not self._hooks:
            self._offload()  # or raises, with nothing changed
        if not self._trained:
            self._trained = {module: bool(module.weight.requires_grad) for _, module in self.members()}
        for module in self._trained:
            module.weight.requires_grad_(False)
        if self._until_hidden is None:
            self._until_hidden = self.model.register_forward_pre_hook(self._first_forward)
        if self._hooks:
            self._show(self.members(), True)
            return
        object.__setattr__(self.model, _ENABLED, self)  # not through nn.Module: this is no part of the model
        self.clear_with(self.model)
        for layer, module in self.members():
            lowrank_parameters.register(module, layer.own_update, layer.fold)
            setattr(module, forward_name(module), _Forward(layer, module))
            if rounding(module):
                _say_what_it_stands_for(module, layer.with_pending)
            self._hooks += [
                module.register_state_dict_pre_hook(layer.fold_first),
                module.register_state_dict_post_hook(partial(_hide_update, self)),
                module.register_load_state_dict_pre_hook(_spare_update),
                module.register_load_state_dict_pre_hook(layer.drop),
            ]

    def uninstall(self) -> None:
        """Folds, and gives every module back its own forward, its trainable weight and its parameters. Idempotent.

        The optimizer keeps its state: after another `install` training goes on where it was. A model whose parameters
        are spread over ranks only folds: FSDP2 puts B back into its modules as long as these exist.
        """
        if not self._hooks:
            return
        self.fold()
        self.drop_gradients()
        self.hide()
        for module, trained in self._trained.items():
            module.weight.requires_grad_(trained)
        self._trained = {}
        if any(is_sharded(layer.update) for layer in self._layers):
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        object.__delattr__(self.model, _ENABLED)
        while self._cleared_with:
            del vars(self._cleared_with.pop())["zero_grad"]
        for layer, module in self.members():
            name = forward_name(module)
            delattr(module, name)
            if name != "forward":
                setattr(module, name, type(module).forward.__get__(module))
            if rounding(module):
                _say_what_it_stands_for(module, None)
            layer.own_update = layer.update
            lowrank_parameters.unregister(module)
        for layer in self._layers:
            if isinstance(layer.weight, HostWeight):
                layer.weight, layer.link = to_device(layer.weight), None

    def _offload(self) -> None:
        """Moves the weights to the host; raises ValueError for other than BitLinear, and among several processes."""
        if data_parallel_ranks() is not None:
            raise ValueError("offload_masters runs in a single process; among several use ZeRO's offload_param")
        check_ternary(layer.weight for layer in self._layers)
        if self.link is None:
            self.link = Link(self._layers[0].weight.stored.device)
        for layer in self._layers:
            layer.weight, layer.link = to_host(layer.weight, self.link), self.link

    @property
    def installed(self) -> bool:
        """Whether the model is swapped now."""
        return bool(self._hooks)

    def members(self) -> list[tuple[LowRankLayer, nn.Module]]:
        """Each layer with each of its modules: several where these share a weight."""
        return [(layer, module) for layer in self._layers for module in layer.modules]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes every `optimizer.step()` fold and refresh, and keeps the bases in the optimizer's state.

        Raises:
            ValueError: the optimizer does not fit; see `OptimizerSteps`.
        """
        OptimizerSteps(self, optimizer)

    def fold(self) -> None:
        """Folds whatever is pending, in every layer."""
        for layer in self._layers:
            layer.fold()


class _Forward:
    """Stands in for a module's forward, and follows it into a deep copy."""

    def __init__(self, layer: LowRankLayer, module: nn.Module) -> None:
        self.layer, self.module = layer, module

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if not getattr(self.module, "quantized", True):  # a BitLinear that is nn.Linear for now
            y: Tensor = type(self.module).forward(self.module, *args, **kwargs)
            return y
        return self.layer.forward(self.module, *args, *kwargs.values())


class _ZeroGrad:
    """Stands in for the `zero_grad` of a model, which finds no hidden parameters."""

    def __init__(self, engine: LowRankBackward, holder: nn.Module) -> None:
        self.engine, self.holder = engine, holder

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        type(self.holder).zero_grad(self.holder, *args, **kwargs)
        self.engine.drop_gradients()


def _say_what_it_stands_for(module: Any, effective: Callable[[Tensor], Tensor] | None) -> None:
    """A layer that rounds its weight rounds it with what is pending."""
    module.effective = effective


def _hide_update(engine: LowRankBackward, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    if engine.hides_updates:
        state_dict.pop(prefix + UPDATE, None)


def _spare_update(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Loading the unpatched model's keys leaves B as it is, and strict=True does not miss it."""
    if lowrank_parameters.is_shown(module):
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
    moments: str = LOW_RANK_DEFAULTS["moments"],
    subspace: str = LOW_RANK_DEFAULTS["subspace"],
    random_from: int | None = None,
    source: str = "gradient",
    basis_dtype: str | None = None,
    equal_state: bool = False,
    stagger: bool | None = None,
    lazy: bool = False,
    fold_every: int = 1,
    state_dtype: torch.dtype | None = None,
    stochastic_rounding: bool = True,
    seed: int = 0,
    gradient_accumulation_steps: int = 1,
    share_inputs: bool | Sequence[Sequence[str]] = False,
    offload_masters: bool = False,
) -> LowRankBackward:
    """Swaps the model's target layers for the projected backward, in place, and returns the object that steers it.

    Module names and classes, state-dict keys and values stay those of the unpatched model, and so do its parameters
    from the first forward pass on: until then DDP, FSDP2 and DeepSpeed find the small ones among them. To clip the
    gradients of all, pass `engine.parameters(model)` to torch; accelerate's `clip_grad_norm_` includes the small ones
    after `hf_galore.register()`.

    Targets whose forward is not plain nn.Linear's or Conv1D's (fused experts), output heads, and modules whose weight
    the model reads in place of calling them (Mamba's dt_proj) stay as they are: train them through the optimizer.
    Layers that bitsandbytes has quantized are trained in their codes after `hf_galore.register()`.

    Args:
        target_modules: as in `galore_param_groups`.
        rank, update_proj_gap, scale: as in `galore_param_groups`.
        proj_type: `right` (default; keeps x Q (tokens, r) for the backward pass instead of x), `left` (must keep x),
            or `std`, the paper's choice by shape.
        refresh: `streaming` or `exact`; see the module's first lines.
        moments, subspace, random_from: as in `hf_galore.optim.optimizer.LowRankOptimizer`, and so are the following.
            The basis method is applied to G or to the sketch.
        source: `moment` adds to the sketch that of the first moment; only with `streaming`.
        basis_dtype: how a basis is kept between uses; a random one is kept as it is here, not as its seed.
        equal_state: wide matrices on the right get the rank whose state is that of std.
        stagger: layer i of L refreshes i·T/L steps early, so that no step pays for all (default of `streaming`, whose
            first refreshes are spread over the first 16 steps; until then a basis is random).
        lazy: layers whose basis hardly turns refresh less often.
        fold_every: steps between folds; in between the layers add x·(scale·back(B))ᵀ, and `model.parameters()` are
            those of the last fold. Making a state dict or a copy folds first.
        state_dtype: of the bases; None for float32 (float64 for float64 weights).
        stochastic_rounding: fold into bfloat16 weights stochastically; the bits depend on (seed, step, layer,
            element).
        gradient_accumulation_steps: backward passes before each optimizer step. Only refresh='exact' asks for it.
        share_inputs: one basis, that of the stacked gradients, and one x Q for sibling modules that are given the same
            input: True for the usual ones (q/k/v, gate/up), or lists of names. It needs `streaming` and `right`.
        offload_masters: of a model whose targets are all BitLinear, their weights, small parameters and optimizer
            state stay in the memory of the host. Codes in two bits travel to the device, low-rank gradients back;
            `engine.link` counts the bytes. It needs `streaming` and a single process.

    Raises:
        ValueError: an option is unknown or does not go with another, nothing can be swapped, or a target is quantized
            in a way that cannot be trained (without `hf_galore.register()` every one).
    """
    settings = Settings(
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        proj_type=proj_type,
        refresh=refresh,
        moments=moments,
        subspace=subspace,
        random_from=random_from,
        source=source,
        basis_dtype=basis_dtype,
        equal_state=equal_state,
        stagger=stagger,
        lazy=lazy,
        fold_every=fold_every,
        state_dtype=state_dtype,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        gradient_accumulation_steps=gradient_accumulation_steps,
        share_inputs=share_inputs,
        offload_masters=offload_masters,
    )
    disable(model)
    with whole_shapes(model):
        targets = find_targets(model, target_modules, holds_codes)
        modules = swappable(model, targets)
        _refuse_codes(model, targets, modules)
        if not modules:
            raise ValueError(
                f"target_modules={target_modules!r}: none of the {len(targets)} targets can be swapped, because their "
                f"modules do more than nn.Linear does, or the model reads their weights (such as {min(targets)!r}); "
                "galore_adamw projects such weights"
            )
        engine = LowRankBackward(model, settings)
        engine.add(sharing_inputs(model, modules, settings.siblings))
        swapped = {id(module.weight) for module in modules}
        engine.unswapped = {
            name for name, param in model.named_parameters() if name in targets and id(param) not in swapped
        }
    if engine.unswapped:
        warnings.warn(
            f"{len(engine.unswapped)} of {len(targets)} target weights keep their full gradients, because their "
            "modules do more than nn.Linear does, or the model reads the weight in place of calling the module (such "
            f"as {min(engine.unswapped)!r}): the optimizer projects those",
            stacklevel=2,
        )
    engine.warn_of_full_gradients()
    engine.install()
    return engine


def _refuse_codes(model: nn.Module, targets: set[str], swapped: Sequence[nn.Module]) -> None:
    """Raises for a quantized target that is not swapped: no optimizer could train its codes."""
    trained = set(swapped)
    for name, module in model.named_modules():
        if f"{name}.weight" in targets and holds_codes(module) and module not in trained:
            kind = type(module).__name__
            if not is_quantized(module):
                raise ValueError(
                    f"target_modules: {name!r} is quantized ({kind}). Call hf_galore.register() first, which makes "
                    "the layers of bitsandbytes trainable, or leave it out"
                )
            raise ValueError(
                f"target_modules: {name!r} is quantized ({kind}) and cannot be trained, because it is the output "
                "head, its forward has been replaced or its weight is offloaded"
            )


def engine_of(model: nn.Module) -> LowRankBackward | None:
    """The projected backward that is installed in the model."""
    engine: LowRankBackward | None = getattr(model, _ENABLED, None)
    return engine


def engines_in(model: nn.Module) -> list[LowRankBackward]:
    """The projected backwards that are installed in the model, in a part of it, or in what it wraps."""
    engines = (engine_of(module) for module in model.modules())
    return [engine for engine in engines if engine is not None]


@contextmanager
def shown(model: nn.Module) -> Iterator[None]:
    """Inside, the small parameters are among the model's parameters; of a model without any this does nothing."""
    with ExitStack() as stack:
        for engine in engines_in(model):
            stack.enter_context(engine.shown())
        yield


def disable(model: nn.Module) -> None:
    """Folds what is pending and makes the model what it was before `enable`; does nothing to any other model.

    A model that FSDP2 has sharded meanwhile keeps its small parameters, which are zero then.
    """
    engine = engine_of(model)
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
