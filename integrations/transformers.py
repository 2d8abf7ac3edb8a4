"""GaLore in transformers' Trainer: `optim="galore_adamw"` and its sisters resolve to hf_galore's optimizers.

`register` swaps entries of transformers' optimizer registry and a few functions around it, and remembers what was
there; `unregister` puts exactly that back.
"""

import functools
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import nn
from transformers import trainer as hf_trainer
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames, ParallelMode, TrainingArguments
from transformers.utils.import_utils import is_bitsandbytes_available
from transformers.utils.import_utils import is_galore_torch_available as _asks_for_galore_torch
from transformers.utils.quantization_config import QuantizationMethod

from hf_galore.frozen_weight import holds_codes, whole_shapes
from hf_galore.integrations import fsdp
from hf_galore.integrations.command_line import several_target_modules
from hf_galore.integrations.deepspeed import check_settings, check_targets, refuse_own_optimizer
from hf_galore.integrations.requirements import DEEPSPEED, PROJECTED_BACKWARD, require
from hf_galore.integrations.subspace_log import SubspaceLog
from hf_galore.low_rank_options import LOW_RANK_DEFAULTS
from hf_galore.lowrank_backward import disable, enable
from hf_galore.optim.adafactor import GaLoreAdafactor
from hf_galore.optim.adamw import GaLoreAdamW
from hf_galore.optim.adamw8bit import GaLoreAdamW8bit
from hf_galore.optim.optimizer import GALORE_TORCH_STATE, STATE_DTYPES, LowRankOptimizer
from hf_galore.param_groups import find_targets, galore_param_groups, warn_of_a_small_share

logger = get_logger(__name__)

OPTIMIZERS: dict[OptimizerNames, type[torch.optim.Optimizer]] = {
    OptimizerNames.GALORE_ADAMW: GaLoreAdamW,
    OptimizerNames.GALORE_ADAMW_8BIT: GaLoreAdamW8bit,
    OptimizerNames.GALORE_ADAFACTOR: GaLoreAdafactor,
}
LAYERWISE: dict[OptimizerNames, type[torch.optim.Optimizer]] = {
    OptimizerNames.GALORE_ADAMW_LAYERWISE: GaLoreAdamW,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE: GaLoreAdamW8bit,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE: GaLoreAdafactor,
}

_REPLICATED = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)  # DDP: the same gradients on all ranks

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
    field, several = several_target_modules()
    _replaced.append((field, "metadata", field.metadata))
    field.metadata = several
    _replace(hf_trainer, "validate_quantization_for_training", _validate_quantization_for_training)
    functools.update_wrapper(_init, hf_trainer.Trainer.__init__, assigned=())  # keeps its signature
    for name, method in _METHODS.items():
        _replace(hf_trainer.Trainer, name, method)
    _swap_guard(_asks_for_galore_torch, _is_galore_torch_available)


