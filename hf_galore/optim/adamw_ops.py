"""AdamW's step as one op: hf_galore::adamw_ at full rank, lowrank_adamw_ for any number of matrices with their bases.

    M ← β1·M + (1−β1)·R;  V ← β2·V + (1−β2)·R²;  N = √(1−β2ᵗ)/(1−β1ᵗ) · M/(√V + eps)
    adamw_:          W ← decay·W − lr·N, with R = G
    lowrank_adamw_:  W ← decay·W − lr·scale·back(N), with R = project(G) and no matrix of W's size but W and G

Covered: float32 and bfloat16 weights and gradients, moments in float32, in bfloat16 and in 8-bit blocks (by rows too),
and of the low-rank steps those of matrices on the right or the left side, with bases in floats or as integers. What is
not covered is stepped by projection, rule and write-back one after the other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_galore import native
from hf_galore.basis_store import Integer
from hf_galore.ops import NATIVE_DTYPES, add_, add_lowrank_, product_dtype, scale_, width_of
from hf_galore.optim import blockwise
from hf_galore.optim.moments import Blockwise8bit, Float, MomentFormat, State
from hf_galore.rounding import RoundingKey, key_numbers, mix64, signed_words
from hf_galore.sides import Left, Right

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Rule:
    """AdamW's numbers at one step; `steps` counts from 1, and is infinite where no bias is corrected."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    steps: float

    @property
    def numbers(self) -> tuple[float, ...]:
        return self.lr, self.beta1, self.beta2, self.eps, self.steps


def update_(target: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rule: Rule) -> None:
    """target ← target − lr·N, and the moments; all tensors of one floating-point dtype."""
    torch._fused_adamw_(
        [target],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(rule.steps, dtype=torch.float32, device=grad.device)],
        lr=rule.lr,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=0.0,
        eps=rule.eps / math.sqrt(1.0 - rule.beta2**rule.steps),  # torch adds it after the bias correction
        amsgrad=False,
        maximize=False,
    )


def covers(target: Tensor, grad: Tensor, formats: Mapping[str, tuple[Any, MomentFormat]]) -> bool:
    """Whether `adamw_` takes this target, contiguous, with this gradient and these moments."""
    dtypes = {kept.dtype for _, kept in formats.values()}
    takes = (*NATIVE_DTYPES, torch.uint8)
    is_float = target.dtype in NATIVE_DTYPES and grad.dtype in NATIVE_DTYPES
    return is_float and target.is_contiguous() and len(dtypes) == 1 and dtypes <= set(takes)


def adamw_(
    target: Tensor, grad: Tensor, state: State, rule: Rule, *, decay: float, key: RoundingKey | None, first_row: int
) -> None:
    """target ← decay·target − lr·N and the moments in `state`, where `covers` is true; `first_row` as in `add_`."""
    width = width_of(target)
    tensors = [target.view(-1, width), grad.contiguous().view(-1, width), *_kept(state, width)]
    _adamw_(*tensors, *rule.numbers, decay, key_numbers(key), first_row)


class OneMatrix(NamedTuple):
    """One matrix of a low-rank step: W (m, n), G, its moments and basis as they are kept, and what its bits go by.

    `first_row` and `first_moment_row` are the numbers of the first rows of W and of the moments, as in `ops.add_`.
    """

    weight: Tensor
    grad: Tensor
    state: State
    basis: Tensor
    basis_scale: Tensor | None
    parameter: int
    first_row: int
    first_moment_row: int


@dataclass(frozen=True)
class LowRankStep:
    """W ← decay·W − lr·scale·back(N) and the moments, of any number of matrices on one side, in one call.

    `basis_bits` is 0 for bases of floats; `key` the seed and the step of stochastic rounding; `dtype` that of the
    weights, `kept` that of the moments.
    """

    rule: Rule
    scale: float
    decay: float
    right: bool
    basis_bits: int
    key: tuple[int, int] | None
    dtype: torch.dtype
    kept: torch.dtype
    device: torch.device

    def __call__(self, matrices: Sequence[OneMatrix]) -> None:
        blocks = self.kept == torch.uint8
        states = [matrix.state for matrix in matrices]
        moments = [[state[name] for state in states] for name in _MOMENTS]
        scales = [[state[f"{name}_absmax"] for state in states] if blocks else [] for name in _MOMENTS]
        books = [blockwise.code_book(signed, self.device) if blocks else None for signed in (True, False)]
        _lowrank_adamw_(
            *([matrix.weight for matrix in matrices], [matrix.grad for matrix in matrices], *moments, *scales, *books),
            [matrix.basis for matrix in matrices],
            [matrix.basis_scale for matrix in matrices if matrix.basis_scale is not None],
            self.basis_bits,
            self.right,
            product_dtype(self.dtype, self.device) == torch.bfloat16,
            *self.rule.numbers,
            self.scale,
            self.decay,
            None if self.key is None else signed_words(self.key),
            signed_words(matrix.parameter for matrix in matrices),
            [matrix.first_row for matrix in matrices],
            [matrix.first_moment_row for matrix in matrices],
        )


