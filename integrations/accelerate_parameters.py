"""The small parameters of the projected backward in accelerate: found as models are wrapped, hidden then, clipped.

`Accelerator.prepare` wraps a model while its small parameters are shown; from then on `model.parameters()` are those
of the plain model. Clipping these clips the small ones too, in the Trainer and in loops of one's own.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from hf_galore.lowrank_backward import LowRankBackward, engines_in
from hf_galore.lowrank_optimizer import engine_stepped_by

_originals: dict[str, Callable[..., Any]] = {}


def register() -> None:
    """Changes methods of accelerate. Idempotent; see `unregister`."""
    if not _originals:
        for name, method in _METHODS.items():
            _originals[name] = vars(Accelerator)[name]
            setattr(Accelerator, name, method)


def unregister() -> None:
    """Restores accelerate. Does nothing if it is not registered."""
    for name, method in _originals.items():
        setattr(Accelerator, name, method)
    _originals.clear()


def _prepare(self: Accelerator, *args: Any, device_placement: list[bool] | None = None) -> Any:
    """accelerate's method; the small parameters are hidden afterwards, and `zero_grad` of what wraps them finds them.

    What is prepared for evaluation alone hides them as well: a forward pass comes next, which would.
    """
    result = _originals["prepare"](self, *args, device_placement=device_placement)
    for model in _modules(result if isinstance(result, Sequence) else [result]):
        for engine in engines_in(model):
            engine.clear_with(model)
            engine.hide()
    for stepped in map(engine_stepped_by, args):
        if stepped is not None:
            stepped.hide()
    return result


def _clip_grad_norm(self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
    """accelerate's method, on the small parameters as well."""
    with ExitStack() as shown:
        params = _with_small(self._models, parameters, shown)
        return _originals["clip_grad_norm_"](self, params, max_norm, norm_type)


def _clip_grad_value(self: Accelerator, parameters: Any, clip_value: float) -> None:
    """accelerate's method, on the small parameters as well."""
    with ExitStack() as shown:
        _originals["clip_grad_value_"](self, _with_small(self._models, parameters, shown), clip_value)


def _with_small(models: Iterable[Any], parameters: Tensor | Iterable[Tensor], shown: ExitStack) -> list[Tensor]:
    """The parameters, and the small ones of every projected backward of which they have another parameter.

    The order is that of a model that shows its small parameters, which it does as long as `shown` is open: accelerate
    compares the two.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for model in _modules(models):
        for engine in engines_in(model):
            params = _joined(engine, params, shown)
    return params


def _joined(engine: LowRankBackward, params: list[Tensor], shown: ExitStack) -> list[Tensor]:
    given = set(map(id, params))
    if not any(id(param) in given for param in engine.model.parameters()):
        return params
    shown.enter_context(engine.shown())
    given.update(id(layer.update) for layer in engine.layers.values())
    ordered = [param for param in engine.model.parameters() if id(param) in given]
    known = set(map(id, ordered))
    return [*ordered, *(param for param in params if id(param) not in known)]


def _modules(objects: Iterable[Any]) -> list[nn.Module]:
    return [one for one in objects if isinstance(one, nn.Module)]


_METHODS: dict[str, Callable[..., Any]] = {
    "prepare": _prepare,
    "clip_grad_norm_": _clip_grad_norm,
    "clip_grad_value_": _clip_grad_value,
}