def unregister() -> None:
    """Restores transformers exactly as it was before `register`. Does nothing if it is not registered."""
    if not _handlers:
        return
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

    Under DeepSpeed it is what `_layerwise_optimizer` gives.

    Raises:
        ValueError: no or unknown target modules, an unknown or malformed key in `optim_args`, or an engine that shards
            parameters.
        TypeError: `optim_target_modules` is neither a string nor a list.
    """
    if _engine() == DistributedType.DEEPSPEED:
        name = OptimizerNames(ctx.args.optim).value
        logger.warning(f"optim={name!r}: DeepSpeed shards matrices into flat vectors; this runs as {name}_layerwise")
        return _layerwise_optimizer(ctx)
    optimizer, kwargs, low_rank = _read(ctx, OPTIMIZERS, _GROUP_KEYS)
    model = _model(ctx)
    kwargs["params"] = galore_param_groups(
        model, ctx.args.optim_target_modules, **{**LOW_RANK_DEFAULTS, **low_rank}, **_decay(ctx.args, model)
    )
    if fsdp.shards_rows(ctx.args.optim):
        fsdp.use_rows(kwargs["params"])
    return optimizer, kwargs


def _layerwise_optimizer(ctx: trainer_optimizer.OptimizerContext) -> tuple[Any, dict[str, Any]]:
    """A factory, in the Trainer's sense, of the optimizer for a model that it swaps to the projected backward.

    It comes with the keyword arguments to call it with, which a Trainer may have changed by then.

    Raises:
        ValueError, TypeError: as `_galore_optimizer`.
        ImportError: torch has not what the projected backward rests on.
    """
    require(PROJECTED_BACKWARD)
    optimizer_class, kwargs, low_rank = _read(ctx, OPTIMIZERS | LAYERWISE, {**_GROUP_KEYS, **_LAYERWISE_KEYS})
    target_modules = ctx.args.optim_target_modules
    with whole_shapes(_model(ctx)):
        targets = find_targets(_model(ctx), target_modules, holds_codes)  # raises for names that match nothing
        warn_of_a_small_share(_model(ctx), targets, target_modules)
    if _engine() == DistributedType.DEEPSPEED:
        _suit_deepspeed(ctx, optimizer_class, low_rank)
    if fsdp.shards_rows(ctx.args.optim):
        fsdp.use_right(low_rank, "right")
        fsdp.refuse_codes(_model(ctx))
    low_rank["gradient_accumulation_steps"] = ctx.args.gradient_accumulation_steps
    if low_rank.get("refresh") == "exact" and ctx.args.parallel_mode == ParallelMode.DISTRIBUTED:
        raise ValueError("optim_args: refresh='exact' takes the gradients of one process; use refresh=streaming")

    def make(model: nn.Module, **kwargs: Any) -> torch.optim.Optimizer:
        decay = _decay(ctx.args, model)  # of the plain model: its weights still train, and have no companions
        shared = {key: kwargs[key] for key in ("state_dtype", "stochastic_rounding", "seed") if key in kwargs}
        engine = enable(model, target_modules, **low_rank, **shared)
        if _engine() == DistributedType.DEEPSPEED:
            check_targets(engine)
        engine.gradients_complete = lambda: bool(GradientState().sync_gradients)
        groups = engine.param_groups(model, **decay)
        optimizer: Any = optimizer_class(groups, **kwargs)
        engine.attach(optimizer)
        optimizer.lowrank_backward = engine
        return optimizer

    return lambda: make, kwargs


def _suit_deepspeed(
    ctx: trainer_optimizer.OptimizerContext, optimizer: type[torch.optim.Optimizer], low_rank: dict[str, Any]
) -> None:
    """Changes the options into those that run under DeepSpeed and give the same; raises ValueError for the others."""
    if not issubclass(optimizer, GaLoreAdamW):
        raise ValueError(
            f"optim={OptimizerNames(ctx.args.optim).value!r} does not run under DeepSpeed, which shards the matrices "
            "whose moments it factors; what does: galore_adamw and galore_adamw_8bit, also with _layerwise"
        )
    if low_rank.get("proj_type") == "std":
        logger.warning("optim_args: proj_type=std runs as proj_type=right under DeepSpeed")
        low_rank["proj_type"] = "right"
    check_settings(low_rank)
    low_rank.setdefault("fold_every", low_rank.get("update_proj_gap", LOW_RANK_DEFAULTS["update_proj_gap"]))


def _read(
    ctx: trainer_optimizer.OptimizerContext,
    optimizers: dict[OptimizerNames, type[torch.optim.Optimizer]],
    keys: dict[str, Callable[[str], Any]],
) -> tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]:
    """The optimizer class, its keyword arguments without groups, and those of `optim_args` that are in `keys`."""
    name = OptimizerNames(ctx.args.optim)
    _refuse_engine(name)
    if ctx.args.optim_target_modules is None:
        raise ValueError(
            f"optim={name.value!r} needs optim_target_modules: 'all-linear', a regular expression, part of a module "
            "name, or a list of those"
        )
    low_rank, options = _read_optim_args(ctx.optim_args, keys)
    options.pop("statistics", None)  # `_create_optimizer` sees to that
    kwargs: dict[str, Any] = {**ctx.optimizer_kwargs, "seed": ctx.args.seed, **options}
    if optimizers[name] is GaLoreAdafactor:
        kwargs.update(scale_parameter=False, relative_step=False)
    else:
        kwargs.update(ctx.adam_kwargs)
    return optimizers[name], kwargs, low_rank


def _model(ctx: trainer_optimizer.OptimizerContext) -> nn.Module:
    if ctx.model is None:
        raise ValueError(f"optim={OptimizerNames(ctx.args.optim).value!r} needs the model: pass it as well")
    return ctx.model


# The Trainer that trains or makes an optimizer: transformers passes on its arguments alone.
_at_work: ContextVar[hf_trainer.Trainer | None] = ContextVar("hf_galore_at_work", default=None)


@contextmanager
def _working(trainer: hf_trainer.Trainer) -> Iterator[None]:
    """Inside, `trainer` is the Trainer at work."""
    token = _at_work.set(trainer)
    try:
        yield
    finally:
        _at_work.reset(token)


def _decay(args: TrainingArguments, model: nn.Module) -> dict[str, Any]:
    """Weight decay as the Trainer at work applies it; where there is none, as transformers' own does."""
    trainer = _at_work.get()
    kind = hf_trainer.Trainer if trainer is None else type(trainer)
    names = kind.get_decay_parameter_names(trainer, model)
    return {"weight_decay": args.weight_decay, "decay_parameters": frozenset(names)}


