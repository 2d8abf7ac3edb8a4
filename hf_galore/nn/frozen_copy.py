"""What a BitLinear computes now, kept as it is while the layer goes on to train: two bits a weight."""

from collections.abc import Callable

from torch import Tensor, nn

from hf_galore.nn.bitlinear import BitLinear, computed_dtype, normalized
from hf_galore.nn.functional import StraightThrough, absmax_int8
from hf_galore.nn.packing import compact, expand
from hf_galore.nn.shared_activations import SharedActivations
from hf_galore.shards import whole


class FrozenCopy(nn.Module):
    """The codes, the scale, the bias and the norm of a BitLinear as they are now.

    They are buffers, and no part of the model's state dict: `values` and `load` are for whoever saves them. Codes are
    packed where 4 divides out_features, and unpacked, to a byte each, for as long as a call lasts.

    Raises:
        ValueError: the layer is not fully quantized, so that its codes are not what it computes with.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    norm: Tensor | None

    def __init__(self, layer: BitLinear) -> None:
        super().__init__()
        if layer.weight_lambda != 1 or layer.activation_lambda != 1:
            raise ValueError(
                f"a copy in two bits a weight is of a layer with weight_lambda=1 and activation_lambda=1, not "
                f"{layer.weight_lambda} and {layer.activation_lambda}"
            )
        codes, scale = layer.ternary()
        norm = layer.rms_norm
        values = {
            "codes": compact(codes),
            "scale": scale,
            "bias": None if layer.bias is None else whole(layer.bias.detach()),
            "norm": None if norm is None else whole(norm.weight.detach()),
        }
        for name, value in values.items():
            self.register_buffer(name, None if value is None else value.clone(), persistent=False)
        self.norm_eps = None if norm is None else norm.eps
        self.quantize_activations = layer.quantize_activations

    def values(self) -> dict[str, Tensor]:
        """What it holds, by name."""
        return dict(self.named_buffers())

    def load(self, values: dict[str, Tensor]) -> None:
        """Puts other values in the place of these.

        Raises:
            ValueError: they are not of this layer.
        """
        own = self.values()
        if {name: value.shape for name, value in values.items()} != {name: value.shape for name, value in own.items()}:
            raise ValueError(f"a copy of {', '.join(own)} cannot be loaded from {', '.join(values)} of other shapes")
        for name, value in values.items():
            own[name].copy_(value)

    def forward(self, x: Tensor, shared: SharedActivations | None) -> Tensor:
        """y (..., m) of x (..., n), bit for bit what the layer computed; `shared` is that of the layer."""
        if self.norm is not None:
            x = normalized(x, self.norm, self.norm_eps)
        tokens, a = x.detach(), None
        if self.quantize_activations:
            tokens, a = absmax_int8(x) if shared is None else shared.quantize(x)
        # The scale stands for W, of which no gradient is asked.
        arguments = self.scale, self.bias, computed_dtype(x), tokens, a, expand(self.codes), self.scale
        y: Tensor = StraightThrough.apply(x, *arguments)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenCopy":
        """nn.Module's, but nothing changes its precision: model.to(torch.bfloat16) and .half() only move it."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{sum(value.nbytes for value in self.values().values())} bytes"
