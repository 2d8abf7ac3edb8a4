"""AdamW's step as one op for any number of parameters: hf_galore::adamw_ at full rank, lowrank_adamw_ with bases.

    M ← β1·M + (1−β1)·R;  V ← β2·V + (1−β2)·R²;  N = √(1−β2ᵗ)/(1−β1ᵗ) · M/(√V + eps)
    adamw_:          W ← decay·W − lr·N, with R = G
    lowrank_adamw_:  W ← decay·W − lr·scale·back(N), with R = project(G) and no matrix of W's size but W and G

Covered: float32 and bfloat16 weights and gradients, moments in float32, in bfloat16 and in 8-bit blocks (by rows too),
and of the low-rank steps those of matrices on the right or the left side, with bases in floats or as integers. What is
not covered is stepped by projection, rule and write-back one after the other.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_galore import native
from hf_galore.basis_store import Integer
from hf_galore.ops import NATIVE_DTYPES, add_, add_lowrank_each_, product_dtype, scale_, width_of
from hf_galore.optim import blockwise
from hf_galore.optim.moments import Blockwise8bit, Float, MomentFormat, State
from hf_galore.rounding import RoundingKey, key_of, key_parts, mix64, signed_words
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
    tensors = [[target.view(-1, width)], [grad.contiguous().view(-1, width)], *_kept(state, width)]
    _adamw_(*tensors, *rule.numbers, decay, *key_parts(key), [first_row])


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


def _kept(state: State, width: int) -> list[Any]:
    """Both moments as rows, their scales (rows of scales where no block crosses a row), and the code books."""
    moments = [[state[name].view(-1, width)] for name in _MOMENTS]
    if moments[0][0].dtype != torch.uint8:
        return [*moments, [], [], None, None]
    scales = [state[f"{name}_absmax"] for name in _MOMENTS]
    scales = [[scale if scale.dim() == 1 else scale.view(-1, scale.shape[-1])] for scale in scales]
    return [*moments, *scales, *(blockwise.code_book(signed, moments[0][0].device) for signed in (True, False))]


# The references.


# Values of low-rank updates that are made at a time where a kernel steps all matrices that it is given at once.
_VALUES_AT_A_TIME = 1 << 24


def _change_moments(
    target: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Sequence[Tensor | None],
    rule: Rule,
    key: RoundingKey | None,
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
        of_moment = key and key._replace(parameter=mix64(key.parameter, index))
        kept.write(state, name, moments[name], of_moment, first_row)


def _adamw_reference(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_absmaxs: Sequence[Tensor],
    exp_avg_sq_absmaxs: Sequence[Tensor],
    signed_codes: Tensor | None,
    unsigned_codes: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    steps: float,
    decay: float,
    key: Sequence[int] | None,
    parameters: Sequence[int],
    first_rows: Sequence[int],
) -> None:
    rule, none = Rule(lr, beta1, beta2, eps, steps), [None] * len(weights)
    scales = zip(exp_avg_absmaxs or none, exp_avg_sq_absmaxs or none, strict=True)
    lists = (weights, grads, exp_avgs, exp_avg_sqs, scales, parameters, first_rows)
    for weight, grad, exp_avg, exp_avg_sq, of_both, parameter, first_row in zip(*lists, strict=True):
        own = key_of(key, parameter)
        if weight.dtype == torch.float32:
            _change_moments(scale_(weight, decay), grad, exp_avg, exp_avg_sq, of_both, rule, own, first_row)
            continue
        delta = torch.zeros_like(grad, dtype=torch.float32)
        _change_moments(delta, grad, exp_avg, exp_avg_sq, of_both, rule, own, first_row)
        add_(weight, delta, alpha=1.0, beta=decay, key=own, first_row=first_row)


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

    def basis_of(index: int) -> Tensor:
        basis, grad = bases[index], grads[index]
        if basis_bits:
            rows = side.sizes(*weights[index].shape)[0]
            coded = {"basis": basis, "basis_scale": basis_scales[index]}
            basis = Integer(basis_bits, rows, torch.float32).decode(coded)
        return basis.to(torch.bfloat16 if in_bfloat16 and grad.dtype == torch.bfloat16 else torch.float32)

    for some in _some_at_a_time(exp_avgs):
        made = [basis_of(index) for index in range(some.start, some.stop)]
        low = [side.project(grad, basis).contiguous() for grad, basis in zip(grads[some], made, strict=True)]
        changes = torch.zeros(sum(map(Tensor.numel, low)), dtype=torch.float32, device=low[0].device)
        _adamw_(
            _shaped_like(low, changes),
            *(low, exp_avgs[some], exp_avg_sqs[some], exp_avg_absmaxs[some], exp_avg_sq_absmaxs[some]),
            *(signed_codes, unsigned_codes, lr, beta1, beta2, eps, steps, 1.0, key),
            *(parameters[some], first_moment_rows[some]),
        )
        deltas = _shaped_like(low, changes.to(torch.bfloat16) if in_bfloat16 else changes)
        factors = [side.factors(delta, basis) for delta, basis in zip(deltas, made, strict=True)]
        add_lowrank_each_(
            weights[some],
            factors,
            alpha=scale,
            beta=decay,
            key=key,
            parameters=parameters[some],
            first_rows=first_rows[some],
        )


def _some_at_a_time(moments: Sequence[Tensor]) -> Iterator[slice]:
    """Slices of a list of matrices: one by one on a CPU, elsewhere about as many as have _VALUES_AT_A_TIME."""
    start, values = 0, 0
    limit = 1 if moments[0].device.type == "cpu" else _VALUES_AT_A_TIME
    for index, moment in enumerate(moments, start=1):
        values += moment.numel()
        if values >= limit or index == len(moments):
            yield slice(start, index)
            start, values = index, 0


def _shaped_like(tensors: Sequence[Tensor], values: Tensor) -> list[Tensor]:
    """The values (a vector) as tensors of the shapes of these, one after another."""
    parts = values.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


_TENSORS = (
    "Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] exp_avg_absmaxs, Tensor(e!)[] exp_avg_sq_absmaxs, Tensor? signed_codes, Tensor? unsigned_codes"
)
_RULE = "float lr, float beta1, float beta2, float eps, float steps"

_adamw_: Callable[..., None] = native.define(
    f"adamw_({_TENSORS}, {_RULE}, float decay, int[]? key, int[] parameters, int[] first_rows) -> ()",
    _adamw_reference,
    lambda *_: None,
)
_lowrank_adamw_: Callable[..., None] = native.define(
    f"lowrank_adamw_({_TENSORS}, Tensor[] bases, Tensor[] basis_scales, int basis_bits, bool right, bool in_bfloat16,"
    f" {_RULE}, float scale, float decay, int[]? key, int[] parameters, int[] first_rows, int[] first_moment_rows)"
    " -> ()",
    _lowrank_adamw_reference,
    lambda *_: None,
)
