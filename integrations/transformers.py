"""GaLore in transformers' Trainer: `optim="galore_adamw"` and its sisters resolve to hf_galore's optimizers.

`register` swaps entries of transformers' optimizer registry and a few functions around it, and remembers what was
there; `unregister` puts exactly that back.
"""

import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import trainer as hf_trainer
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_galore_torch_available as _asks_for_galore_torch

from hf_galore.optim.adafactor import GaLoreAdafactor
from hf_galore.optim.adamw import GaLoreAdamW
from hf_galore.optim.adamw8bit import GaLoreAdamW8bit
from hf_galore.optim.optimizer import GALORE_TORCH_STATE, LOW_RANK_DEFAULTS, STATE_DTYPES
from hf_galore.param_groups import galore_param_groups

OPTIMIZERS: dict[OptimizerNames, type[torch.optim.Optimizer]] = {
    OptimizerNames.GALORE_ADAMW: GaLoreAdamW,
    OptimizerNames.GALORE_ADAMW_8BIT: GaLoreAdamW8bit,
    OptimizerNames.GALORE_ADAFACTOR: GaLoreAdafactor,
}
LAYERWISE = (
    OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
)

# What was in transformers before `register`: (holder, name, value) for attributes, and the registry's own entries.
_replaced: list[tuple[Any, str, Any]] = []
_handlers: dict[Any, Any] = {}


def register() -> None:
    """Makes every GaLore name of `TrainingArguments(optim=…)` resolve to hf_galore. Idempotent; see `unregister`."""
    if _handlers:
        return
    registry = trainer_optimizer._OPTIMIZER_HANDLERS
    _handlers.update({name: registry[name] for name in (*OPTIMIZERS, *LAYERWISE)})
    registry.update(dict.fromkeys(OPTIMIZERS, _galore_optimizer))
    registry.update(dict.fromkeys(LAYERWISE, _layerwise_optimizer))
    _replace(hf_trainer, "_parse_optim_args", _parse_optim_args)
    _replace(hf_trainer.Trainer, "_load_optimizer_and_scheduler", _load_optimizer_and_scheduler)
    _swap_guard(_asks_for_galore_torch, _is_galore_torch_available)


def unregister() -> None:
    """Restores transformers exactly as it was before `register`. Does nothing if it is not registered."""
    trainer_optimizer._OPTIMIZER_HANDLERS.update(_handlers)
    _handlers.clear()
    while _replaced:
        holder, name, value = _replaced.pop()
        setattr(holder, name, value)
    _swap_guard(_is_galore_torch_available, _asks_for_galore_torch)


def _replace(holder: Any, name: str, value: Any) -> None:
    _replaced.append((holder, name, vars(holder)[name]))
    setattr(holder, name, value)


def _is_galore_torch_available() -> bool:
    """True: hf_galore stands in for galore-torch wherever transformers asks for it."""
    return True


def _swap_guard(old: Callable[[], bool], new: Callable[[], bool]) -> None:
    """Puts `new` in place of `old` in every loaded module of transformers (lazy ones are not made to load it)."""
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == "transformers":
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)


