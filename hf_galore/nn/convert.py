"""Puts BitLinear into a model in place of its linear layers, and takes it out again."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_galore.checks import check_choice
from hf_galore.nn.bitlinear import BitLinear
from hf_galore.nn.functional import dequantize
from hf_galore.nn.shared_activations import SharedActivations
from hf_galore.param_groups import ALL_LINEAR, find_targets, is_all_linear, is_conv1d
from hf_galore.siblings import siblings_among
from hf_galore.weight_reads import read_weights

SUB_NORM = ("o_proj", "down_proj")  # the layers that BitNet b1.58 2B4T puts a norm before
RESTORED = ("master", "dequantized")


def replace_linear(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    *,
    quantize_activations: bool = True,
    use_rms_norm: bool = False,
    use_sub_norm: bool = False,
    rms_norm_eps: float = 1e-6,
) -> nn.Module:
    """Makes BitLinear of the target layers, in place, and returns the model; `restore_linear` undoes it.

    Modules stay what they are but for their class: names, hooks and state-dict keys do not change. Weights become
    float32 parameters.

    Args:
        target_modules: as in `galore_param_groups`; "all-linear" leaves out, with a warning, layers whose weight the
            model reads in place of calling them, which would not be ternary there.
        quantize_activations: False trains ternary weights with the activations as they are.
        use_rms_norm: an RMSNorm of its own, `rms_norm`, before every target.
        use_sub_norm: the same before targets named o_proj and down_proj alone (SubLN).
        rms_norm_eps: of these norms.

    Raises:
        ValueError: nothing matches, a target is no plain nn.Linear (Conv1D, fused experts, quantized) or shares its
            weight with another module, the model reads the weight of a target that is named, or both kinds of norm are
            asked for.
        TypeError: `target_modules` is neither a string nor a list of strings.
    """
    check_norms(use_rms_norm, use_sub_norm)
    names = find_targets(model, target_modules)
    modules = dict(model.named_modules())
    paths = sorted(name.removesuffix(".weight") for name in names)
    paths = called(model, paths, is_all_linear(target_modules))
    for path in paths:
        check_convertible(path, modules.get(path))
    check_untied(model, {path: modules[path] for path in paths})
    for path in paths:
        norm = is_normed(path.rpartition(".")[2], use_rms_norm, use_sub_norm)
        to_bitlinear(
            modules[path], quantize_activations=quantize_activations, use_rms_norm=norm, rms_norm_eps=rms_norm_eps
        )
    share_activations(model)
    return model


def check_norms(use_rms_norm: bool, use_sub_norm: bool) -> None:
    """Raises ValueError if both kinds of norm are asked for."""
    if use_rms_norm and use_sub_norm:
        raise ValueError("use_rms_norm puts a norm before every layer, use_sub_norm before some: choose one")


def is_normed(name: str, use_rms_norm: bool, use_sub_norm: bool) -> bool:
    """Whether the target with this name in its parent gets an RMSNorm of its own."""
    return use_rms_norm or (use_sub_norm and name in SUB_NORM)


def check_convertible(path: str, module: nn.Module | None) -> None:
    """Raises ValueError for a module that cannot become a BitLinear."""
    if type(module) is nn.Linear and module.weight.is_floating_point():
        return
    if module is None:
        raise ValueError(
            f"target_modules: {path!r} holds the experts of a mixture in one tensor, which BitLinear does not make "
            "ternary. Name the other layers, such as ['q_proj', 'k_proj', 'v_proj', 'o_proj']"
        )
    kind = type(module).__name__
    if isinstance(module, BitLinear):
        raise ValueError(f"target_modules: {path!r} is a BitLinear already")
    hint = "; its weight is transposed" if is_conv1d(module) else ""
    raise ValueError(f"target_modules: {path!r} is a {kind}{hint}; BitLinear replaces floating-point nn.Linear")


def called(model: nn.Module, paths: Sequence[str], all_linear: bool) -> list[str]:
    """The paths of layers that the model calls, and whose weight it does not read.

    Raises:
        ValueError: there are others, and they were named.
    """
    read, modules = read_weights(model), dict(model.named_modules())
    kept = [path for path in paths if id(getattr(modules.get(path), "weight", None)) not in read]
    others = [path for path in paths if path not in set(kept)]
    if others:
        message = f"the model reads the weight of {others[0]!r} and does not (always) call it"
        if not all_linear or not kept:
            raise ValueError(f"target_modules: {message}, so that it would not be ternary: leave it out")
        warnings.warn(f"{message}: {len(others)} of {len(paths)} layers stay as they are", stacklevel=3)
    return kept


def check_untied(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Raises ValueError for targets whose weight is that of another module."""
    chosen = set(targets.values())
    others = {id(p): path for path, m in model.named_modules() if m not in chosen for p in m.parameters(recurse=False)}
    for path, module in targets.items():
        owner = others.get(id(module.weight))
        if owner is not None:
            raise ValueError(f"target_modules: {path!r} has the weight of {owner!r}, which would not be ternary")
        others[id(module.weight)] = path


def to_bitlinear(module: nn.Module, cls: type[BitLinear] = BitLinear, **options: Any) -> BitLinear:
    """The nn.Linear as a BitLinear (or a subclass): the same object, with another class."""
    become(module, cls)
    assert isinstance(module, cls)
    module.start(**options)
    return module


def become(module: nn.Module, cls: type[nn.Linear]) -> nn.Linear:
    """Gives the module the class; accelerate's hooks, which keep a forward method, will call that of the class."""
    module.__class__ = cls
    assert isinstance(module, nn.Linear)
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__self__", None) is module:
            module.__dict__[name] = cls.forward.__get__(module)
    return module


def to_linear(module: BitLinear, weights: str = "master") -> nn.Linear:
    """The BitLinear as an nn.Linear: the same object, in the dtype of before; `weights` as in `restore_linear`."""
    if weights == "dequantized":
        weight = dequantize(module.ternary(), module.original_dtype)
    else:
        weight = module.plain_weight().detach()
    trains = module.weight.requires_grad
    module.stop()
    linear = become(module, nn.Linear)
    if weight.data_ptr() != linear.weight.data_ptr():
        linear.weight = nn.Parameter(weight, trains)
    return linear


def restore_linear(model: nn.Module, weights: str = "master") -> nn.Module:
    """Makes nn.Linear of every BitLinear, in place, in the dtypes of before, and returns the model.

    Args:
        weights: `master`, those that were trained; or `dequantized`, what these are rounded to.

    Raises:
        ValueError: `weights` is neither, or a layer has an RMSNorm of its own, which nn.Linear has not.
    """
    check_choice("weights", weights, RESTORED)
    layers = bitlinears(model)
    for path, layer in layers.items():
        if layer.rms_norm is not None:
            raise ValueError(
                f"{path!r} has an RMSNorm of its own (use_rms_norm, use_sub_norm) and cannot be nn.Linear"
            )
    for layer in layers.values():
        to_linear(layer, weights)
    return model


def bitlinears(model: nn.Module) -> dict[str, BitLinear]:
    """The BitLinear modules by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, BitLinear)}


def share_activations(model: nn.Module) -> None:
    """Makes layers that are given the same input quantize it once: q/k/v, gate/up, and those of other names."""
    layers = {layer for layer in bitlinears(model).values() if layer.rms_norm is None and layer.quantize_activations}
    for group in siblings_among(model, layers):
        shared = SharedActivations(len(group))
        for layer in group:
            assert isinstance(layer, BitLinear)
            layer.shared = shared
