"""The projected backward under DeepSpeed's ZeRO 1, 2 and 3, with offload: through accelerate, so through the Trainer.

The weights are frozen, and ZeRO-3 partitions them like any parameter; the small parameters are what ZeRO trains, in
its flat partitions. `register` makes `Accelerator.prepare` see to all of it for a model with the projected backward.
Folds gather one layer at a time, so fold every T steps: `enable(..., fold_every=update_proj_gap)`.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from hf_galore.frozen_weight import WHOLE, holds_codes
from hf_galore.integrations.requirements import DEEPSPEED_ENGINE, require
from hf_galore.lowrank_backward import LowRankBackward, engine_of
from hf_galore.lowrank_optimizer import detach
from hf_galore.nn.bitlinear import castable_masters
from hf_galore.optim.adamw import GaLoreAdamW
from hf_galore.optim.optimizer import LowRankOptimizer
from hf_galore.versions import refuse_older

logger = get_logger(__name__)

_METHOD = "_prepare_deepspeed"
_original: list[Callable[..., Any]] = []


def register() -> None:
    """Makes accelerate prepare models with the projected backward for DeepSpeed. Idempotent; see `unregister`."""
    if not _original:
        _original.append(vars(Accelerator)[_METHOD])
        setattr(Accelerator, _METHOD, _prepare)
        WHOLE.append(_whole_parameters)


def unregister() -> None:
    """Restores accelerate. Does nothing if it is not registered."""
    if _original:
        setattr(Accelerator, _METHOD, _original.pop())
        WHOLE.remove(_whole_parameters)


def _prepare(self: Accelerator, *args: Any) -> Any:
    """accelerate's method; a model with the projected backward goes on under DeepSpeed's engine.

    A BitLinear's weight is cast with the model: ZeRO itself keeps what trains in float32.

    Raises:
        ValueError: something was asked for that ZeRO cannot do, with what it can.
    """
    with castable_masters():
        return _prepare_model(self, *args)


def _prepare_model(self: Accelerator, *args: Any) -> Any:
    optimizer = next((arg for arg in args if isinstance(arg, torch.optim.Optimizer)), None)
    model = next((arg for arg in args if isinstance(arg, nn.Module)), None)
    engine = None if model is None else engine_of(model)
    if optimizer is None or engine is None:
        _refuse_matrices(optimizer)
        return _original[0](self, *args)
    refuse_older("deepspeed")
    require(DEEPSPEED_ENGINE)
    config: dict[str, Any] = self.deepspeed_plugin.deepspeed_config
    check(engine, optimizer, config)
    detach(optimizer)
    numbers = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    chosen = _for_offload(optimizer, config)
    _keep_powers(chosen)
    prepared = _original[0](self, *(chosen if arg is optimizer else arg for arg in args))
    from hf_galore.integrations.deepspeed_engine import attach

    attach(engine, next(one for one in prepared if isinstance(one, nn.Module)), numbers)
    return prepared


def _refuse_matrices(optimizer: torch.optim.Optimizer | None) -> None:
    """Raises for an optimizer that projects matrices: it would be given flat shards."""
    projects = optimizer is not None and any(group.get("rank") is not None for group in optimizer.param_groups)
    if projects and isinstance(optimizer, LowRankOptimizer):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} projects matrices, and DeepSpeed shards them into flat vectors. "
            "Use hf_galore.lowrank_backward.enable(model, ...) and its param_groups(model), or the Trainer, which "
            "does that by itself"
        )


def refuse_own_optimizer(optim: str, config: dict[str, Any]) -> None:
    """Raises ValueError for a configuration with an optimizer in it, which would train at full rank instead."""
    if "optimizer" in config:
        raise ValueError(
            f"optim={optim!r}: the DeepSpeed configuration has an 'optimizer' section, which would run in its place. "
            "Take it out; learning rate, betas, eps and weight decay are those of TrainingArguments"
        )


def _whole_parameters(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, parameters that ZeRO-3 partitioned when the model was made have their whole shapes."""
    if not any(hasattr(param, "ds_id") for param in model.parameters()):
        return nullcontext()
    from hf_galore.integrations.deepspeed_zero import full_shapes

    return full_shapes(model)


