"""Glue between hf_galore and the libraries around it: one file per library, no mathematics."""

from importlib import import_module
from importlib.util import find_spec

from hf_galore.integrations import transformers as _transformers


def register() -> None:
    """Makes transformers' Trainer use hf_galore, and quantized layers of bitsandbytes trainable if it is installed.

    Idempotent; `unregister` undoes it exactly.
    """
    _transformers.register()
    if find_spec("bitsandbytes") is not None:
        import_module("hf_galore.integrations.bitsandbytes").register()


def unregister() -> None:
    """Restores everything as it was before `register`. Does nothing if it is not registered."""
    _transformers.unregister()
    if find_spec("bitsandbytes") is not None:
        import_module("hf_galore.integrations.bitsandbytes").unregister()


__all__ = ["register", "unregister"]
