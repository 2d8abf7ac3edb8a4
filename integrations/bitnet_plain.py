"""A model with BitLinear layers, under the names it has without hf_galore and peft; what cannot be exported."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from hf_galore.nn.bitlinear import BitLinear
from hf_galore.nn.convert import SUB_NORM, bitlinears


@dataclass(frozen=True)
class PlainModel:
    """A transformers model; its BitLinear layers and all its other tensors, by their plain names."""

    base: Any  # PreTrainedModel
    layers: dict[str, BitLinear]
    others: dict[str, Tensor]

    @property
    def norms(self) -> str:
        """Which layers have an RMSNorm of their own: `none`, `every`, or `sub`, those named o_proj and down_proj.

        Raises:
            ValueError: others.
        """
        normed = {path for path, layer in self.layers.items() if layer.rms_norm is not None}
        if not normed:
            return "none"
        if normed == set(self.layers):
            return "every"
        if normed == {path for path in self.layers if path.rpartition(".")[2] in SUB_NORM}:
            return "sub"
        raise ValueError(
            "model: some of its BitLinear layers have an RMSNorm of their own. Exported are models where every layer "
            f"has one (use_rms_norm), where {' and '.join(SUB_NORM)} have (use_sub_norm), or none"
        )


def plain_model(model: Any) -> PlainModel:
    """The model without peft's wrappers.

    Raises:
        TypeError: it is not a model of transformers, nor a PeftModel around one.
        ValueError: it has no BitLinear.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model: {type(model).__name__} is neither a PreTrainedModel nor a PeftModel around one")
    renamed = _wrapped(base)
    layers = {_plain(path, renamed): layer for path, layer in bitlinears(base).items()}
    layers = {path: layer for path, layer in layers.items() if path is not None}
    if not layers:
        raise ValueError("model: it has no BitLinear layers to export; hf_galore.replace_linear makes some")
    others = {}
    for key, value in base.state_dict().items():
        name = _plain(key, renamed)
        if name is not None and not any(name.startswith(f"{path}.") for path in _parents(name) if path in layers):
            others[name] = value
    return PlainModel(base, {str(path): layer for path, layer in layers.items()}, others)


def _parents(name: str) -> list[str]:
    """Names of the modules that hold this one: a.b.c has a.b and a."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _wrapped(base: torch.nn.Module) -> dict[str, str | None]:
    """Names of the copies that peft's modules_to_save has, and what they are in the plain model (None: not in it)."""
    if not is_peft_available():
        return {}
    from peft.utils import ModulesToSaveWrapper

    renamed: dict[str, str | None] = {}
    for path, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            used = None if module.disable_adapters or not module.active_adapters else module.active_adapters[0]
            renamed[f"{path}.original_module"] = path if used is None else None
            for adapter in module.modules_to_save:
                renamed[f"{path}.modules_to_save.{adapter}"] = path if adapter == used else None
    return renamed


def _plain(name: str, renamed: dict[str, str | None]) -> str | None:
    for prefix, plain in renamed.items():
        if name == prefix or name.startswith(prefix + "."):
            return None if plain is None else plain + name[len(prefix) :]
    return name


def check_exportable(plain: PlainModel) -> None:
    """Raises ValueError for layers that compute what no BitLinear of transformers does, and lost master weights."""
    for path, layer in plain.layers.items():
        if not layer.quantized or getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
            raise ValueError(f"model: {path!r} is switched off or merged; enable and unmerge its adapter, then export")
        if layer.weight_lambda != 1 or layer.activation_lambda != 1:
            raise ValueError(
                f"model: {path!r} has weight_lambda={layer.weight_lambda}, activation_lambda={layer.activation_lambda}"
                "; only 1 and 1, fully quantized, can be exported"
            )
        if not layer.quantize_activations:
            raise ValueError(
                f"model: {path!r} has quantize_activations=False, but transformers always quantizes activations"
            )
        if layer.weight.is_meta or hasattr(layer.weight, "full_tensor") or layer.weight.dim() != 2:
            raise ValueError(f"model: {path!r} has not all of its weight in this process; gather the model first")
        if is_dequantized(layer.weight):
            raise ValueError(
                f"model: the weight of {path!r} holds only -c, 0 and c, as after dequantizing. Quantized again its "
                "scale shrinks. Export the model that was trained, or read its checkpoint with load_bitnet"
            )


def is_dequantized(weight: Tensor) -> bool:
    """Whether the values are -c, 0 and c, some of them 0, so that mean |W| is less than c."""
    magnitude = weight.detach().abs()
    zero = magnitude == 0
    return bool(zero.any()) and not bool(zero.all()) and bool((zero | (magnitude == magnitude.max())).all())
