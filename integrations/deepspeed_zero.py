"""The small parameters B, their moments and the frozen weights where DeepSpeed's ZeRO keeps them.

B is trained in the flat float32 partitions of ZeRO, whose copy in the module follows the step. Everything here is a
collective call unless it says otherwise: all ranks make it, in the same order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

from hf_galore.frozen_weight import PlainWeight
from hf_galore.lowrank_layer import LowRankLayer
from hf_galore.lowrank_store import Change, Momentum, UpdateStorage
from hf_galore.nn.ternary_weight import TernaryWeight
from hf_galore.optim.blockwise import BLOCK
from hf_galore.optim.moments import Float, MomentFormat, State, bias_corrections
from hf_galore.optim.optimizer import LowRankOptimizer
from hf_galore.rounding import RoundingKey

Group = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq")


def partitioned(param: Tensor) -> bool:
    """Whether ZeRO-3 keeps the parameter in parts."""
    return hasattr(param, "ds_id")


@contextmanager
def full_shapes(model: nn.Module) -> Iterator[None]:
    """The parameters that ZeRO-3 has already partitioned have their full shapes inside, without storage."""
    params: list[Any] = [param for param in model.parameters() if partitioned(param)]
    kept = [param.data for param in params]
    for param in params:
        param.data = param.data.new_zeros(()).expand(param.ds_shape)
    try:
        yield
    finally:
        for param, data in zip(params, kept, strict=True):
            param.data = data


class ZeroStorage(UpdateStorage):
    """B as a part of the flat partitions, and as the copy in the module that the forward pass reads."""

    def read(self, layer: LowRankLayer) -> Tensor:
        return safe_get_full_fp32_param(layer.update).to(layer.work)

    def clear(self, layer: LowRankLayer) -> None:
        update: Any = layer.update
        if partitioned(update):
            safe_set_local_fp32_param(update, torch.zeros_like(update.ds_tensor))
        else:
            safe_set_full_fp32_param(update, torch.zeros_like(update))
        with gathered(update), torch.no_grad():
            update.zero_()

    def has_gradient(self, layer: LowRankLayer) -> bool:
        """True: ZeRO takes gradients out of the parameters, and throws them away only when it skips a step."""
        return True


class ShardedWeight(PlainWeight):
    """A weight that ZeRO-3 brings into its module for the forward and the backward pass, and takes out again.

    What the backward pass keeps is the parameter itself, so that it keeps no copy alive in between; where it is
    rounded, that is done again.
    """

    def __init__(self, weight: PlainWeight) -> None:
        self.module, self.transposed = weight.module, weight.transposed
        self._shape, self._weight = torch.Size(weight.shape), weight
        self.round_input = weight.round_input

    @property
    def stored(self) -> Tensor:
        return self.module.get_parameter("weight")

    @property
    def decode(self) -> Callable[[Tensor], Tensor] | None:  # type: ignore[override]
        if isinstance(self._weight, TernaryWeight):
            return self._rounded
        return _transposed if self.transposed else None

    def _rounded(self, _: Tensor) -> Tensor:
        assert isinstance(self._weight, TernaryWeight)
        rounded = self._weight.decode(self._weight.stored)
        self._weight.bitlinear.requantize()  # codes, too, are a copy of what ZeRO-3 keeps in parts
        return rounded

    def add_lowrank_(self, left: Tensor, right: Tensor, *, alpha: float, beta: float, key: RoundingKey | None) -> None:
        with gathered(self.stored):
            if dist.get_rank() == 0:
                super().add_lowrank_(left, right, alpha=alpha, beta=beta, key=key)


def _transposed(weight: Tensor) -> Tensor:
    return weight.mT


def gathered(param: Tensor) -> Any:
    """The whole parameter inside; what rank 0 makes of it is what all ranks have afterwards."""
    return deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=partitioned(param))


class ZeroStore:
    """The steps that DeepSpeed takes on the small parameters, and their moments in the flat partitions.

    Not through DeepSpeed's helpers for optimizer states: after the first step these know the states of the first
    parameter group alone, and 8-bit codes they would hand out as if they were values.

    Args:
        layers: all that take part in the steps.
        numbers: the parameter group of each B.
    """

    def __init__(self, layers: list[LowRankLayer], zero: Any, numbers: dict[Tensor, int]) -> None:
        self.layers, self.zero, self.numbers = layers, zero, numbers
        self._decays: list[float] = []

    def note_rates(self) -> None:
        """Before a step: the learning rates are those of the step. No collective call."""
        self._decays = [1.0 - float(g["lr"]) * float(g.get("weight_decay") or 0.0) for g in self.zero.param_groups]

    def stepping(self) -> list[LowRankLayer]:
        return self.layers

    def decay(self, layer: LowRankLayer) -> float:
        return self._decays[self.numbers[layer.update]]

    def first_moment(self, layer: LowRankLayer) -> Tensor:
        return self._read(layer, "exp_avg")

    def momentum(self, layer: LowRankLayer) -> Momentum:
        raise NotImplementedError("source='moment' is refused before training")

    def change_moments(self, layer: LowRankLayer, change: Change) -> None:
        moments = {name: self._read(layer, name) for name in MOMENTS}
        group = self.zero.param_groups[self.numbers[layer.update]]
        change(moments, *bias_corrections(group, layer.basis.steps))
        for name, value in moments.items():
            self._write(layer, name, value)

    def reset_moments(self, layer: LowRankLayer) -> None:
        raise NotImplementedError("moments='reset' is refused before training")

    def keep(self, layer: LowRankLayer, kept: dict[str, Tensor]) -> None:
        """Nothing: the bases are written when a checkpoint is."""

    def _read(self, layer: LowRankLayer, name: str) -> Tensor:
        shape = _shape(layer.update)
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=get_accelerator().current_device_name())
        part = self._part(layer, name)
        if part is not None:
            whole[part.offset :][: part.own.numel()] = part.own
        dist.all_reduce(whole)
        return whole.view(shape)

    def _write(self, layer: LowRankLayer, name: str, value: Tensor) -> None:
        part = self._part(layer, name)
        if part is not None:
            part.own.copy_(value.reshape(-1)[part.offset :][: part.own.numel()])
            part.kept.write(part.state, name, part.values, None)

    def _part(self, layer: LowRankLayer, name: str) -> "_Part | None":
        """What this rank has of a moment."""
        found = self._fragment(layer)
        if found is None:
            return None
        flat, start, count, offset = found
        optimizer, kept = self.zero.optimizer, self._format(layer, flat, name)
        first = start // BLOCK * BLOCK
        last = min(-(-(start + count) // BLOCK) * BLOCK, flat.numel())
        state = kept.rows(optimizer.state[flat], name, slice(first, last), 1)
        values = kept.read(state, name)
        return _Part(kept, state, values, values.view(-1)[start - first :][:count], offset)

    def _format(self, layer: LowRankLayer, flat: Tensor, name: str) -> MomentFormat:
        optimizer = self.zero.optimizer
        if isinstance(optimizer, LowRankOptimizer):
            return optimizer.formats_of(flat, optimizer.param_groups[self.numbers[layer.update]])[name][1]
        return Float(optimizer.state[flat][name].dtype, layer.work)

    def _fragment(self, layer: LowRankLayer) -> tuple[Tensor, int, int, int] | None:
        """This rank's flat partition, where B starts in it, of how many elements, and at which element of B."""
        zero = self.zero
        update: Any = layer.update
        if partitioned(update):
            group, start, size = zero.grad_position[zero.get_param_id(update)]
            offset = dist.get_rank() * size
            count = min(size, update.ds_numel - offset)
            return (zero.fp32_partitioned_groups_flat[group], start, count, offset) if count > 0 else None
        mapping = update._hp_mapping
        if mapping is None:
            return None
        there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        return zero.single_partition_of_fp32_groups[self.numbers[update]], there.start, there.numel, here.start


class _Part(NamedTuple):
    """The blocks of a moment that hold this rank's part of one parameter, which they share with its neighbours."""

    kept: MomentFormat
    state: State  # of these blocks
    values: Tensor
    own: Tensor  # a view of the values
    offset: int  # of the first own value in the parameter


def _shape(update: Tensor) -> torch.Size:
    return torch.Size(getattr(update, "ds_shape", update.shape))
