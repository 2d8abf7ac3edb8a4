"""The layer of BitLinear as a PEFT method: nn.Linear modules that are made ternary where they stand.

There is no wrapper and no second weight. What is trained, saved and given to the optimizer is `<module>.weight`, and
`<module>.bias` and `<module>.rms_norm` where there are such. Other adapters are copies of what these were at a time,
`<module>.copies.<adapter>`, in two bits a weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_galore.nn.bitlinear import BitLinear
from hf_galore.nn.convert import become, check_convertible, to_bitlinear, to_linear
from hf_galore.nn.frozen_copy import FrozenCopy
from hf_galore.nn.functional import Ternary, dequantize
from hf_galore.nn.originals import Original, TensorFile, UnkeptOriginal


@dataclass(frozen=True)
class Originals:
    """What a layer was before it was made ternary, the device that it was on, and whether it trained."""

    weight: Original
    bias: Original | None
    device: torch.device
    trained: bool


class Registered:
    """A parameter of the module, where a base class has a property of the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        return self if module is None else nn.Module.__getattr__(module, self.name)


def registered() -> Any:
    """A `Registered`, to type checkers whatever the class of the module says."""
    return Registered()


class BitLinearLayer(BitLinear, BaseTunerLayer):
    """A BitLinear that peft takes for the layer of adapters, and that computes as its original while disabled.

    One adapter trains; others are frozen copies of it.
    """

    weight = registered()
    bias = registered()
    adapter_layer_names = ("trained",)
    adapter: str
    originals: Originals
    active_adapters: list[str]
    _active_adapter: str | list[str]
    _disable_adapters: bool
    _thawed: Sequence[nn.Parameter] = ()
    _master: Tensor | None = None
    _merged: Ternary | None = None

    def start(self, quantize_activations: bool, use_rms_norm: bool, rms_norm_eps: float) -> None:
        """As BitLinear, and the bias becomes a float32 (or float64) parameter as well."""
        super().start(quantize_activations, use_rms_norm, rms_norm_eps)
        if self.bias is not None and self.bias.dtype != self.weight.dtype:
            self.bias = nn.Parameter(self.bias.detach().to(self.weight.dtype), self.bias.requires_grad)

    def stop(self) -> None:
        super().stop()
        self._modules.pop(COPIES, None)
        for name in _ATTRIBUTES:
            self.__dict__.pop(name, None)

    @property
    def trained(self) -> nn.ModuleDict:
        """What acts, by the name of the adapter: peft's own methods freeze it, thaw it and report on it."""
        return nn.ModuleDict({self.adapter: self, **self.frozen})

    @property
    def frozen(self) -> dict[str, FrozenCopy]:
        """The copies of what it was, by the names of their adapters."""
        copies: Any = self._modules.get(COPIES)
        return {} if copies is None else dict(copies.items())

    def freeze(self, adapter: str) -> None:
        """Keeps what the layer computes now as another adapter.

        Raises:
            ValueError: it is not fully quantized.
        """
        copies = {**self.frozen, adapter: FrozenCopy(self)}
        self.add_module(COPIES, nn.ModuleDict(copies))

    @property
    def acts(self) -> bool:
        """Whether the adapter is active and not disabled."""
        return not self.disable_adapters and self.adapter in self.active_adapters

    def forward(self, x: Tensor) -> Tensor:
        if self.acts:
            return super().forward(x)
        copy = next((self.frozen[name] for name in self.active_adapters if name in self.frozen), None)
        if copy is not None and not self.disable_adapters:
            y: Tensor = copy(x, self.shared)
            return y
        weight, bias = self.original()
        weight = weight.to(x.device)
        if not torch.is_grad_enabled():  # of inputs that are not contiguous, torch rounds the product accordingly
            weight = weight.detach().requires_grad_(self.originals.trained)
        return linear(x, weight, bias)

    def original(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of before.

        Raises:
            ValueError: they were not kept, and have changed.
        """
        weight = self.weight if self._master is None else self._master
        kept = self.originals
        try:
            return kept.weight.of(weight), None if kept.bias is None else kept.bias.of(self.bias)
        except ValueError as error:
            raise ValueError(f"{error}: load the model again, with BitLinearConfig(keep_original=True)") from error

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As peft's; and what trained before a copy took the place of the adapter trains again when it is back."""
        acted, trainable = self.acts, self._trainable()
        super().set_adapter(adapter_names, inference_mode)
        if acted and not self.acts:
            self._thawed = trainable
        elif not acted:
            self.requires_grad_(False)
            if self.acts and not inference_mode:
                self._thaw()
        self.quantized = self.acts

    def enable_adapters(self, enabled: bool) -> None:
        """Makes it compute as its original, with nothing that trains, and again as before.

        Raises:
            ValueError: the original is not known.
        """
        if enabled is not self._disable_adapters:
            return
        acted = self.acts
        if not enabled:
            self.original()
            self.unmerge()
        self._disable_adapters = not enabled
        if acted:
            self._thawed = self._trainable()
            self.requires_grad_(False)
        elif self.acts:
            self._thaw()
        self.quantized = self.acts

    def _trainable(self) -> list[nn.Parameter]:
        return [param for param in self.parameters() if param.requires_grad]

    def _thaw(self) -> None:
        for param in self._thawed:
            param.requires_grad_(True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Makes the layer what it was, but for its class: peft goes on to ask it which adapters it has.

        The name of a copy deletes the copy alone; if that was active, the trained adapter is.

        Raises:
            ValueError: what it was is not known.
        """
        if adapter_name == self.adapter:
            become(restore(self), FormerLayer)
        elif adapter_name in self.frozen:
            copies = {name: copy for name, copy in self.frozen.items() if name != adapter_name}
            self.add_module(COPIES, nn.ModuleDict(copies))
            if adapter_name in self.active_adapters:
                self.set_adapter(self.adapter)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts t·s in the place of W, for whoever reads the weight; the layer computes what it did.

        W stays in memory, for `unmerge`. Copies are not merged.

        Raises:
            ValueError: with `safe_merge`, the weight is not finite.
        """
        if self.adapter in check_adapters_to_merge(self, adapter_names):
            ternary = self.ternary()
            if safe_merge:
                self.check_finite()
            self._merged, self._master = ternary, self.weight.data
            self.weight.data = dequantize(ternary, self.weight.dtype)
            self.merged_adapters = [self.adapter]

    def unmerge(self) -> None:
        """Undoes `merge`."""
        if self._master is not None:
            self.weight.data = self._master.to(self.weight.device)
        self._master = self._merged = None
        self.merged_adapters = []

    def ternary(self) -> Ternary:
        return super().ternary() if self._merged is None else self._merged

    def check_finite(self) -> None:
        """Raises ValueError if there is a NaN or an infinite number among the weights."""
        if not all(param.isfinite().all() for param in self.parameters()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {self.adapter} seems to be broken")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """peft's, called when the weights of a file have taken the place of those that were here."""
        if not any(param.is_meta for param in self.parameters()):
            self.to(self.originals.device if device is None else device)


class FormerLayer(nn.Linear, BaseTunerLayer):
    """An nn.Linear that was a BitLinearLayer until its adapter was deleted."""

    weight = registered()
    bias = registered()
    _active_adapter: str | list[str] = []  # noqa: RUF012 peft's attribute, never changed in place

    def leave(self) -> None:
        """Makes it nn.Linear."""
        for name in _ATTRIBUTES:
            self.__dict__.pop(name, None)
        become(self, nn.Linear)


COPIES = "copies"
_ATTRIBUTES = (
    "adapter",
    "originals",
    "_thawed",
    "_master",
    "_merged",
    "_active_adapter",
    "_disable_adapters",
    "merged_adapters",
)


def check_layer(path: str, module: nn.Module) -> None:
    """Raises ValueError for a module that cannot become a BitLinearLayer."""
    if type(module) is not FormerLayer:
        check_convertible(path, module)
    assert isinstance(module, nn.Linear)
    weight = module.weight.data
    if type(weight) is not Tensor or weight.shape != (module.out_features, module.in_features):
        raise ValueError(
            f"target_modules: the weight of {path!r} is quantized or spread over ranks; put BitLinear into the model "
            "before that"
        )
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise ValueError(f"target_modules: {path!r} is offloaded; load the model without offloading")
    forward = vars(module).get("forward")
    if forward is not None and "_old_forward" not in vars(module) and getattr(forward, "__self__", None) is not module:
        raise ValueError(f"target_modules: {path!r} has a forward method of its own, which would stay as it is")


def originals_of(module: nn.Module, file: TensorFile | None) -> Originals:
    """What the nn.Linear is now: its values in the file, or none of them if there is no file.

    Raises:
        OSError: the file system is full.
    """
    keep = UnkeptOriginal if file is None else file.original
    assert isinstance(module, nn.Linear)
    weight, bias = module.weight, module.bias
    return Originals(keep(weight), None if bias is None else keep(bias), weight.device, weight.requires_grad)


def install(module: nn.Module, originals: Originals, adapter: str, **options: Any) -> None:
    """Makes a BitLinearLayer of the nn.Linear: the same object; the options are those of `BitLinear`."""
    layer = to_bitlinear(module, BitLinearLayer, **options)
    assert isinstance(layer, BitLinearLayer)
    layer.adapter, layer.originals, layer._active_adapter = adapter, originals, [adapter]


def restore(layer: BitLinearLayer) -> nn.Linear:
    """Makes the layer what it was before `install`, with the weights of then.

    Raises:
        ValueError: these are not known.
    """
    weight, bias = layer.original()
    return _as_linear(layer, "master", weight.clone(), None if bias is None else bias.clone())


def merged(layer: BitLinearLayer, weights: str) -> nn.Linear:
    """Makes the layer an nn.Linear with the weights that were trained, in the dtypes of before.

    Args:
        weights: `master` or `dequantized`, as in `restore_linear`.
    """
    bias = layer.originals.bias
    return _as_linear(layer, weights, None, None if bias is None else layer.bias.detach().to(bias.dtype))


def _as_linear(layer: BitLinearLayer, weights: str, weight: Tensor | None, bias: Tensor | None) -> nn.Linear:
    layer.unmerge()
    linear = to_linear(layer, weights)
    trains = linear.weight.requires_grad
    if weight is not None:
        linear.weight = nn.Parameter(weight, trains)
    if bias is not None:
        linear.bias = nn.Parameter(bias, trains)
    return linear
