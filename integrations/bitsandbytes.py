"""Layers that bitsandbytes has quantized, trained in their codes by the projected backward.

A fold decodes a block of rows to float32, adds the update and quantizes again, stochastically (`hf_galore.codebook`),
into the tensors that the module already has: whatever bitsandbytes and transformers do with the model, saving
included, they do with the trained weight.

    Linear4bit    NF4 and FP4, with or without nested scales, in any storage type. A block's scale is its largest
                  magnitude, so that every fold may move it; codes are relative to that, before it is quantized in its
                  turn, stochastically and with bits of its own. So no value is ever clamped, and the expectation of
                  scale · level is the updated weight (but for a nested scale below the least level of its book, which
                  reaches from −0.993 to 1 and is bitsandbytes' own).
    Linear8bitLt  int8 codes with a scale for each row.

The noise: a value on a level that a fold moves by δ, with its update or because its scale has moved, gets a variance
of about |δ| times the gap. It adds up over the folds; to nearest there would be none, and small updates would be lost.

The forward is that of a linear layer with the decoded W, in training and in evaluation; in the dtype of autocast, else
in the layer's `compute_dtype`, else in its input's. Once the model is the user's own again, bitsandbytes' forward may
differ from that. Its Linear8bitLt quantizes the input to 8 bits, except columns above `threshold` (on a CPU only in
evaluation). And bitsandbytes 0.50 decodes 4-bit codes wrongly on a CPU where the block size, 64, does not divide
in_features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.utils import unpack_tensor_to_dict
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_galore.codebook import quantize_blocks, round_to_integers
from hf_galore.frozen_weight import QUANTIZED
from hf_galore.rounding import RoundingKey, mix64, random_bits

_SCALES = 1  # what the bits of the scales are hashed with, so that they are not those of the weights


def register() -> None:
    """Makes the projected backward train bitsandbytes' quantized layers. Idempotent; see `unregister`."""
    QUANTIZED.update(_WEIGHTS)


def unregister() -> None:
    """The projected backward refuses them again."""
    for layer in _WEIGHTS:
        QUANTIZED.pop(layer, None)


