"""Glue between hf_galore and the libraries around it: one file per library, no mathematics."""

import sys
from importlib import import_module

from hf_galore.versions import refuse_older

refuse_older("torch", "transformers", "accelerate", "peft", "trl")

from transformers.utils.import_utils import is_bitsandbytes_available, is_peft_available  # noqa: E402

from hf_galore.integrations import requirements  # noqa: E402

_PACKAGE = "hf_galore.integrations."
_GLUE = {
    "transformers": requirements.TRAINER,
    "fsdp": requirements.FSDP2,
    "attention": requirements.ATTENTION_HOOKS,
    "accelerate_parameters": requirements.PROJECTED_BACKWARD,
    "deepspeed": requirements.DEEPSPEED,
}
_BITSANDBYTES = {"bitsandbytes": requirements.BITSANDBYTES}
_PEFT = {
    "peft": requirements.BITLINEAR_ADAPTER,
    "peft_attention_bias": requirements.ATTENTION_BIAS_ADAPTER,
    "peft_register_tokens": requirements.REGISTER_TOKENS_ADAPTER,
    "peft_version": requirements.PEFT_VERSION,
}
_TRAINER_OFF = "trainer_off"
_BITLINEAR = "hf_galore.nn.bitlinear"  # whose layers count the steps of every optimizer


def register() -> None:
    """Makes transformers' Trainer and accelerate, with its DeepSpeed, use hf_galore.

    Attention modules of transformers run the hooks that are put on them. Quantized layers of bitsandbytes become
    trainable if it is installed, and peft knows BitLinearConfig, AttentionBiasConfig and RegisterTokensConfig if it
    is. What a feature rests on may be missing from the installed versions (`requirements`): then one warning says so,
    that feature is refused by name, and all others work.

    Idempotent; `unregister` undoes it exactly.
    """
    requirements.warn_of_missing()
    glue = _GLUE | (_BITSANDBYTES if is_bitsandbytes_available() else {}) | (_PEFT if is_peft_available() else {})
    for name, feature in glue.items():
        if not requirements.missing(feature):
            import_module(_PACKAGE + name).register()
        elif feature is requirements.TRAINER:
            import_module(_PACKAGE + _TRAINER_OFF).register()


def unregister() -> None:
    """Restores everything as it was before `register`. Does nothing if it is not registered."""
    for name in (_TRAINER_OFF, *_GLUE, *_BITSANDBYTES, *_PEFT):
        if _PACKAGE + name in sys.modules:
            sys.modules[_PACKAGE + name].unregister()
    if _BITLINEAR in sys.modules:
        sys.modules[_BITLINEAR].stop_counting()


__all__ = ["register", "unregister"]
