"""What transformers says where its own methods for adapters ask for a newer peft: what to install, or to call instead.

transformers 5.24 asks for peft 0.22 in `model.add_adapter` and its sisters. It is a check of the version alone, and
peft's own functions need none.
"""

from collections.abc import Callable
from importlib.metadata import version

from transformers.integrations import peft as transformers_peft

_CHECK = "check_peft_version"
_original: list[Callable[..., None]] = []


def register() -> None:
    """Makes the check say it. Idempotent; see `unregister`."""
    if not _original:
        _original.append(vars(transformers_peft)[_CHECK])
        setattr(transformers_peft, _CHECK, _check_peft_version)


def unregister() -> None:
    """Restores transformers. Does nothing if it is not registered."""
    if _original:
        setattr(transformers_peft, _CHECK, _original.pop())


def _check_peft_version(min_version: str) -> None:
    """transformers' function.

    Raises:
        ValueError: an older peft is installed.
    """
    try:
        _original[0](min_version)
    except ValueError as error:
        raise ValueError(
            f"transformers {version('transformers')} asks for peft {min_version} in its own methods for adapters "
            f"(add_adapter, set_adapter, enable_adapters, disable_adapters), and {version('peft')} is installed: pip "
            f"install 'peft>={min_version}', or make the model with peft.get_peft_model(model, config) or "
            "peft.PeftModel.from_pretrained(model, folder), whose methods work with both"
        ) from error
