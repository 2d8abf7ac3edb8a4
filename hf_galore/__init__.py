"""Train every weight of a large language model in the memory LoRA needs, from the scripts you already have.

Public names are attributes of this module and are imported when first used; importing the module itself patches
nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOME_OF = {
    "GaLoreAdafactor": "hf_galore.optim.adafactor",
    "GaLoreAdamW": "hf_galore.optim.adamw",
    "GaLoreAdamW8bit": "hf_galore.optim.adamw8bit",
    "galore_param_groups": "hf_galore.param_groups",
    "register": "hf_galore.integrations",
    "replace_linear": "hf_galore.nn.convert",
    "restore_linear": "hf_galore.nn.convert",
    "unregister": "hf_galore.integrations",
}

if TYPE_CHECKING:
    from hf_galore.integrations import register as register
    from hf_galore.integrations import unregister as unregister
    from hf_galore.nn.convert import replace_linear as replace_linear
    from hf_galore.nn.convert import restore_linear as restore_linear
    from hf_galore.optim.adafactor import GaLoreAdafactor as GaLoreAdafactor
    from hf_galore.optim.adamw import GaLoreAdamW as GaLoreAdamW
    from hf_galore.optim.adamw8bit import GaLoreAdamW8bit as GaLoreAdamW8bit
    from hf_galore.param_groups import galore_param_groups as galore_param_groups

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hf_galore' has no attribute {name!r}; it has {', '.join(sorted(_HOME_OF))}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