class Weight4bit:
    """The weight (m, n) of a Linear4bit: two codes in a byte, in row-major order, and a scale for each block.

    Raises:
        ValueError: the module is not quantized yet.
    """

    round_input = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        if getattr(module.weight, "quant_state", None) is None:
            raise ValueError(_NOT_YET.format(type(module).__name__))

    @property
    def state(self) -> QuantState:
        """What bitsandbytes needs to decode the codes."""
        weight: Any = self.module.weight
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # its forward in evaluation leaves the codes in that order
            nested = state.original_nested
            weight.data, state = bnb.functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
            if not nested:
                state.absmax = state.absmax.T.reshape(-1).float()
            weight.quant_state = state
        return state

    @property
    def stored(self) -> Tensor:
        assert self.state is not None  # which unpacks the codes, if need be
        return self.module.get_parameter("weight").detach()

    @property
    def decode(self) -> Callable[[Tensor], Tensor]:
        return self._decode

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.state.shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.state.dtype
        return dtype

    @property
    def compute_dtype(self) -> torch.dtype | None:
        module: Any = self.module
        dtype: torch.dtype | None = module.compute_dtype
        return dtype

    def _decode(self, codes: Tensor) -> Tensor:
        state = self.state
        m, n = state.shape
        shape = (m, n) if n % state.blocksize == 0 else (1, m * n)  # the CPU kernel loses count at the end of a row
        return _decode_4bit(codes, self.scales(), state, shape, state.dtype).view(m, n)

    def scales(self) -> Tensor:
        """The scale of each block, (blocks,) float32."""
        state = self.state
        if not state.nested:
            return state.absmax.float()
        scales: Tensor = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return scales.float()

    def add_lowrank_(self, left: Tensor, right: Tensor, *, alpha: float, beta: float, key: RoundingKey | None) -> None:
        state, size, (m, n) = self.state, self.state.blocksize, self.shape
        codes = self.stored.view(torch.uint8).view(-1)
        scales = self.scales()
        code_of = torch.argsort(state.code)  # by rank of the level
        levels = state.code[code_of]
        for rows in _row_blocks(m, n, codes.device, size // gcd(n, size)):
            first, last = rows.start * n, rows.stop * n
            part = codes[first // 2 : -(-last // 2)]
            blocks = scales[first // size : -(-last // size)]
            weight = _decode_4bit(part, blocks, state, (1, last - first), torch.float32).view(-1, n)
            values = weight.addmm_(left[rows], right, beta=beta, alpha=alpha).view(-1)
            bits = None if key is None else random_bits(key, range(rows.start, rows.stop), n, codes.device).view(-1)
            if len(values) % 2:  # the last byte is half empty
                values, bits = pad(values, (0, 1)), None if bits is None else pad(bits, (0, 1))
            ranks, maxima = quantize_blocks(values, size, levels, bits)
            new = code_of.to(torch.uint8).index_select(0, ranks)
            part.copy_((new[::2] << 4) | new[1::2])
            blocks.copy_(maxima)
        _keep_scales(state, scales, key)


def _decode_4bit(
    codes: Tensor, scales: Tensor, state: QuantState, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    decoded: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, scales, state.blocksize, state.quant_type, shape, dtype
    )
    return decoded


def _keep_scales(state: QuantState, scales: Tensor, key: RoundingKey | None) -> None:
    """Writes the scales of all blocks into the state's own tensors, quantized if they are nested."""
    if not state.nested:
        state.absmax.copy_(scales)
        return
    bits = None
    if key is not None:
        bits = random_bits(key._replace(seed=mix64(key.seed, _SCALES)), range(1), len(scales), scales.device)[0]
    state.offset.copy_(scales.mean())
    codes, maxima = quantize_blocks(scales - state.offset, state.state2.blocksize, state.state2.code, bits)
    state.absmax.copy_(codes)
    state.state2.absmax.copy_(maxima)


class Weight8bit:
    """The weight (m, n) of a Linear8bitLt without float weights: int8 codes, and a scale for each row.

    Its dtype is float32, which is what bitsandbytes decodes to: the codes do not say what they were made of.

    Raises:
        ValueError: the module is not quantized yet.
    """

    dtype = torch.float32
    compute_dtype = None
    round_input = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        if module.weight.dtype != torch.int8:
            raise ValueError(_NOT_YET.format(type(module).__name__))

    @property
    def stored(self) -> Tensor:
        return self.module.get_parameter("weight").detach()

    @property
    def decode(self) -> Callable[[Tensor], Tensor]:
        return self._decode

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.stored.shape
        return m, n

    @property
    def scales(self) -> Tensor:
        """The largest magnitude in each row, (m,); bitsandbytes moves it at the first use of the layer."""
        module: Any = self.module
        scales: Tensor = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return scales

    def _decode(self, codes: Tensor) -> Tensor:
        decoded: Tensor = bnb.functional.int8_vectorwise_dequant(codes, self.scales)
        return decoded

    def add_lowrank_(self, left: Tensor, right: Tensor, *, alpha: float, beta: float, key: RoundingKey | None) -> None:
        codes, scales, (m, n) = self.stored, self.scales, self.shape
        for rows in _row_blocks(m, n, codes.device):
            weight = bnb.functional.int8_vectorwise_dequant(codes[rows], scales[rows])
            weight.addmm_(left[rows], right, beta=beta, alpha=alpha)
            bits = None if key is None else random_bits(key, range(rows.start, rows.stop), n, codes.device)
            maxima = weight.abs().amax(1)
            weight.mul_((127.0 / maxima.clamp(min=1e-36))[:, None])
            codes[rows] = round_to_integers(weight, 127, bits).nan_to_num_(0.0).to(torch.int8)
            scales[rows] = maxima


_WEIGHTS: dict[type[nn.Module], Callable[[nn.Module], Any]] = {
    bnb.nn.Linear4bit: Weight4bit,
    bnb.nn.LinearNF4: Weight4bit,
    bnb.nn.LinearFP4: Weight4bit,
    bnb.nn.Linear8bitLt: Weight8bit,
}
_NOT_YET = "{} is not quantized yet: move the model to its device first, which is when bitsandbytes quantizes"


def _row_blocks(m: int, n: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Rows to work on at a time, in multiples: few temporaries on a CPU, few kernels on anything else."""
    elements = 1 << (18 if device.type == "cpu" else 24)
    step = max(1, elements // (n * multiple)) * multiple
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


# Loading a state dict into a model that is quantized already: bitsandbytes leaves the scales out.


@contextmanager
def loading_scales(model: nn.Module) -> Iterator[None]:
    """Inside, `model.load_state_dict` loads the scales of quantized layers with their codes, in place.

    Without it those of Linear4bit count as unexpected keys, and a Linear8bitLt refuses after its first use.

    Raises:
        ValueError: in `load_state_dict`, where the state dict was quantized in another way.
    """
    hooks = []
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            hooks.append(module.register_load_state_dict_pre_hook(_load_4bit_scales))
        elif isinstance(module, bnb.nn.Linear8bitLt) and module.weight.SCB is None:
            module.weight.SCB = module.state.SCB
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _load_4bit_scales(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state = Weight4bit(module).state
    inner = state.state2 if state.nested else None
    places = {"absmax": state.absmax, "quant_map": state.code}
    if inner is not None:
        places |= {"nested_absmax": inner.absmax, "nested_quant_map": inner.code}
    start = f"{prefix}weight."
    given = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
    for name, value in given.items():
        if name.startswith("quant_state."):
            kept = state.as_dict()
            for key, saved in unpack_tensor_to_dict(value).items():
                if key == "nested_offset" and state.nested:
                    state.offset.fill_(saved)
                elif key not in kept or (tuple(saved) if key == "shape" else saved) != kept[key]:
                    raise ValueError(_OTHER.format(start, key, saved, kept.get(key)))
        elif name not in places or places[name].shape != value.shape:
            raise ValueError(_OTHER.format(start, name, tuple(value.shape), getattr(places.get(name), "shape", None)))
        else:
            places[name].copy_(value)


_OTHER = "{}: the checkpoint was quantized in another way than the model ({} is {!r} there and {!r} here)"
