"""What tests ask of the installed versions: the names of caches, and what does not go together."""

from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version
from transformers.integrations import peft as transformers_peft

from hf_galore.integrations.compatibility import cache_argument
from hf_galore.integrations.decoders import decoder_of

# model.add_adapter() and its sisters: a version check alone.
transformers_takes_peft = pytest.mark.skipif(
    Version(version("peft")) < Version(transformers_peft.MIN_PEFT_VERSION),
    reason=f"transformers {version('transformers')} asks for peft {transformers_peft.MIN_PEFT_VERSION} in add_adapter",
)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as an argument of the model or of its generate(), by the name that these give it."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # not peft's wrapper
    return {cache_argument(plain.forward) or cache_argument(decoder_of(plain).forward): cache}


def cache_in(output: Any) -> Any:
    """The cache that a forward pass has put out."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def checkpoint_activations(model: Any, use_reentrant: bool) -> None:
    """Makes the model compute its activations again in the backward pass; the name is another before 5.23."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": use_reentrant})
