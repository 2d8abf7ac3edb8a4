"""BitLinear: an nn.Linear that computes with ternary weights and 8-bit activations, and trains its full weight.

The parameter is `weight`, as in any nn.Linear, in float32 whatever the model's dtype: steps of an ordinary learning
rate are below the resolution of a bfloat16 weight, and its codes would freeze. See `hf_galore.nn.functional` for the
formulas (BitNet b1.58, arXiv 2402.17764) and `hf_galore.nn.convert` for putting it into a model.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_galore.frozen_weight import ROUNDING
from hf_galore.link import Link
from hf_galore.nn.functional import StraightThrough, Ternary, absmax_int8, absmean_ternary
from hf_galore.nn.shared_activations import SharedActivations
from hf_galore.nn.ternary_weight import TernaryWeight
from hf_galore.shards import local, whole


class BitLinear(nn.Linear):
    """y = Q8(norm(x)) Qt(W)ᵀ + bias, with Q8 and Qt rounding to 8 bits per token and to ternary per matrix.

    Codes are made once for each value of the weight: they are kept until an optimizer takes a step, the weight is
    written to or loaded, or an engine puts another tensor in its place. A write through `weight.data` shows in none
    of these; call `requantize` after it.

    Args:
        in_features, out_features, bias, device: as in nn.Linear.
        dtype: float32 (default) or float64.
        quantize_activations: False leaves x as it is.
        use_rms_norm, rms_norm_eps: norm is an RMSNorm of its own, `rms_norm`; else there is none.

    Attributes:
        weight_lambda, activation_lambda: how far they are quantized, from 0 (W, x) to 1 (default); in between
            W + λ(Qt(W) − W) and x + λ(Q8(x) − x).
        quantized: False makes it nn.Linear with `weight` in `original_dtype`.
        link: where it computes, if the weight is in the memory of the host; None: where the weight is.
        effective: makes of `weight` what it stands for, where another object holds a part of it; None: itself.
    """

    weight_lambda: float
    activation_lambda: float
    quantized: bool
    original_dtype: torch.dtype
    rms_norm: nn.RMSNorm | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
        *,
        quantize_activations: bool = True,
        use_rms_norm: bool = False,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.start(quantize_activations, use_rms_norm, rms_norm_eps)

    def start(self, quantize_activations: bool, use_rms_norm: bool, rms_norm_eps: float) -> None:
        """Sets up what an nn.Linear does not have; the weight becomes a float32 (or float64) parameter."""
        _steps.count_for(self)
        self.original_dtype = self.weight.dtype
        if self.weight.dtype in _LOW:
            self.weight = nn.Parameter(self.weight.detach().float(), requires_grad=self.weight.requires_grad)
        self.quantize_activations = quantize_activations
        self.weight_lambda = self.activation_lambda = 1.0
        self.quantized = True
        self.rms_norm = None
        if use_rms_norm:
            self.rms_norm = nn.RMSNorm(self.in_features, rms_norm_eps, device=self.weight.device)
        self.shared: SharedActivations | None = None
        self.effective: Callable[[Tensor], Tensor] | None = None
        self.link: Link | None = None
        self._written = 0
        self.requantize()

    def stop(self) -> None:
        """Takes away what `start` set up, but for the weight."""
        for name in _ATTRIBUTES:
            delattr(self, name)
        _steps.layers.discard(self)
        stop_counting()

    def requantize(self) -> None:
        """Forgets the codes, so that the next use makes them again."""
        self._written += 1
        self._made_of: tuple[Any, ...] | None = None
        self._ternary: Ternary | None = None

    def value_key(self) -> tuple[Any, ...]:
        """What changes whenever the value of the weight may have changed."""
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        return id(weight), local(weight).data_ptr(), weight.device, version, _steps.taken, self._written

    def ternary(self) -> Ternary:
        """The codes and the scale of the weight as it is now."""
        if torch.compiler.is_compiling():  # what follows cannot be traced, and the compiler fuses this
            return absmean_ternary(self.whole_weight())
        made_of = self.value_key()
        if self._ternary is None or self._made_of != made_of:
            with torch.no_grad(), torch.inference_mode(False):  # for use in training, whoever asks first
                self._ternary = absmean_ternary(self.whole_weight())
            self._made_of = made_of
        return self._ternary

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return linear(x, self.plain_weight().to(x.device), self.bias)
        x = self.normalized(x)
        dtype = computed_dtype(x)
        tokens, a = self.tokens(x)
        matrix, s = self.matrix(dtype)
        y: Tensor = StraightThrough.apply(x, self.weight, self.bias, dtype, tokens, a, matrix, s)
        return y

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What x is rounded to: integers and what divides them, or with λ < 1 the tokens themselves and None."""
        part = self.activation_lambda if self.quantize_activations else 0.0
        if part == 0.0:
            return x.detach(), None
        int8 = absmax_int8(x) if self.shared is None else self.shared.quantize(x)
        if part == 1.0:
            return int8
        return torch.lerp(x.detach().to(int8.scale.dtype), int8.codes / int8.scale, part).to(x.dtype), None

    def matrix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What W is rounded to: integers and what multiplies them, or with λ < 1 the matrix itself and None."""
        if self.weight_lambda == 0.0:
            return self.whole_weight().to(dtype), None
        codes, s = self.ternary()
        if self.weight_lambda == 1.0:
            return codes, s
        return torch.lerp(self.whole_weight().to(s.dtype), codes * s, self.weight_lambda).to(dtype), None

    def normalized(self, x: Tensor) -> Tensor:
        """RMSNorm, in float32, of x (..., n) in the dtype of x; x itself without one."""
        norm = self.rms_norm
        return x if norm is None else normalized(x, norm.weight, norm.eps)

    def whole_weight(self) -> Tensor:
        """All of the weight with what is held elsewhere, without a gradient; collective where ranks have its rows."""
        weight = whole(self.weight.detach())
        return weight if self.effective is None else self.effective(weight)

    def plain_weight(self) -> Tensor:
        """The weight, not quantized, in the dtype that it had before it became ternary."""
        return self.weight.to(self.original_dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", quantize_activations={self.quantize_activations}"

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own codes."""
        return self.__dict__ | {"_made_of": None, "_ternary": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _steps.count_for(self)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.requantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BitLinear":
        """nn.Module's, but the weight keeps its precision: model.to(torch.bfloat16) and .half() only move it."""
        weight, gradient, link = self.weight, self.weight.grad, self.link
        on_host = [] if link is None else [param for name, param in self._parameters.items() if name != "bias"]

        def moved(tensor: Tensor) -> Tensor:
            if link is not None and any(
                tensor is param or tensor is param.grad for param in on_host if param is not None
            ):
                link.device = fn(tensor.detach()[:0]).device
                return tensor
            result = fn(tensor)
            if _masters_may_be_cast or result.dtype not in _LOW or (tensor is not weight and tensor is not gradient):
                return result
            if tensor is weight:
                warnings.warn(_KEPT, stacklevel=2)
            return tensor.to(result.device)

        super()._apply(moved, recurse)
        return self


def computed_dtype(x: Tensor) -> torch.dtype:
    """What a layer computes in that is given x: autocast's dtype under autocast, else that of x."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def normalized(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """RMSNorm, in float32, of x (..., n) with a weight (n,), in the dtype of x."""
    return nn.functional.rms_norm(x.float(), tuple(weight.shape), weight.float(), eps).to(x.dtype)


_ATTRIBUTES = (
    "original_dtype",
    "quantize_activations",
    "weight_lambda",
    "activation_lambda",
    "quantized",
    "rms_norm",
    "shared",
    "effective",
    "link",
    "_written",
    "_made_of",
    "_ternary",
)
_KEPT = "BitLinear keeps its weight in float32: in lower precision its codes would stop changing"
_LOW = (torch.float16, torch.bfloat16)
_masters_may_be_cast = False


@contextmanager
def castable_masters() -> Iterator[None]:
    """Inside, a model's weights may be cast to lower precision: for engines that keep float32 copies themselves."""
    global _masters_may_be_cast
    before, _masters_may_be_cast = _masters_may_be_cast, True
    try:
        yield
    finally:
        _masters_may_be_cast = before


class _Steps:
    """How many steps any torch optimizer has taken: some write to the weights in ways that torch does not count.

    A hook on all of torch's optimizers counts them from the first BitLinear on, for as long as there is one.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.layers: WeakSet[BitLinear] = WeakSet()
        self.hook: Any = None

    def count_for(self, layer: BitLinear) -> None:
        self.layers.add(layer)
        if self.hook is None:
            self.hook = register_optimizer_step_post_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.taken += 1


_steps = _Steps()


def stop_counting() -> None:
    """Takes the hook off torch's optimizers if there is no BitLinear left.

    Called when a layer becomes nn.Linear again and by `hf_galore.unregister()`. Not when a layer is garbage: that can
    be in the middle of a step, while torch runs over its hooks.
    """
    if not _steps.layers and _steps.hook is not None:
        _steps.hook.remove()
        _steps.hook = None


ROUNDING[BitLinear] = TernaryWeight