def _galore_optimizer(ctx: trainer_optimizer.OptimizerContext) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer class and its keyword arguments, groups included, for a Trainer with a GaLore name in `optim`.

    Raises:
        ValueError: no or unknown target modules, an unknown or malformed key in `optim_args`, or an engine that shards
            parameters.
        TypeError: `optim_target_modules` is neither a string nor a list.
    """
    args = ctx.args
    name = OptimizerNames(args.optim)
    _refuse_shards(name.value)
    if args.optim_target_modules is None:
        raise ValueError(
            f"optim={name.value!r} needs optim_target_modules: 'all-linear', a regular expression, part of a "
            "module name, or a list of those"
        )
    if ctx.model is None:
        raise ValueError(f"optim={name.value!r} needs the model: pass it to get_optimizer_cls_and_kwargs")
    low_rank, options = _read_optim_args(ctx.optim_args)
    kwargs: dict[str, Any] = {**ctx.optimizer_kwargs, "seed": args.seed, **options}
    optimizer = OPTIMIZERS[name]
    if optimizer is GaLoreAdafactor:
        kwargs.update(scale_parameter=False, relative_step=False)
    else:
        kwargs.update(ctx.adam_kwargs)
    kwargs["params"] = galore_param_groups(
        ctx.model,
        args.optim_target_modules,
        weight_decay=args.weight_decay,
        decay_parameters=frozenset(hf_trainer.Trainer.get_decay_parameter_names(None, ctx.model)),
        **low_rank,
    )
    return optimizer, kwargs


def _layerwise_optimizer(
    ctx: trainer_optimizer.OptimizerContext,
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    raise NotImplementedError(
        f"optim={OptimizerNames(ctx.args.optim).value!r} is not in this version of hf_galore yet; use one of "
        f"{', '.join(repr(name.value) for name in OPTIMIZERS)}"
    )


def _refuse_shards(optim: str) -> None:
    """Raises for engines whose parameters are shards at step time, before they could be trained wrongly."""
    engine = AcceleratorState._shared_state.get("distributed_type")  # empty until a Trainer has made its accelerator
    if engine in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"optim={optim!r} does not run under {engine.value} in this version of hf_galore, because that shards the "
            "matrices; use DDP or a single process"
        )


# optim_args: what each key means. Keys of the projected groups, and keys of the optimizer.


def _boolean(text: str) -> bool:
    choices = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in choices:
        raise ValueError("true or false")
    return choices[text.lower()]


def _state_dtype(text: str) -> torch.dtype:
    name = {"bf16": "bfloat16", "fp32": "float32"}.get(text, text.removeprefix("torch."))
    if name not in STATE_DTYPES:
        raise ValueError(" or ".join(STATE_DTYPES))
    return STATE_DTYPES[name]


_GROUP_KEYS: dict[str, Callable[[str], Any]] = {
    "rank": int,
    "update_proj_gap": int,
    "scale": float,
    "proj_type": str,
    "subspace": str,
}
_OPTIMIZER_KEYS: dict[str, Callable[[str], Any]] = {
    "state_dtype": _state_dtype,
    "stochastic_rounding": _boolean,
    "seed": int,
}
_MEANING: dict[Any, str] = {int: "an integer", float: "a number"}
VALID_KEYS = ", ".join((*_GROUP_KEYS, *_OPTIMIZER_KEYS))


def _read_optim_args(given: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`optim_args` as (keys of the projected groups, keys of the optimizer), parsed.

    Raises:
        ValueError: a key is unknown, or its value does not parse.
    """
    unknown = sorted(set(given) - {*_GROUP_KEYS, *_OPTIMIZER_KEYS})
    if unknown:
        raise ValueError(f"optim_args: unknown key {', '.join(map(repr, unknown))}; valid keys are {VALID_KEYS}")
    values: dict[str, Any] = {}
    for key, text in given.items():
        read = _GROUP_KEYS.get(key) or _OPTIMIZER_KEYS[key]
        try:
            values[key] = read(text)
        except ValueError as error:
            raise ValueError(f"optim_args: {key}={text!r} is not {_MEANING.get(read, str(error))}") from error
    group = {**LOW_RANK_DEFAULTS, **{key: value for key, value in values.items() if key in _GROUP_KEYS}}
    return group, {key: value for key, value in values.items() if key in _OPTIMIZER_KEYS}


def _parse_optim_args(text: str | None) -> dict[str, str]:
    """transformers' parser, with an error that says what is malformed."""
    for part in (text or "").replace(" ", "").split(",") if text else ():
        key, equals, value = part.partition("=")
        if not key or not equals or not value or "=" in value:
            raise ValueError(
                f"optim_args={text!r}: {part!r} is not of the form key=value; several are separated by commas. Valid "
                f"keys of the GaLore optimizers are {VALID_KEYS}"
            )
    return trainer_optimizer._parse_optim_args(text)


def _load_optimizer_and_scheduler(self: hf_trainer.Trainer, checkpoint: str | None) -> None:
    """transformers' method, with an error that says what to do where galore-torch wrote the checkpoint."""
    original = next(value for holder, name, value in _replaced if name == "_load_optimizer_and_scheduler")
    try:
        original(self, checkpoint)
    except pickle.UnpicklingError as error:
        if "galore_torch" not in str(error):
            raise
        raise ValueError(f"{checkpoint}: {GALORE_TORCH_STATE}") from error