def check(engine: LowRankBackward, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
    """Raises ValueError for what the projected backward cannot do under this DeepSpeed configuration."""
    check_settings(vars(engine.settings))
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        _refuse("zero_stage", stage, "1, 2 or 3; without ZeRO use DDP")
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme":
            _refuse(f"{key}.device", "nvme", "cpu")
    if not isinstance(optimizer, _adamw()):
        _refuse("optimizer", type(optimizer).__name__, "AdamW: GaLoreAdamW, GaLoreAdamW8bit or torch.optim.AdamW")
    if not all(layer.right for layer in engine.layers.values()):
        _refuse("proj_type", engine.settings.proj_type, "right")
    check_targets(engine)
    kinds = [{param in engine.layers for param in group["params"]} for group in optimizer.param_groups]
    if any(len(kind) == 2 for kind in kinds):
        _refuse("params", "mixed groups", "the groups of param_groups(model), where small parameters are apart")


def check_targets(engine: LowRankBackward) -> None:
    """Raises ValueError for targets whose full gradients would be projected by the optimizer, and for codes."""
    if engine.unswapped:
        _refuse("target_modules", min(engine.unswapped), "modules that do what nn.Linear does, and no more")
    if any(holds_codes(layer.module) for layer in engine.layers.values()):
        _refuse("target_modules", "quantized", "weights in floating point")


def check_settings(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of the projected backward that do not run under DeepSpeed."""
    works = {
        "refresh": (("exact",), "streaming"),
        "proj_type": (("left", "full", "reverse_std"), "right"),
        "moments": (("reset",), "rotate, keep or align"),
        "source": (("moment",), "gradient"),
    }
    for name, (refused, choices) in works.items():
        if options.get(name) in refused:
            _refuse(name, options[name], choices)


def _refuse(name: str, value: object, works: str) -> NoReturn:
    raise ValueError(f"{name}={value!r} does not run under DeepSpeed; what does: {works}")


def _adamw() -> tuple[type[torch.optim.Optimizer], ...]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return GaLoreAdamW, torch.optim.AdamW, DeepSpeedCPUAdam


def _for_offload(optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that runs what was asked for where its state is on the CPU.

    accelerate would put Adam with coupled weight decay in its place (for anything but torch.optim.AdamW).
    """
    if config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") == "none":
        return optimizer
    config["zero_force_ds_cpu_optimizer"] = False
    is_plain = type(optimizer) in (GaLoreAdamW, torch.optim.AdamW)
    if not is_plain or any(group.get("state_dtype") is not None for group in optimizer.param_groups):
        logger.warning("offload_optimizer: %s itself runs on the CPU", type(optimizer).__name__)
        return optimizer
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    logger.warning(
        "offload_optimizer: DeepSpeedCPUAdam (AdamW with decoupled weight decay) takes the steps of %s",
        type(optimizer).__name__,
    )
    keys = ("params", "lr", "betas", "eps", "weight_decay", "correct_bias")
    groups = [
        {key: group[key] for key in keys if key in group} | {"bias_correction": group.get("correct_bias", True)}
        for group in optimizer.param_groups
    ]
    chosen = DeepSpeedCPUAdam(groups, adamw_mode=True)
    if isinstance(optimizer, GaLoreAdamW):
        for group in chosen.param_groups:
            group["eps_before_correction"] = group["eps"]
        chosen.register_step_pre_hook(lambda *_: _set_eps(chosen))
    return chosen


def _set_eps(optimizer: torch.optim.Optimizer) -> None:
    """Before a step: the eps that, added after the bias correction, is what GaLoreAdamW adds before it."""
    for group in optimizer.param_groups:
        for param in group["params"] if group["bias_correction"] else ():
            step = optimizer.state.get(param, {}).get("step", 0) + 1
            group["eps"] = group["eps_before_correction"] / math.sqrt(1.0 - group["betas"][1] ** step)


def _keep_powers(optimizer: torch.optim.Optimizer) -> None:
    """Gives DeepSpeedCPUAdam the bits of a run that was not cut, after its state has been loaded.

    It multiplies βᵗ up from step to step in an object of its own, and begins with pow(β, t) where it has not seen the
    steps before. So it is shown these before it goes on, on nothing: two seconds for a million.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    seen, nothing = 0, torch.empty(0)

    def show(*_: Any) -> None:
        nonlocal seen
        params = [param for group in optimizer.param_groups for param in group["params"]]
        done = max((int(optimizer.state.get(param, {}).get("step", 0)) for param in params), default=seen)
        if done not in (seen - 1, seen):  # ZeRO-3 steps its flat partitions one by one
            group = optimizer.param_groups[0]
            values = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
            for step in range(1, done + 1):
                optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, *values, *[nothing] * 4)
        seen = done + 1

    optimizer.register_step_pre_hook(show)
