"""GaLore with AdamW whose moments are kept in 8 bits."""

from typing import Any

import torch
from torch import Tensor

from hf_galore.checks import check_integer
from hf_galore.optim.adamw import GaLoreAdamW
from hf_galore.optim.moments import Blockwise8bit, MomentFormat
from hf_galore.optim.optimizer import Group, LowRankOptimizer


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` with block-wise dynamic 8-bit moments (arXiv 2110.02861), in the code book of bitsandbytes.

    The update is that of `GaLoreAdamW`, computed in float32 from the dequantised moments; they are quantised again
    after it. A moment of fewer than `min_8bit_size` elements (the low-rank moment, in a group with `rank`) stays in
    floats, and so does that of a vector that is spread over ranks. Where matrices are, no block crosses a row.

    Deviations from galore-torch's class: eps and weight_decay have `GaLoreAdamW`'s meaning and defaults for every
    group (there: 1e-8 and 1e-2), and it runs on any device.

    Args:
        min_8bit_size: moments with fewer elements than this are kept in `state_dtype`.
        state_dtype: None for float32, or bfloat16: the dtype of the basis and of the moments that stay in floats.
        The rest as in `GaLoreAdamW`.

    Raises:
        ValueError, TypeError: a hyper-parameter is malformed.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = 4096,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        LowRankOptimizer.__init__(
            self,
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "correct_bias": True,
                "min_8bit_size": min_8bit_size,
                "state_dtype": state_dtype,
                "stochastic_rounding": stochastic_rounding,
                "seed": seed,
            },
        )

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_integer("min_8bit_size", group["min_8bit_size"], low=0)

    def moment_format(
        self, name: str, shape: torch.Size, group: Group, work: torch.dtype, by_rows: bool = False
    ) -> MomentFormat:
        small = shape.numel() < group["min_8bit_size"] or (by_rows and len(shape) < 2)
        if small or work == torch.float64:
            return super().moment_format(name, shape, group, work)
        return Blockwise8bit(signed=name == "exp_avg", by_rows=by_rows)
