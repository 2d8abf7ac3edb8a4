"""Which modules the projected backward swaps, and which of them share a basis."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hf_galore.frozen_weight import frozen_weight, is_quantized, rounding
from hf_galore.param_groups import is_conv1d
from hf_galore.siblings import siblings_among
from hf_galore.weight_reads import read_weights

_PLAIN_KINDS = ("FalconLinear",)  # of nn.Linear, with a forward of their own that computes what nn.Linear does


def swappable(model: nn.Module, targets: set[str]) -> list[nn.Module]:
    """The modules whose weights are among the targets (names) and whose forward is x Wᵀ + bias and nothing else.

    Left out are output heads, because some losses read their weight and never call them, and weights that a module of
    another kind uses too, or a model's own code.
    """
    wanted = {id(param) for name, param in model.named_parameters() if name in targets}
    plain = list(_plain_modules(model))
    known = {id(module) for module in plain}
    elsewhere = {id(p) for other in model.modules() if id(other) not in known for p in other.parameters(recurse=False)}
    chosen = wanted - elsewhere - read_weights(model)
    return [module for module in plain if id(module.weight) in chosen]


def _plain_modules(model: nn.Module) -> Iterator[nn.Module]:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    heads = set(head.modules()) if head is not None else set()
    for module in model.modules():
        plain = _plain_forward(module) and not isinstance(module, NonDynamicallyQuantizableLinear)
        if plain and _is_own(module) and module not in heads:
            yield module


def forward_name(module: nn.Module) -> str:
    """The attribute that holds what a module computes: another one where accelerate's device hooks call it."""
    return "_old_forward" if "_hf_hook" in vars(module) and "_old_forward" in vars(module) else "forward"


def _is_own(module: nn.Module) -> bool:
    """Whether the module computes what its class says, with weights that stay on their device."""
    if forward_name(module) == "forward":
        return "forward" not in vars(module)
    hooks: Any = vars(module)["_hf_hook"]
    offloads = any(getattr(hook, "offload", False) for hook in getattr(hooks, "hooks", [hooks]))
    return getattr(vars(module)["_old_forward"], "__func__", None) is type(module).forward and not offloads


def _plain_forward(module: nn.Module) -> bool:
    if is_conv1d(module):
        base = next(cls for cls in reversed(type(module).__mro__) if cls.__name__ == "Conv1D")
        return type(module).forward is vars(base)["forward"]
    is_plain = type(module).forward is nn.Linear.forward
    is_plain |= isinstance(module, nn.Linear) and type(module).__name__ in _PLAIN_KINDS
    return is_plain or is_quantized(module) or rounding(module) is not None


def sharing_inputs(
    model: nn.Module, modules: Sequence[nn.Module], siblings: Sequence[Sequence[str]]
) -> list[list[nn.Module]]:
    """The modules in groups that share a basis: children of one parent, named in one entry of `siblings`.

    The groups are in the order of their first modules; a module without siblings is alone in its group.
    """
    chosen = set(modules)
    group_of: dict[nn.Module, list[nn.Module]] = {}
    for group in siblings_among(model, chosen, siblings):
        weights = [frozen_weight(one) for one in group]
        alike = {(weight.shape[1], weight.dtype) for weight in weights}
        if len(alike) == 1 and not any(getattr(one, "rms_norm", None) for one in group):  # whose inputs then differ
            group_of.update(dict.fromkeys(group, group))
    groups, seen = [], set()
    for module in modules:
        if module not in seen:
            groups.append(group_of.get(module, [module]))
            seen.update(groups[-1])
    return groups
