"""The mixtures of a model: the experts that a module holds in one tensor each, and the routers that choose among them.

Experts are known by what a model says of them, not by their shape: transformers' decorator
`use_experts_implementation` describes the layout of a module (`is_transposed`, …), and the others count their experts
in an attribute.
"""

from collections.abc import Iterator

from torch import nn

_DESCRIBED = ("has_gate", "is_transposed")  # what the decorator puts on a module


def fused_experts(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights (E, ., .) of all experts that the module holds itself, by name; their biases are not among them."""
    is_described = all(hasattr(module, name) for name in _DESCRIBED)
    counts = _counts(module)
    return {
        name: param
        for name, param in module.named_parameters(recurse=False)
        if param.dim() == 3
        and param.is_floating_point()
        and not name.endswith("bias")
        and (is_described or param.shape[0] in counts)
    }


def stores_transposed(module: nn.Module) -> bool:
    """Whether the module stores the weights of its experts as (E, in_features, out_features).

    Where it does not say, that of gate and up together has twice as many outputs as that of down has inputs.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    weights = fused_experts(module)
    first, last = weights.get("gate_up_proj"), weights.get("down_proj")
    return first is not None and last is not None and first.shape[-1] == 2 * last.shape[-2]


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that choose among experts or weigh them, in every block that has experts as a child.

    Such a module is, or holds, an nn.Linear with one output for each expert, or it has one output (the gate of shared
    experts).
    """
    for block in model.modules():
        children = dict(block.named_children())
        experts = {name for name, child in children.items() if _holds_experts(name, child)}
        counts = _counts(block).union(*(_counts(children[name]) | _sizes(children[name]) for name in experts))
        for name in children.keys() - experts if experts else ():
            if _chooses(name, children[name], counts):
                yield children[name]


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Whether this child of a block is its experts: their weights in one tensor, or a module for each."""
    return bool(fused_experts(module)) or ("experts" in name and not isinstance(module, nn.Linear))


def _chooses(name: str, module: nn.Module, counts: set[int]) -> bool:
    if isinstance(module, nn.Linear):
        return module.out_features in {1, *counts}
    linear = (child for child in module.modules() if isinstance(child, nn.Linear))
    return "expert" not in name and any(child.out_features in counts for child in linear)


def _counts(module: nn.Module) -> set[int]:
    """The numbers of experts that a module's attributes say (`num_experts`, `n_shared_experts`, …)."""
    return {value for name, value in vars(module).items() if "experts" in name and type(value) is int}


def _sizes(module: nn.Module) -> set[int]:
    """The numbers of experts that a module holds in one tensor each, or as its children."""
    fused = {param.shape[0] for param in fused_experts(module).values()}
    return fused or ({len(module)} if isinstance(module, nn.ModuleList | nn.ModuleDict) else set())
