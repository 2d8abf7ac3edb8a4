"""Reads BitNet checkpoints of transformers into models whose BitLinear layers train on."""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import bitnet as theirs

from hf_galore.checks import check_choice
from hf_galore.nn.bitlinear import BitLinear
from hf_galore.nn.convert import share_activations, to_bitlinear
from hf_galore.nn.functional import Ternary
from hf_galore.nn.masters import masters_of
from hf_galore.nn.packing import unpack_ternary

logger = logging.getLogger(__name__)
SCALES = ("absmean", "inverse")
_IMPLAUSIBLE = 10.0  # no model has mean |W| above this; 1 / mean |W| mostly is


def load_bitnet(directory: str | os.PathLike[str], *, weight_scale: str | None = None, **kwargs: Any) -> Any:
    """Loads a BitNet checkpoint, with hf_galore's BitLinear in the place of transformers' layers: all of it trains.

    Codes and scales are those of the checkpoint. Where it has packed codes, weights are made that round to just these
    codes and this scale (`hf_galore.nn.masters.masters_of` says how): those that were trained are
    gone, and t·s would be quantized to a smaller scale. Biases of `autobitlinear` in `offline` mode, which
    transformers multiplies by the scale, are multiplied here. Which convention was found is logged.

    Args:
        directory: a directory, or whatever from_pretrained takes.
        weight_scale: what the file has under this name, `absmean` (s = mean |W|) or `inverse` (1 / s). Default: what
            transformers takes it for, `inverse` in `bitlinear` and `absmean` in `autobitlinear`.
        kwargs: for AutoModelForCausalLM.from_pretrained.

    Raises:
        ValueError: it is no BitNet checkpoint; `weight_scale` is neither choice; or it was not given and its values,
            taken for what the class of the layers says, are out of all proportion.
    """
    if weight_scale is not None:
        check_choice("weight_scale", weight_scale, SCALES)
    with torch.compiler.set_stance("force_eager"):  # theirs is compiled for unpacking, which takes longer than that
        model = AutoModelForCausalLM.from_pretrained(directory, **kwargs)
    config = getattr(model.config, "quantization_config", None)
    if config is None or getattr(config, "quant_method", None) != "bitnet":
        raise ValueError(f"directory={str(directory)!r} holds no BitNet checkpoint; from_pretrained loads it")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, theirs.BitLinear | theirs.AutoBitLinear)}
    by_class = "inverse" if config.linear_class == "bitlinear" else "absmean"
    online = config.quantization_mode == "online" and by_class == "absmean"
    if not online and weight_scale is None:
        _check_scales(layers, by_class)
    for path, layer in layers.items():
        model.set_submodule(path, _trainable(layer, weight_scale or by_class, by_class))
    del model.config.quantization_config, model.hf_quantizer
    share_activations(model)
    stored = "float weights" if online else f"packed codes and weight_scale = {_MEANING[weight_scale or by_class]}"
    logger.info(
        "%s: %d layers, %s (linear_class=%s, quantization_mode=%s)",
        directory,
        len(layers),
        stored,
        config.linear_class,
        config.quantization_mode,
    )
    return model


_MEANING = {"absmean": "mean |W|", "inverse": "1 / mean |W|"}


def _check_scales(layers: dict[str, Any], taken_for: str) -> None:
    scales = torch.stack([layer.weight_scale.detach().float().reshape(()).cpu() for layer in layers.values()])
    median = float(scales.median())
    implied = 1 / median if taken_for == "inverse" else median
    if implied > _IMPLAUSIBLE:
        raise ValueError(
            f"weight_scale: its median is {median:.3g}; as {_MEANING[taken_for]}, what transformers takes it for, the "
            f"weights would have a mean of {implied:.3g}. Say what it is: weight_scale='absmean' or 'inverse'"
        )


def _trainable(layer: Any, weight_scale: str, by_class: str) -> BitLinear:
    dtype, bias = layer.weight.dtype, layer.bias
    if getattr(layer, "online_quant", False):
        weight = layer.weight.detach().float()
    else:
        dtype = layer.weight_scale.dtype
        stored = layer.weight_scale.detach().float().reshape(())
        ternary = Ternary(_codes(layer), stored if weight_scale == "absmean" else 1.0 / stored)
        weight = masters_of(ternary)
        if bias is not None and by_class == "absmean":
            bias = (bias.detach().float() * stored).to(bias.dtype)
    linear = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    norm = layer.rms_norm
    result = to_bitlinear(
        linear,
        quantize_activations=True,
        use_rms_norm=norm is not None,
        rms_norm_eps=1e-6 if norm is None else norm.variance_epsilon,
    )
    result.original_dtype = dtype
    if result.rms_norm is not None:
        result.rms_norm.load_state_dict(norm.state_dict())
    return result.train(layer.training)


def _codes(layer: Any) -> Tensor:
    if layer.weight.dtype == torch.uint8:
        return unpack_ternary(layer.weight.detach())
    return layer.weight.detach().to(torch.int8)