def _kept(state: State, width: int) -> list[Tensor | None]:
    """Both moments as rows, their scales (rows of scales where no block crosses a row), and the code books."""
    moments = [state[name].view(-1, width) for name in _MOMENTS]
    if moments[0].dtype != torch.uint8:
        return [*moments, None, None, None, None]
    scales = [state[f"{name}_absmax"] for name in _MOMENTS]
    scales = [scale if scale.dim() == 1 else scale.view(-1, scale.shape[-1]) for scale in scales]
    return [*moments, *scales, *(blockwise.code_book(signed, moments[0].device) for signed in (True, False))]


# The references.


def _rounding_key(key: Sequence[int] | None) -> RoundingKey | None:
    return None if key is None else RoundingKey(*key)


def _change_moments(
    target: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Sequence[Tensor | None],
    rule: Rule,
    key: Sequence[int] | None,
    first_row: int,
) -> None:
    """`update_` with the moments read from what is kept and written back; target in float32."""
    state: State = {}
    formats: dict[str, MomentFormat] = {}
    for name, moment, scale in zip(_MOMENTS, (exp_avg, exp_avg_sq), scales, strict=True):
        state.update({name: moment, f"{name}_absmax": scale})
        blocks = Blockwise8bit(name == "exp_avg", scale is not None and scale.dim() == 2)
        formats[name] = Float(moment.dtype, torch.float32) if scale is None else blocks
    moments = {name: kept.read(state, name) for name, kept in formats.items()}
    update_(target, grad.float(), moments["exp_avg"], moments["exp_avg_sq"], rule)
    for index, (name, kept) in enumerate(formats.items(), start=1):
        of_moment = None if key is None else RoundingKey(key[0], key[1], mix64(key[2], index))
        kept.write(state, name, moments[name], of_moment, first_row)


def _adamw_reference(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor | None,
    exp_avg_sq_absmax: Tensor | None,
    signed_codes: Tensor | None,
    unsigned_codes: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    steps: float,
    decay: float,
    key: Sequence[int] | None,
    first_row: int,
) -> None:
    rule, scales = Rule(lr, beta1, beta2, eps, steps), (exp_avg_absmax, exp_avg_sq_absmax)
    if weight.dtype == torch.float32:
        _change_moments(scale_(weight, decay), grad, exp_avg, exp_avg_sq, scales, rule, key, first_row)
        return
    delta = torch.zeros_like(grad, dtype=torch.float32)
    _change_moments(delta, grad, exp_avg, exp_avg_sq, scales, rule, key, first_row)
    add_(weight, delta, alpha=1.0, beta=decay, key=_rounding_key(key), first_row=first_row)


def _lowrank_adamw_reference(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_absmaxs: Sequence[Tensor],
    exp_avg_sq_absmaxs: Sequence[Tensor],
    signed_codes: Tensor | None,
    unsigned_codes: Tensor | None,
    bases: Sequence[Tensor],
    basis_scales: Sequence[Tensor],
    basis_bits: int,
    right: bool,
    in_bfloat16: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    steps: float,
    scale: float,
    decay: float,
    key: Sequence[int] | None,
    parameters: Sequence[int],
    first_rows: Sequence[int],
    first_moment_rows: Sequence[int],
) -> None:
    side = Right() if right else Left()
    none = [None] * len(weights)
    moments = (exp_avgs, exp_avg_sqs, exp_avg_absmaxs or none, exp_avg_sq_absmaxs or none)
    lists: tuple[Sequence[Any], ...] = (weights, grads, bases, basis_scales or none, *moments, parameters)
    lists += (first_rows, first_moment_rows)
    for weight, grad, basis, basis_scale, *kept, parameter, first_row, first_moment_row in zip(*lists, strict=True):
        if basis_scale is not None:
            rows = side.sizes(*weight.shape)[0]
            coded = {"basis": basis, "basis_scale": basis_scale}
            basis = Integer(basis_bits, rows, torch.float32).decode(coded)
        narrow = in_bfloat16 and grad.dtype == torch.bfloat16
        low = side.project(grad, basis.to(torch.bfloat16 if narrow else torch.float32)).contiguous()
        numbers = None if key is None else [*key, parameter]
        delta = torch.zeros_like(low, dtype=torch.float32)
        books = (signed_codes, unsigned_codes)
        _adamw_(delta, low, *kept, *books, lr, beta1, beta2, eps, steps, 1.0, numbers, first_moment_row)
        factors = side.factors(delta, basis.float())
        add_lowrank_(weight, *factors, alpha=scale, beta=decay, key=_rounding_key(numbers), first_row=first_row)


_TENSORS = (
    "Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? exp_avg_absmax,"
    " Tensor(e!)? exp_avg_sq_absmax, Tensor? signed_codes, Tensor? unsigned_codes"
)
_RULE = "float lr, float beta1, float beta2, float eps, float steps"

_adamw_: Callable[..., None] = native.define(
    f"adamw_({_TENSORS}, {_RULE}, float decay, int[]? key, int first_row) -> ()", _adamw_reference, lambda *_: None
)
_lowrank_adamw_: Callable[..., None] = native.define(
    "lowrank_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] exp_avg_absmaxs, Tensor(e!)[] exp_avg_sq_absmaxs, Tensor? signed_codes, Tensor? unsigned_codes,"
    f" Tensor[] bases, Tensor[] basis_scales, int basis_bits, bool right, bool in_bfloat16, {_RULE}, float scale,"
    " float decay, int[]? key, int[] parameters, int[] first_rows, int[] first_moment_rows) -> ()",
    _lowrank_adamw_reference,
    lambda *_: None,
)
