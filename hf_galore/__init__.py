"""Train every weight of a large language model in the memory LoRA needs, from the scripts you already have.

Public names are attributes of this module and are imported when first used; importing the module itself patches
nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOME_OF = {
    "ActivationReport": "hf_galore.attention.report",
    "AttentionBiasConfig": "hf_galore.integrations.peft_attention_bias",
    "BitLinear": "hf_galore.nn.bitlinear",
    "BitLinearConfig": "hf_galore.integrations.peft",
    "GaLoreAdafactor": "hf_galore.optim.adafactor",
    "GaLoreAdamW": "hf_galore.optim.adamw",
    "GaLoreAdamW8bit": "hf_galore.optim.adamw8bit",
    "LambdaWarmup": "hf_galore.integrations.bitlinear_callbacks",
    "RegisterTokensConfig": "hf_galore.integrations.peft_register_tokens",
    "SinkCache": "hf_galore.integrations.sink_cache",
    "TernaryLog": "hf_galore.integrations.bitlinear_callbacks",
    "add_attention_bias": "hf_galore.integrations.attention_bias",
    "add_register_tokens": "hf_galore.integrations.register_tokens",
    "distill": "hf_galore.integrations.distillation",
    "galore_param_groups": "hf_galore.param_groups",
    "intervene": "hf_galore.attention.interventions",
    "intervention_perplexity": "hf_galore.attention.interventions",
    "load_bitnet": "hf_galore.integrations.bitnet",
    "massive_activations": "hf_galore.integrations.activations",
    "record_activations": "hf_galore.attention.activations",
    "register": "hf_galore.integrations",
    "remove_attention_bias": "hf_galore.integrations.attention_bias",
    "remove_register_tokens": "hf_galore.integrations.register_tokens",
    "replace_linear": "hf_galore.nn.convert",
    "restore_linear": "hf_galore.nn.convert",
    "save_bitnet": "hf_galore.integrations.bitnet",
    "unregister": "hf_galore.integrations",
}

if TYPE_CHECKING:
    from hf_galore.attention.activations import record_activations as record_activations
    from hf_galore.attention.interventions import intervene as intervene
    from hf_galore.attention.interventions import intervention_perplexity as intervention_perplexity
    from hf_galore.attention.report import ActivationReport as ActivationReport
    from hf_galore.integrations import register as register
    from hf_galore.integrations import unregister as unregister
    from hf_galore.integrations.activations import massive_activations as massive_activations
    from hf_galore.integrations.attention_bias import add_attention_bias as add_attention_bias
    from hf_galore.integrations.attention_bias import remove_attention_bias as remove_attention_bias
    from hf_galore.integrations.bitlinear_callbacks import LambdaWarmup as LambdaWarmup
    from hf_galore.integrations.bitlinear_callbacks import TernaryLog as TernaryLog
    from hf_galore.integrations.bitnet import load_bitnet as load_bitnet
    from hf_galore.integrations.bitnet import save_bitnet as save_bitnet
    from hf_galore.integrations.distillation import distill as distill
    from hf_galore.integrations.peft import BitLinearConfig as BitLinearConfig
    from hf_galore.integrations.peft_attention_bias import AttentionBiasConfig as AttentionBiasConfig
    from hf_galore.integrations.peft_register_tokens import RegisterTokensConfig as RegisterTokensConfig
    from hf_galore.integrations.register_tokens import add_register_tokens as add_register_tokens
    from hf_galore.integrations.register_tokens import remove_register_tokens as remove_register_tokens
    from hf_galore.integrations.sink_cache import SinkCache as SinkCache
    from hf_galore.nn.bitlinear import BitLinear as BitLinear
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
    home = _HOME_OF[name]
    if home.startswith("hf_galore.integrations."):
        import_module("hf_galore.integrations.requirements").require_module(home)
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
