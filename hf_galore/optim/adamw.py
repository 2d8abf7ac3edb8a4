"""GaLore with AdamW."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_galore.checks import check_boolean, check_number
from hf_galore.optim import adamw_ops
from hf_galore.optim.matrix import LowRankMatrix
from hf_galore.optim.moments import State
from hf_galore.optim.optimizer import Group, LowRankOptimizer, Step, Together
from hf_galore.sides import Left, Right


class GaLoreAdamW(LowRankOptimizer):
    """AdamW on low-rank gradients (GaLore, arXiv 2403.03507, Algorithm 2), and plain AdamW for groups without `rank`.

        M ← β1·M + (1−β1)·R;  V ← β2·V + (1−β2)·R²
        N = √(1−β2ᵗ)/(1−β1ᵗ) · M/(√V + eps)
        W ← (1 − lr·weight_decay)·W − lr·scale·back(N)

    As in galore-torch, eps is added before the bias correction of V (torch.optim.AdamW adds it after; the two differ
    by the factor √(1−β2ᵗ) on eps), and its default is 1e-6. As in torch and unlike galore-torch, W is decayed before
    the update is added, not after it.

    Args:
        params: parameters or groups; see `LowRankOptimizer` for the group keys.
        lr: learning rate, float or one-element tensor.
        betas: decay rates of the two moments, in [0, 1).
        weight_decay: decoupled; per step W shrinks by the factor 1 − lr·weight_decay.
        correct_bias: False leaves out the bias corrections, as BERT's optimizer did.
        state_dtype: None for float32 (float64 for float64 parameters), or bfloat16: the dtype of moments and basis.
        stochastic_rounding: round bfloat16 weights and states stochastically; the bits depend on `seed`, the step, the
            parameter and the element alone.
        no_deprecation_warning: accepted because galore-torch's scripts pass it; there is no such warning here.

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
        correct_bias: bool = True,
        no_deprecation_warning: bool = True,
        *,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "correct_bias": correct_bias,
                "state_dtype": state_dtype,
                "stochastic_rounding": stochastic_rounding,
                "seed": seed,
            },
        )

    elementwise = True

    def check_group(self, group: Group) -> None:
        check_adam(group)

    def momentum(self, group: Group) -> float | None:
        return float(group["betas"][0])

    def moment_shapes(self, shape: torch.Size, group: Group) -> dict[str, torch.Size]:
        return {"exp_avg": shape, "exp_avg_sq": shape}

    def update_(
        self, target: Tensor, grad: Tensor, moments: Mapping[str, Tensor], group: Group, step: int, lr: float
    ) -> None:
        adamw_ops.update_(target, grad, moments["exp_avg"], moments["exp_avg_sq"], _rule(group, step, lr))

    def step_full_(self, target: Tensor, grad: Tensor, state: State, step: Step, decay: float, first_row: int) -> None:
        if not adamw_ops.covers(target, grad, step.formats):
            super().step_full_(target, grad, state, step, decay, first_row)
            return
        rule = _rule(step.group, step.number, step.lr)
        adamw_ops.adamw_(target, grad, state, rule, decay=decay, key=step.key, first_row=first_row)

    def step_low_rank_(
        self,
        weight: Tensor,
        grad: Tensor,
        state: State,
        matrix: LowRankMatrix,
        step: Step,
        decay: float,
        first_row_of: Callable[[Tensor], int],
        together: Together,
    ) -> None:
        side, group = matrix.side, step.group
        if weight.dim() > 2 or not isinstance(side, Right | Left) or not adamw_ops.covers(weight, grad, step.formats):
            super().step_low_rank_(weight, grad, state, matrix, step, decay, first_row_of, together)
            return
        basis = matrix.kept_basis(state)
        call = adamw_ops.LowRankStep(
            _rule(group, step.number, step.lr),
            scale=group["scale"],
            decay=decay,
            right=isinstance(side, Right),
            basis_bits=basis.bits,
            key=step.key and (step.key.seed, step.key.step),
            dtype=weight.dtype,
            kept=state["exp_avg"].dtype,
            device=weight.device,
        )
        rows = (first_row_of(weight), first_row_of(state["exp_avg"]))
        one = adamw_ops.OneMatrix(weight, grad, state, basis.values, basis.scale, step.parameter, *rows)
        if basis.made_again:  # several would be in memory at a time
            call([one])
        else:
            together.setdefault(call, []).append(one)


def _rule(group: Group, step: int, lr: float) -> adamw_ops.Rule:
    beta1, beta2 = group["betas"]
    return adamw_ops.Rule(lr, beta1, beta2, group["eps"], float(step) if group["correct_bias"] else math.inf)


def check_adam(group: Group) -> None:
    """Raises ValueError or TypeError unless betas and eps make sense."""
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas={betas!r} is not a pair of numbers")
    for index, beta in enumerate(betas):
        check_number(f"beta parameter at index {index}", beta, low=0.0, high=1.0)
    check_number("epsilon value", group["eps"], low=0.0)
    check_boolean("correct_bias", group["correct_bias"])
