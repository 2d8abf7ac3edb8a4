"""In the place of hf_galore's GaLore where transformers has not what it rests on: says so, before training.

Without it the Trainer would ask for galore-torch, or train with that.
"""

from collections.abc import Callable
from typing import Any

from transformers.trainer import Trainer
from transformers.training_args import OptimizerNames

from hf_galore.integrations.requirements import TRAINER, require

_METHOD = "create_optimizer"
_original: list[Callable[..., Any]] = []


def register() -> None:
    """Makes the Trainer refuse GaLore's names. Idempotent; see `unregister`."""
    if not _original:
        _original.append(vars(Trainer)[_METHOD])
        setattr(Trainer, _METHOD, _create_optimizer)


def unregister() -> None:
    """Restores the Trainer. Does nothing if it is not registered."""
    if _original:
        setattr(Trainer, _METHOD, _original.pop())


def _create_optimizer(self: Trainer, *args: Any, **kwargs: Any) -> Any:
    if OptimizerNames(self.args.optim).value.startswith("galore"):
        require(TRAINER)
    return _original[0](self, *args, **kwargs)
