"""Which modules of a model attend through transformers' attention interface, and the shape of their attention."""

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_galore.attention.bias import Heads
from hf_galore.integrations.attention import Attention, AttentionCall, Result, add_hook, is_registered, remove_hook
from hf_galore.integrations.decoders import trial_of

ALL_ATTENTION = "all-attention"

# What models call the same number, on their attention modules.
_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_VALUE_DIM = ("head_dim", "head_size", "attention_head_size")
_KEY_DIM = ("qk_head_dim", *_VALUE_DIM)

# What models raise that are given too little, or something else than they take.
_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose attention hooks can reach, by path.

    Raises:
        RuntimeError: `hf_galore.register()` has not been called.
        TypeError: this is no model of transformers.
        ValueError: its attention does not go through the interface, so that hooks would never run.
    """
    if not is_registered():
        raise RuntimeError("transformers' attention has no hooks yet: call hf_galore.register() first")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: {type(model).__name__} is not a model of transformers (a PreTrainedModel)")
    found = {path: module for path, module in model.named_modules() if _asks_interface(type(module))}
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} computes attention in its own code and not through transformers' "
            "attention interface, where hf_galore could add to it"
        )
    return found


def _asks_interface(cls: type[nn.Module]) -> bool:
    """Whether the forward method asks `AttentionInterface.get_interface` for its attention function."""
    forwards = (vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base))
    codes = (getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards)
    return any(code is not None and "get_interface" in code.co_names for code in codes)


def heads_of(path: str, module: nn.Module) -> Heads:
    """The shape of the module's attention, as its attributes say it.

    Raises:
        ValueError: they do not.
    """
    config = getattr(module, "config", None)
    query = _first(module, _QUERY_HEADS) or getattr(config, "num_attention_heads", None)
    key_dim, value_dim = _first(module, _KEY_DIM), _first(module, ("v_head_dim", *_VALUE_DIM))
    if query is None or key_dim is None or value_dim is None:
        raise ValueError(
            f"target_modules: {path!r} ({type(module).__name__}) does not say how many heads of what size"
        )
    return Heads(query, query // getattr(module, "num_key_value_groups", 1), key_dim, value_dim)


def _first(module: nn.Module, names: Collection[str]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def check_reached(model: PreTrainedModel, targets: Mapping[str, tuple[nn.Module, Heads]]) -> None:
    """Runs the model on two tokens (or a blank image) and sees that hooks on the targets run, with those shapes.

    Where parameters have no values here (on the meta device, or spread by ZeRO-3) it cannot run and says nothing.

    Raises:
        ValueError: the model does not run on these alone, a target is not reached, or its keys and values have other
            shapes.
    """
    if any(param.is_meta or hasattr(param, "ds_id") for param in model.parameters()):
        return
    seen: dict[nn.Module, Heads] = {}

    def see(call: AttentionCall, attention: Attention) -> Result:
        shapes = call.query.shape[1], call.key.shape[1], call.key.shape[3], call.value.shape[3]
        seen[call.module] = Heads(*shapes)
        return attention(call)

    modules = [module for module, _ in targets.values()]
    for module in modules:
        add_hook(module, see)
    try:
        with trial_of(model):
            _run_on_an_example(model)
    finally:
        for module in modules:
            remove_hook(module, see)
    for path, (module, heads) in targets.items():
        if module not in seen:
            raise ValueError(
                f"target_modules: {path!r} ({type(module).__name__}) does not attend through transformers' attention "
                f"interface when {type(model).__name__} runs: name other modules, or change the setting that makes it"
            )
        if seen[module] != heads:
            raise ValueError(f"target_modules: {path!r} attends with {seen[module]} and not with {heads}")


def _run_on_an_example(model: PreTrainedModel) -> None:
    """Runs the model on the smallest input; with an image beside the text where it does not run on text alone.

    Raises:
        ValueError: it runs on neither.
    """
    inputs = example_of(model)
    try:
        model(**inputs)
    except _ERRORS as error:
        reason: Exception = error
    else:
        return
    takes = inspect.signature(model.forward).parameters
    if "input_ids" in inputs and "pixel_values" in takes:
        try:
            model(**inputs, **_blank_image(model))
        except _ERRORS as error:
            reason = error
        else:
            return
    raise ValueError(
        f"model: {type(model).__name__} cannot be tried: it does not run on {' and '.join(inputs)} as they are tried "
        f"here ({type(reason).__name__}: {reason})"
    ) from reason


def example_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The smallest input that the model takes.

    Raises:
        ValueError: its main input is neither ids nor an image, or it does not say the size of its images.
    """
    name = model.main_input_name
    config: Any = model.config
    if name == "input_ids":
        tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        return {name: tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})
    if name == "pixel_values":
        return _blank_image(model)
    raise ValueError(f"model: {type(model).__name__} takes {name}; supported are models of input_ids and pixel_values")


def _blank_image(model: PreTrainedModel) -> dict[str, Tensor]:
    """An image of the size that the model's configuration, or a part of it, says."""
    config: Any = model.config
    known = (one for one in (config, *_parts(config)) if hasattr(one, "image_size") and hasattr(one, "num_channels"))
    vision: Any = next(known, None)
    if vision is None:
        raise ValueError(f"model: the configuration of {type(model).__name__} says no image_size and num_channels")
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.zeros(1, vision.num_channels, height, width, dtype=model.dtype, device=model.device)
    return {"pixel_values": image}


def _parts(config: Any) -> Iterator[PreTrainedConfig]:
    """The configurations of the parts of a model, such as its `vision_config`."""
    return (value for value in vars(config).values() if isinstance(value, PreTrainedConfig))
