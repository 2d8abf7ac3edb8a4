"""Where a module keeps the small parameter B: among its parameters, and out of sight of whoever walks these.

Engines must find B when they wrap a model, and read and write it by its name ever after (FSDP2 does). Everyone else
who walks `model.parameters()` expects those of the plain model.
"""

from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from torch import Tensor, nn

UPDATE = "lowrank_update"  # the name of B among its module's parameters; never in a state dict


class Parameters(dict[str, nn.Parameter | None]):
    """The parameters of a module; B can be read and written by its name, but is walked over only while it is shown.

    Args:
        fold: what is called before they are copied, because a copy takes the weight and may leave out B.
    """

    def __init__(self, fold: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.fold, self.shown = fold, True

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in super().__iter__() if self.shown or name != UPDATE])

    def __len__(self) -> int:
        return super().__len__() - (not self.shown and UPDATE in self)

    def keys(self) -> Any:
        return KeysView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def __reduce__(self) -> Any:
        """For copies, which hide what this hides."""
        if self.fold is not None:
            self.fold()
        return type(self), (), vars(self), None, iter(list(super().items()))


def register(module: nn.Module, update: nn.Parameter, fold: Callable[[], Any]) -> None:
    """Puts B among the module's parameters, where it is shown, and moves it with them."""
    params = module._parameters
    if type(params) is dict:  # ZeRO-3 has one of its own, which it must keep
        module._parameters = Parameters(fold)
        module._parameters.update(params)
    module.register_parameter(UPDATE, update)
    vars(module)["_apply"] = _Apply(module)


def unregister(module: nn.Module) -> None:
    """Undoes `register`."""
    params = module._parameters
    params.pop(UPDATE, None)
    if isinstance(params, Parameters):
        module._parameters = dict(params)
    del vars(module)["_apply"]


def is_shown(module: nn.Module) -> bool:
    """Whether those who walk the module's parameters see B."""
    return UPDATE in list(module._parameters)


def show(module: nn.Module, update: nn.Parameter, shown: bool) -> None:
    """Shows or hides B; `update` is the one that the module has if it does not keep it itself."""
    params = module._parameters
    if isinstance(params, Parameters):
        params.shown = shown
    elif shown:
        params[UPDATE] = update
    else:
        params.pop(UPDATE, None)


class _Apply:
    """Stands in for a module's `_apply`, by which models are moved and cast: B goes along."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        hidden = [params] if isinstance(params := self.module._parameters, Parameters) and not params.shown else []
        for one in hidden:
            one.shown = True
        try:
            type(self.module)._apply(self.module, fn, recurse)
        finally:
            for one in hidden:
                one.shown = False
        return self.module
