"""Layers whose weight a model reads past them: `self.dt_proj.weight @ x` in place of `self.dt_proj(x)`.

Whatever stands in for such a layer's forward would not run. That is found in the source of the modules' forward
methods, before anything runs: on another device, in evaluation or with a library of kernels a model may read what it
calls here.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from torch import nn

# What is asked of a weight without its values.
_ABOUT = ("device", "dtype", "shape", "size", "ndim", "dim", "is_cuda", "requires_grad", "data_ptr", "element_size")
_ASKING = ("isinstance", "hasattr", "getattr", "type", "id")


class _Use(NamedTuple):
    """An attribute that a method asks for, and the branches that this is in."""

    name: str | None  # of an attribute of self, such as another method
    weight_of: tuple[str | None, ...]  # the names from self to the module whose weight it reads; None for all children
    branches: tuple[tuple[ast.expr, bool], ...]  # tests, and what each must give


def read_weights(model: nn.Module) -> set[int]:
    """The ids of the weights that a forward pass of the model may read past the modules that hold them.

    Branches that attributes of the module switch off do not count. Of torch's own modules, nn.MultiheadAttention is
    known to read that of its `out_proj`; others are not looked at.
    """
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found.add(id(module.out_proj.weight))
        for names in _reads(module):
            found.update(id(getattr(owner, "weight", None)) for owner in _owners(module, names))
    return found - {id(None)}


def _owners(module: Any, names: tuple[str | None, ...]) -> Iterator[nn.Module]:
    """The modules that a path from this one leads to."""
    if not isinstance(module, nn.Module):
        return
    if not names:
        yield module
        return
    first, *rest = names
    for child in module.children() if first is None else [getattr(module, first, None)]:
        yield from _owners(child, tuple(rest))


def _reads(module: nn.Module) -> set[tuple[str | None, ...]]:
    """What the methods of a module read that run in a forward pass, as far as can be told."""
    cls: Any = type(module)
    found, done = set(), set()
    coming = [] if cls.__module__.partition(".")[0] == "torch" else list(_entries(cls))
    while coming:
        name = coming.pop()
        for use in () if name in done else _uses(cls, name):
            if any(_truth(test, module) not in (None, wanted) for test, wanted in use.branches):
                continue
            if use.weight_of:
                found.add(use.weight_of)
            if use.name is not None:
                coming.append(use.name)
        done.add(name)
    return found


@cache
def _entries(cls: Any) -> list[str]:
    """The methods that others call in a forward pass: `forward`, and of a part of a model all that are public.

    Of a whole model and of peft's layers most methods are for their weights: to merge them, for one.
    """
    if hasattr(cls, "base_model_prefix") or cls.__module__.partition(".")[0] == "peft":
        return ["forward"]
    own = [vars(base) for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    names = {name for methods in own for name, method in methods.items() if callable(method)}
    return ["forward", *sorted(name for name in names if not name.startswith(("_", "init", "reset")))]


@cache
def _uses(cls: Any, name: str) -> tuple[_Use, ...]:
    """What the method of this name asks for; nothing where there is no method, or no source of it."""
    method = inspect.unwrap(getattr(cls, name)) if hasattr(cls, name) else None
    if not inspect.isfunction(method):
        return ()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):
        return ()
    nodes = [(node, above) for node, above in _nodes(tree, ()) if isinstance(node, ast.Attribute)]
    return tuple(
        _Use(node.attr if _is_self(node.value) else None, _weight_of(node, above[-1]), _branches(node, above))
        for node, above in nodes
    )


def _nodes(node: ast.AST, above: tuple[ast.AST, ...]) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """A tree's nodes, each with those above it."""
    yield node, above
    for child in ast.iter_child_nodes(node):
        yield from _nodes(child, (*above, node))


def _weight_of(node: ast.Attribute, parent: ast.AST) -> tuple[str | None, ...]:
    """The names to the module whose weight this is; () unless it is `self.….weight` and asks for the values."""
    if node.attr != "weight" or not isinstance(node.ctx, ast.Load):
        return ()
    about = isinstance(parent, ast.Attribute) and parent.attr in _ABOUT
    about |= isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _ASKING
    return () if about else _names(node.value)


def _branches(node: ast.AST, above: tuple[ast.AST, ...]) -> tuple[tuple[ast.expr, bool], ...]:
    """The tests that are above the node, and what each gives where it is reached."""
    return tuple(
        (one.test, below not in _listed(one.orelse))
        for one, below in zip(above, (*above[1:], node), strict=True)
        if isinstance(one, ast.If | ast.IfExp) and below is not one.test
    )


def _listed(body: Any) -> list[ast.AST]:
    return body if isinstance(body, list) else [body]


def _names(node: ast.expr) -> tuple[str | None, ...]:
    """The names from `self` to this expression, () if it does not lead there."""
    if isinstance(node, ast.Attribute):
        return (node.attr,) if _is_self(node.value) else (*before, node.attr) if (before := _names(node.value)) else ()
    if isinstance(node, ast.Subscript):
        return (*before, None) if (before := _names(node.value)) else ()
    return ()


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _truth(test: ast.expr, module: nn.Module) -> bool | None:
    """What a test gives that asks for attributes of the module alone; None where that is not known, or may change."""
    if isinstance(test, ast.BoolOp):
        values = [_truth(value, module) for value in test.values]
        decisive = isinstance(test.op, ast.Or)
        return decisive if decisive in values else None if None in values else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _truth(test.operand, module)
        return None if value is None else not value
    code = _compiled(test)
    try:
        return None if code is None else bool(eval(code, {"self": module}))
    except Exception:  # an attribute that is not there, or a tensor without values
        return None


@cache
def _compiled(test: ast.expr) -> Any:
    """The test, if it asks for lasting attributes of self alone."""
    known = ast.Attribute | ast.Compare | ast.Constant | ast.Name | ast.cmpop | ast.expr_context
    for node in ast.walk(test):
        changes = isinstance(node, ast.Attribute) and node.attr == "training"
        if changes or not isinstance(node, known) or (isinstance(node, ast.Name) and node.id != "self"):
            return None
    return compile(ast.Expression(test), "<branch>", "eval")
