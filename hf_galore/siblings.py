"""Modules that are given the same input: those of one parent with certain names, such as q_proj, k_proj and v_proj."""

from collections.abc import Collection, Iterator, Sequence

from torch import nn

# Sibling modules that are given the same input in the models of transformers.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


def siblings_among(
    model: nn.Module, chosen: Collection[nn.Module], siblings: Sequence[Sequence[str]] = SIBLINGS
) -> Iterator[list[nn.Module]]:
    """The chosen modules that are children of one parent and named in one entry of `siblings`, two or more of them."""
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in siblings:
            group = [children[name] for name in names if children.get(name) in chosen]
            if len(group) > 1:
                yield group
