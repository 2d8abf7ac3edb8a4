"""The explicit attention bias on models of transformers: `add_attention_bias` and its inverse.

    import hf_galore; hf_galore.register()
    model = AutoModelForCausalLM.from_pretrained(...)
    hf_galore.add_attention_bias(model)            # trainable k', v' and a gate at 0: the model as it was

The parameters are in a new child of each attention module, `kv_bias` (a name with "bias", which transformers' Trainer
does not decay). The rest of the model trains or not as it did. As an adapter of peft: `AttentionBiasConfig`.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from hf_galore.attention.bias import PAPER_STD, AttentionBias, Heads, check_bias
from hf_galore.integrations.attention import Attention, AttentionCall, Result, add_hook, remove_hook
from hf_galore.integrations.attention_bias_kernels import attend, check_implementation
from hf_galore.integrations.attention_modules import ALL_ATTENTION, attention_modules, check_reached, heads_of
from hf_galore.param_groups import matches

CHILD = "kv_bias"


def add_attention_bias(
    model: PreTrainedModel,
    target_modules: str | Sequence[str] = ALL_ATTENTION,
    *,
    kind: str = "key_value",
    start: str = "noop",
    n: int = 1,
    std: float = PAPER_STD,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Adds trainable columns to the attention of a model, in place, and returns the model.

    They are in the model's state dict and checkpoints. `from_pretrained` does not know them, and leaves them out with
    a warning: add them again and load the state dict, or use `AttentionBiasConfig`, which saves an adapter.

    Args:
        target_modules: "all-attention"; or a regular expression that matches whole paths, or a part of a path; or a
            list of those.
        kind: "key_value" (k' and v', the paper's), "sink_logits" (a logit per query head, as gpt-oss has), or
            "off_by_one" (softmax with 1 added to its denominator).
        start: "noop" puts a gate per query head before them, at 0, so that the model starts as what it is; "random"
            has no gate and is for training from scratch.
        n: how many columns.
        std: of the normal distribution that they start from.
        dtype: of the parameters; the model's own by default.

    Raises:
        ValueError: the model's attention cannot be reached, has such a bias already or runs in an implementation
            that cannot have one; nothing matches; or an argument is none of these. The model is as it was.
        TypeError: an argument of a wrong type.
        RuntimeError: `hf_galore.register()` has not been called.
    """
    check_bias(kind, start, n, std)
    modules = attention_modules(model)
    targets = check_targets(model, _chosen(modules, target_modules))
    for module, heads in targets.values():
        device = next(module.parameters()).device
        install(module, AttentionBias(heads, kind, start, n, std, device=device, dtype=dtype or model.dtype))
    return model


def remove_attention_bias(model: nn.Module) -> nn.Module:
    """Takes out what `add_attention_bias` has put in, and returns the model.

    Raises:
        ValueError: there is none.
    """
    modules = [module for module in model.modules() if isinstance(getattr(module, CHILD, None), AttentionBias)]
    if not modules:
        raise ValueError(f"model: {type(model).__name__} has no attention bias of add_attention_bias")
    for module in modules:
        uninstall(module)
    return model


def install(module: nn.Module, bias: nn.Module) -> None:
    """Makes the attention module attend to what the bias, called with a device, returns: `Columns`, or None."""
    module.add_module(CHILD, bias)
    add_hook(module, _hook)


def uninstall(module: nn.Module) -> None:
    """Undoes `install`."""
    remove_hook(module, _hook)
    delattr(module, CHILD)


def check_targets(model: PreTrainedModel, modules: dict[str, nn.Module]) -> dict[str, tuple[nn.Module, Heads]]:
    """The modules with the shapes of their attention.

    Raises:
        ValueError: one has a bias already, runs in an implementation without one, or is not reached.
    """
    for path, module in modules.items():
        if hasattr(module, CHILD):
            raise ValueError(f"target_modules: {path!r} has an attention bias already: remove that first")
        check_implementation(getattr(getattr(module, "config", None), "_attn_implementation", None))
    targets = {path: (module, heads_of(path, module)) for path, module in modules.items()}
    if targets:
        check_reached(model, targets)
    return targets


def _chosen(modules: dict[str, nn.Module], target_modules: Any) -> dict[str, nn.Module]:
    """Those of the modules that are asked for."""
    patterns = [target_modules] if isinstance(target_modules, str) else target_modules
    if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"target_modules={target_modules!r} must be {ALL_ATTENTION!r}, a pattern, or a list of those")
    if list(patterns) == [ALL_ATTENTION]:
        return modules
    unknown = [pattern for pattern in patterns if not any(matches(pattern, path) for path in modules)]
    if unknown or not patterns:
        raise ValueError(
            f"target_modules={target_modules!r}: no attention module matches {', '.join(map(repr, unknown)) or 'it'}; "
            f"there are {', '.join(modules)}"
        )
    return {path: module for path, module in modules.items() if any(matches(p, path) for p in patterns)}


def _hook(call: AttentionCall, attention: Attention) -> Result:
    columns = getattr(call.module, CHILD)(call.query.device)
    return attention(call) if columns is None else attend(call, attention, columns)