# The model is the user's own again when training ends, whichever way it ends.


def _create_optimizer(self: hf_trainer.Trainer, model: nn.Module | None = None) -> torch.optim.Optimizer:
    """The Trainer's method, on a model that carries nothing of an earlier Trainer's projected backward."""
    optimizer = self.optimizer
    while optimizer is not None and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    engine = getattr(optimizer, "lowrank_backward", None)
    if engine is not None:
        engine.install()  # train() once more: the same layers, the same state
    else:
        disable(self.model if model is None else model)
    with _working(self):
        made = _original("create_optimizer")(self, model)
    if isinstance(made, LowRankOptimizer) and self.accelerator.distributed_type in _REPLICATED:
        made.replicas = dist.group.WORLD
    if optimizer is None and _asks_for_statistics(self.args):
        log = SubspaceLog(self)
        getattr(made, "lowrank_backward", made).observe = log
        self.add_callback(log)
    return made


def _asks_for_statistics(args: TrainingArguments) -> bool:
    is_ours = OptimizerNames(args.optim) in (*OPTIMIZERS, *LAYERWISE)
    given = trainer_optimizer._parse_optim_args(args.optim_args) if is_ours else {}
    return _boolean(given.get("statistics", "false"))


def _train(self: hf_trainer.Trainer, *args: Any, **kwargs: Any) -> Any:
    """The Trainer's method; at its end the projected backward is taken out of the model."""
    name = OptimizerNames(self.args.optim)
    if name in (*OPTIMIZERS, *LAYERWISE):
        _refuse_engine(name)  # before the model is wrapped
    ended = False
    try:
        with _working(self):  # also for a create_optimizer that a subclass has put in the place of ours
            result = _original("train")(self, *args, **kwargs)
        ended = True
    finally:
        # A hyper-parameter search leaves no model. Under DeepSpeed a fold waits for ranks that may be gone.
        if self.model is not None and (ended or _engine() != DistributedType.DEEPSPEED):
            disable(self.model)
    return result


def _original(name: str) -> Any:
    return next(value for _, replaced, value in _replaced if replaced == name)


def _engine() -> DistributedType | None:
    """The engine of the Trainer's accelerator; None before one has been made."""
    return AcceleratorState._shared_state.get("distributed_type")


def _refuse_engine(optim: OptimizerNames) -> None:
    """Raises for engines under which the optimizer would train wrongly."""
    if _engine() == DistributedType.DEEPSPEED:
        require(DEEPSPEED)
    if _engine() == DistributedType.MEGATRON_LM:
        raise ValueError(
            f"optim={optim.value!r} does not run under Megatron-LM, which spreads matrices over ranks in its own way; "
            "use FSDP2, DeepSpeed, DDP or a single process"
        )
    if fsdp.shards_rows(optim.value) and {**OPTIMIZERS, **LAYERWISE}[optim] is GaLoreAdafactor:
        raise ValueError(
            f"optim={optim.value!r} does not run under FSDP2, because its second moments are sums over all rows; use "
            "galore_adamw or galore_adamw_8bit"
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
    "random_from": int,
    "moments": str,
    "source": str,
    "basis_dtype": str,
    "equal_state": _boolean,
    "stagger": _boolean,
    "lazy": _boolean,
}
_LAYERWISE_KEYS: dict[str, Callable[[str], Any]] = {
    "refresh": str,
    "fold_every": int,
    "share_inputs": _boolean,
    "offload_masters": _boolean,
}
_OPTIMIZER_KEYS: dict[str, Callable[[str], Any]] = {
    "state_dtype": _state_dtype,
    "stochastic_rounding": _boolean,
    "seed": int,
}
_TRAINER_KEYS: dict[str, Callable[[str], Any]] = {"statistics": _boolean}
_MEANING: dict[Any, str] = {int: "an integer", float: "a number"}
VALID_KEYS = ", ".join((*_GROUP_KEYS, *_OPTIMIZER_KEYS, *_TRAINER_KEYS))
VALID_KEYS += f"; with the _layerwise names also {', '.join(_LAYERWISE_KEYS)}"


