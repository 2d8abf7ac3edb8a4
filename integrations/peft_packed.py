"""Layers of a BitLinear adapter as transformers' BitLinear, with 2 bits for a weight."""

import torch
from torch import nn

from hf_galore.integrations.peft_layer import BitLinearLayer
from hf_galore.nn.packing import pack_ternary


def check_packable(layers: dict[str, BitLinearLayer]) -> None:
    """Raises ValueError for layers that transformers' BitLinear does not compute as they do."""
    problems = {
        "have out_features that are not divisible by 4": lambda layer: layer.out_features % 4,
        "do not quantize activations": lambda layer: not layer.quantize_activations,
        "are float16, in which transformers' BitLinear overflows": lambda layer: layer.original_dtype == torch.float16,
    }
    for problem, is_so in problems.items():
        paths = [path for path, layer in layers.items() if is_so(layer)]
        if paths:
            raise ValueError(f"weights='packed': {', '.join(paths)} {problem}")


def packed(layer: BitLinearLayer) -> nn.Module:
    """The layer as transformers' BitLinear, with packed codes."""
    from transformers.integrations import bitnet  # which imports torch's compiler

    device, dtype, norm = layer.weight.device, layer.original_dtype, layer.rms_norm
    codes, s = layer.ternary()
    module = bitnet.BitLinear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        device,
        dtype,
        use_rms_norm=norm is not None,
        rms_norm_eps=1e-6 if norm is None or norm.eps is None else norm.eps,
    )
    module.weight.copy_(pack_ternary(codes))
    module.weight_scale.copy_(1 / s)
    if layer.bias is not None:
        module.bias.copy_(layer.bias.detach())
    if norm is not None:
        module.rms_norm.weight = nn.Parameter(norm.weight.detach().to(dtype), requires_grad=False)
    return module.train(layer.training)
