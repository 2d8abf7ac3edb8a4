"""GaLore with Adafactor."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_galore.checks import check_boolean, check_number
from hf_galore.optim.optimizer import Group, LowRankOptimizer


class GaLoreAdafactor(LowRankOptimizer):
    """Adafactor (arXiv 1804.04235) on low-rank gradients (GaLore, arXiv 2403.03507), and on full ones without `rank`.

        β2 = 1 − t^decay_rate
        v_row ← β2·v_row + (1−β2)·mean_cols(R² + eps1);  v_col likewise over rows
        N = R / √(v_row v_colᵀ / mean(v_row));  N ← N / max(1, rms(N)/clip_threshold)
        W ← (1 − lr·weight_decay)·W − scale·back(lr·N)

    A vector keeps its whole second moment. With beta1, N is averaged over the steps, learning rate included. With
    scale_parameter, lr is multiplied by max(eps2, rms(W)); with relative_step, lr is 1/√t bounded by 1e-2 (or by
    1e-6·t with warmup_init). Defaults and options are those of transformers.Adafactor and galore-torch; the Trainer
    gives scale_parameter=False, relative_step=False and its learning rate. In a batch of matrices each is clipped by
    itself.

    Raises:
        ValueError: lr and relative_step are both given, or neither; or a hyper-parameter is out of range.
        TypeError: a hyper-parameter has the wrong type.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "eps": eps,
                "clip_threshold": clip_threshold,
                "decay_rate": decay_rate,
                "beta1": beta1,
                "weight_decay": weight_decay,
                "scale_parameter": scale_parameter,
                "relative_step": relative_step,
                "warmup_init": warmup_init,
                "state_dtype": state_dtype,
                "stochastic_rounding": stochastic_rounding,
                "seed": seed,
            },
        )

    def check_group(self, group: Group) -> None:
        for name in ("scale_parameter", "relative_step", "warmup_init"):
            check_boolean(name, group[name])
        if group["lr"] is not None and group["relative_step"]:
            raise ValueError("lr and relative_step=True exclude each other: pass relative_step=False to use lr")
        if group["lr"] is None and not group["relative_step"]:
            raise ValueError("lr is required with relative_step=False")
        if group["warmup_init"] and not group["relative_step"]:
            raise ValueError("warmup_init=True requires relative_step=True")
        eps = group["eps"]
        if not isinstance(eps, tuple | list) or len(eps) != 2:
            raise TypeError(f"eps={eps!r} is not a pair of numbers")
        for index, value in enumerate(eps):
            check_number(f"epsilon value at index {index}", value, low=0.0)
        check_number("clip_threshold", group["clip_threshold"], low=math.nextafter(0.0, 1.0))
        check_number("decay_rate", group["decay_rate"], low=-1.0, high=0.0)
        if group["beta1"] is not None:
            check_number("beta1", group["beta1"], low=0.0, high=1.0)

    def moment_shapes(self, shape: torch.Size, group: Group) -> dict[str, torch.Size]:
        if len(shape) >= 2:
            shapes = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
        else:
            shapes = {"exp_avg_sq": shape}
        return shapes if group["beta1"] is None else {"exp_avg": shape, **shapes}

    def rate(self, group: Group, step: int, param: Tensor) -> float:
        if group["relative_step"]:
            lr = min(1e-6 * step if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(step))
        else:
            lr = float(group["lr"])
        return lr * max(group["eps"][1], float(_rms(param))) if group["scale_parameter"] else lr

    def update_(
        self, target: Tensor, grad: Tensor, moments: Mapping[str, Tensor], group: Group, step: int, lr: float
    ) -> None:
        beta2 = 1.0 - math.pow(step, group["decay_rate"])
        square = grad.square().add_(group["eps"][0])
        if "exp_avg_sq" in moments:
            delta = moments["exp_avg_sq"].lerp_(square, 1.0 - beta2).rsqrt().mul_(grad)
        else:
            row = moments["exp_avg_sq_row"].lerp_(square.mean(dim=-1), 1.0 - beta2)
            col = moments["exp_avg_sq_col"].lerp_(square.mean(dim=-2), 1.0 - beta2)
            row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            delta = torch.mul(row_factor, col.unsqueeze(-2).rsqrt(), out=square).mul_(grad)
        per_matrix = (-2, -1) if group.get("rank") is not None else None
        delta.div_((_rms(delta, per_matrix) / group["clip_threshold"]).clamp_(min=1.0)).mul_(lr)
        if "exp_avg" in moments:
            delta = moments["exp_avg"].lerp_(delta, 1.0 - group["beta1"])
        target.sub_(delta)


def _rms(values: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Root mean square over all elements, or over `dim` with the dimensions kept."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.to(dtype).square().mean(dim=dim, keepdim=dim is not None).sqrt_()