def _read_optim_args(
    given: dict[str, str], keys: dict[str, Callable[[str], Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`optim_args` as (those in `keys`, the others), parsed.

    Raises:
        ValueError: a key is unknown, or its value does not parse.
    """
    valid = {**keys, **_OPTIMIZER_KEYS, **_TRAINER_KEYS}
    unknown = sorted(set(given) - set(valid))
    if unknown:
        raise ValueError(f"optim_args: unknown key {', '.join(map(repr, unknown))}; valid keys are {', '.join(valid)}")
    values: dict[str, Any] = {}
    for key, text in given.items():
        try:
            values[key] = valid[key](text)
        except ValueError as error:
            raise ValueError(f"optim_args: {key}={text!r} is not {_MEANING.get(valid[key], str(error))}") from error
    return {key: values[key] for key in values if key in keys}, {key: values[key] for key in values if key not in keys}


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
    """transformers' method, with errors for checkpoints that it would go on from without a part of the state.

    Raises:
        ValueError: a checkpoint is not complete, or galore-torch wrote it.
    """
    if checkpoint is not None and OptimizerNames(self.args.optim) in (*OPTIMIZERS, *LAYERWISE):
        _refuse_half(Path(checkpoint), self.is_deepspeed_enabled)
    try:
        _original("_load_optimizer_and_scheduler")(self, checkpoint)
    except pickle.UnpicklingError as error:
        if "galore_torch" not in str(error):
            raise
        raise ValueError(f"{checkpoint}: {GALORE_TORCH_STATE}") from error


def _refuse_half(checkpoint: Path, is_deepspeed_enabled: bool) -> None:
    """Raises ValueError for a checkpoint that lacks what transformers writes after the weights, or last of all."""
    if not (checkpoint / hf_trainer.TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"{checkpoint} is not complete: it has no {hf_trainer.TRAINER_STATE_NAME}, which is written last, so the "
            "run was killed while it saved. Resume from the checkpoint before it, or delete it"
        )
    if not (checkpoint / hf_trainer.SCHEDULER_NAME).is_file():
        raise ValueError(
            f"{checkpoint} has the weights alone (save_only_model=True): a run cannot go on from it without the state "
            "of its optimizer. Load it as the model and train without resume_from_checkpoint"
        )
    if not is_deepspeed_enabled and not any(checkpoint.glob(f"{Path(hf_trainer.OPTIMIZER_NAME).stem}*")):
        raise ValueError(
            f"{checkpoint} has no {hf_trainer.OPTIMIZER_NAME}, because DeepSpeed or another tool wrote it: the run "
            "would start from no state of its optimizer. Resume as it was written, or load it as the model and train "
            "without resume_from_checkpoint"
        )


# A model that bitsandbytes has quantized trains without adapters under the layerwise names, and only under those.

_trains_codes: ContextVar[bool] = ContextVar("hf_galore_trains_codes", default=False)


def _init(
    self: hf_trainer.Trainer, model: Any = None, args: TrainingArguments | None = None, *rest: Any, **kw: Any
) -> None:
    """The Trainer's method, which asks whether a quantized model can be trained."""
    token = _trains_codes.set(args is not None and OptimizerNames(args.optim) in LAYERWISE)
    try:
        _original("__init__")(self, model, args, *rest, **kw)
    finally:
        _trains_codes.reset(token)
    if self.is_deepspeed_enabled and OptimizerNames(self.args.optim) in (*OPTIMIZERS, *LAYERWISE):
        refuse_own_optimizer(self.args.optim, self.accelerator.state.deepspeed_plugin.deepspeed_config)


def _validate_quantization_for_training(model: nn.Module) -> None:
    """transformers' check, but for what the projected backward trains."""
    if not (_trains_codes.get() and _is_from_bitsandbytes(model)) or hasattr(model, "_orig_mod"):
        _original("validate_quantization_for_training")(model)


def _is_from_bitsandbytes(model: Any) -> bool:
    method = getattr(model, "quantization_method", None)
    return bool(method == QuantizationMethod.BITS_AND_BYTES) and is_bitsandbytes_available()


def _load_from_checkpoint(
    self: hf_trainer.Trainer, resume_from_checkpoint: str, model: nn.Module | None = None
) -> None:
    """The Trainer's method, which would load the codes of 4-bit weights without their scales."""
    with _loading_scales(self.model if model is None else model):
        _original("_load_from_checkpoint")(self, resume_from_checkpoint, model)


def _load_best_model(self: hf_trainer.Trainer) -> None:
    """As `_load_from_checkpoint`."""
    with _loading_scales(self.model):
        _original("_load_best_model")(self)


def _loading_scales(model: Any) -> AbstractContextManager[None]:
    if not _is_from_bitsandbytes(model):
        return nullcontext()
    from hf_galore.integrations.bitsandbytes import loading_scales

    return loading_scales(model)


_METHODS: dict[str, Callable[..., Any]] = {
    "__init__": _init,
    "create_optimizer": _create_optimizer,
    "train": _train,
    "_load_from_checkpoint": _load_from_checkpoint,
    "_load_best_model": _load_best_model,
    "_load_optimizer_and_scheduler": _load_optimizer_and_scheduler,
}
