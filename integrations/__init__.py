"""Glue between hf_galore and the libraries around it: one file per library, no mathematics."""

import sys
from importlib import import_module

from transformers.utils.import_utils import is_bitsandbytes_available, is_peft_available

from hf_galore.integrations import accelerate_parameters as _accelerate
from hf_galore.integrations import attention as _attention
from hf_galore.integrations import deepspeed as _deepspeed
from hf_galore.integrations import fsdp as _fsdp
from hf_galore.integrations import transformers as _transformers

_BITSANDBYTES = "hf_galore.integrations.bitsandbytes"
_PEFT = (
    "hf_galore.integrations.peft",
    "hf_galore.integrations.peft_attention_bias",
    "hf_galore.integrations.peft_register_tokens",
)


def register() -> None:
    """Makes transformers' Trainer and accelerate, with its DeepSpeed, use hf_galore.

    Attention modules of transformers run the hooks that are put on them. Quantized layers of bitsandbytes become
    trainable if it is installed, and peft knows BitLinearConfig, AttentionBiasConfig and RegisterTokensConfig if it
    is.

    Idempotent; `unregister` undoes it exactly.
    """
    _transformers.register()
    _attention.register()
    _accelerate.register()
    _deepspeed.register()
    if is_bitsandbytes_available():
        import_module(_BITSANDBYTES).register()
    if is_peft_available():
        for path in _PEFT:
            import_module(path).register()


def unregister() -> None:
    """Restores everything as it was before `register`. Does nothing if it is not registered."""
    _transformers.unregister()
    _attention.unregister()
    _accelerate.unregister()
    _deepspeed.unregister()
    _fsdp.unregister()
    for path in (_BITSANDBYTES, *_PEFT):
        if path in sys.modules:
            sys.modules[path].unregister()


__all__ = ["register", "unregister"]
