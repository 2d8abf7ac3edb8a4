"""GaLore under FSDP2: the one convention for the sides, and the small parameters of the projected backward sharded."""

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from accelerate import Accelerator
from accelerate import accelerator as hf_accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers.utils import logging

from hf_galore.frozen_weight import holds_codes
from hf_galore.integrations.requirements import FSDP2, require
from hf_galore.low_rank_options import side_of_rows
from hf_galore.lowrank_backward import engine_of, shown
from hf_galore.messages import only, std_is

logger = logging.get_logger(__name__)

_FUNCTION = "fsdp2_prepare_model"
_original: list[Callable[..., nn.Module]] = []


def register() -> None:
    """Makes accelerate shard models with the projected backward. Idempotent; see `unregister`."""
    if not _original:
        _original.append(vars(hf_accelerator)[_FUNCTION])
        setattr(hf_accelerator, _FUNCTION, prepare_model)


def unregister() -> None:
    """Restores accelerate, and torch, which is changed when a model is prepared. Does nothing else."""
    if _original:
        setattr(hf_accelerator, _FUNCTION, _original.pop())
    for name, function in _torch_functions.items():
        setattr(import_module(_STATE_DICTS), name, function)
    _torch_functions.clear()


def shards_rows(optim: str) -> bool:
    """Whether the Trainer's accelerator is to shard the model with FSDP2.

    Raises:
        ValueError: it is to shard it with FSDP1.
        ImportError: accelerate has not what the projected backward needs for that.
    """
    state = AcceleratorState._shared_state  # empty until a Trainer has made its accelerator
    if state.get("distributed_type") != DistributedType.FSDP:
        return False
    if getattr(state.get("fsdp_plugin"), "fsdp_version", 1) != 2:
        raise ValueError(
            f"optim={optim!r} does not run under FSDP1, whose flat shards hold no matrices; use FSDP2: "
            "fsdp_config={'version': 2} in TrainingArguments, or fsdp_version: 2 in accelerate's configuration"
        )
    require(FSDP2)
    return True


def use_right(low_rank: dict[str, Any], default: str) -> None:
    """Makes the side `right`, with one line in the log where `std` was asked for.

    Raises:
        ValueError: another side was asked for.
    """
    asked = low_rank.get("proj_type", default)
    if asked not in ("std", "right"):
        raise ValueError(only("right", asked))
    if asked == "std":
        logger.warning_once(std_is("right"))
    low_rank["proj_type"] = "right"


def use_rows(groups: Sequence[dict[str, Any]]) -> None:
    """Makes the side of each low-rank group that by which a rank can step its rows alone.

    That is `right`, and for transposed matrices `left`. One line in the log says so where `std` was asked for.

    Raises:
        ValueError: another side was asked for.
    """
    for group in groups:
        if "rank" in group:
            is_batch = all(param.dim() > 2 for param in group["params"])  # of experts, of which a rank has whole ones
            side = "right" if is_batch else side_of_rows(group)
            if group["proj_type"] not in ("std", side):
                raise ValueError(only(side, group["proj_type"]))
            if group["proj_type"] == "std":
                logger.warning_once(std_is(side))
            group["proj_type"] = side


def refuse_codes(model: nn.Module) -> None:
    """Raises ValueError for a model with quantized weights: FSDP2 does not shard codes together with their scales."""
    name = next((name for name, module in model.named_modules() if holds_codes(module)), None)
    if name is not None:
        raise ValueError(
            f"target_modules: {name!r} is quantized, and FSDP2 does not shard codes with their scales; train such "
            "weights in a single process or under DDP, or load the model in bfloat16"
        )


def prepare_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """accelerate's function of this name; it moves parameters by state dicts, which show the small ones meanwhile."""
    engine = engine_of(model)
    if engine is None:
        return _original[0](accelerator, model)
    _show_to_checkpoints()
    engine.hides_updates = False
    try:
        prepared = _original[0](accelerator, model)
    finally:
        engine.hides_updates = True
    for layer in engine.layers.values():
        layer.leave_original()
    return prepared


# torch names the parameters of an optimizer by walking those of the model.

_STATE_DICTS = "torch.distributed.checkpoint.state_dict"  # slow to import, and needed by FSDP2 alone
_NAMES = ("get_optimizer_state_dict", "set_optimizer_state_dict", "get_state_dict", "set_state_dict")
_torch_functions: dict[str, Callable[..., Any]] = {}


def _show_to_checkpoints() -> None:
    """Makes torch's distributed state dicts of optimizers find the small parameters. Idempotent; see `unregister`."""
    if not _torch_functions:
        module = import_module(_STATE_DICTS)
        for name in _NAMES:
            _torch_functions[name] = getattr(module, name)
            setattr(module, name, _showing(_torch_functions[name]))


def _showing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(model: nn.Module, *args: Any, **options: Any) -> Any:
        with shown(model):
            return function(model, *args, **options)

    return wrapper
