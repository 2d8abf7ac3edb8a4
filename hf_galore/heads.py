"""Which modules of a model are its heads: those that make logits or scores of what the base model gives."""

from collections.abc import Iterator, Mapping

from torch import nn

_NAMES = ("lm_head", "score", "classifier", "router")  # of a model that does not say what its base is


def heads(model: nn.Module) -> list[nn.Module]:
    """The heads: output embeddings, and what follows the base model in a model or in a part of it.

    transformers' models say by `base_model_prefix` which child is the base. Those of a task that have no child of that
    name (`T5ForQuestionAnswering`, …) have backbones, or a list of layers, and then the head. Where a backbone has a
    head of its own (encoder-decoders, a vision tower beside a language model) what is around it are connections. Other
    modules than transformers' are asked for a few usual names.
    """
    parts = [module for module in model.modules() if _prefix(module) is not None]
    if not parts:
        return [module for path, module in model.named_modules() if path.rpartition(".")[2] in _NAMES]
    found = [head for part in parts for head in (*_following(part), _output_embeddings(part))]
    return [head for head in found if head is not None]


def _prefix(module: nn.Module) -> str | None:
    """The name that the base model has in a transformers model; None for every other module."""
    prefix = getattr(type(module), "base_model_prefix", None)
    return prefix if isinstance(prefix, str) else None


def _following(module: nn.Module) -> Iterator[nn.Module]:
    """The children that make the head of a transformers model, which says by its class's name if it has one."""
    kind, base = type(module).__name__, _prefix(module)
    children: Mapping[str, nn.Module | None] = module._modules
    if base in children:
        start = len(children) if kind.endswith("Model") and "Head" not in kind else 0
    else:
        start = _last_backbone(children) + 1 if "For" in kind else len(children)
    for name in list(children)[start:]:
        child = children[name]
        if name != base and child is not None and _prefix(child) is None:
            yield child


def _last_backbone(children: Mapping[str, nn.Module | None]) -> int:
    """The index of the last child that the head follows; that of the last child if there is no head here."""
    end = len(children) - 1
    numbered = [(index, child) for index, child in enumerate(children.values()) if child is not None]
    backbones = {index: child for index, child in numbered if _prefix(child) is not None}
    if any(heads(child) for child in backbones.values()):
        return end
    lists = {index: child for index, child in numbered if isinstance(child, nn.ModuleList)}
    return max(backbones or lists, default=end)


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    getter = getattr(module, "get_output_embeddings", None)
    try:
        output = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # of a part without one
        return None
    return output if isinstance(output, nn.Module) else None
