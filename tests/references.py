"""The papers' algorithms, written literally: slow, one matrix at a time, no shared code with hf_galore.

G (m, n) is the gradient of W (m, n). Every class keeps its own state; `step(W, G)` returns the new weight.
"""

import math

import torch
from torch import Tensor


class GaLoreProjector:
    """GaLore, arXiv 2403.03507, section 4: P_t and Q_t from the SVD of G every T steps, for each proj_type."""

    def __init__(self, rank: int, gap: int, proj_type: str, svd_dtype: torch.dtype | None = None) -> None:
        self.rank, self.gap, self.proj_type, self.svd_dtype = rank, gap, proj_type, svd_dtype

    def side(self, shape: torch.Size) -> str:
        tall = shape[0] >= shape[1]
        if self.proj_type == "std":
            return "right" if tall else "left"
        if self.proj_type == "reverse_std":
            return "left" if tall else "right"
        return self.proj_type

    def project(self, grad: Tensor, t: int) -> Tensor:
        if t % self.gap == 0:
            u, _, vh = torch.linalg.svd(grad.to(self.svd_dtype or grad.dtype), full_matrices=False)
            self.p, self.q = u[:, : self.rank].to(grad.dtype), vh[: self.rank, :].T.to(grad.dtype)
        if self.side(grad.shape) == "right":
            return grad @ self.q
        if self.side(grad.shape) == "left":
            return self.p.T @ grad
        return self.p.T @ grad @ self.q

    def back(self, update: Tensor, shape: torch.Size) -> Tensor:
        if self.side(shape) == "right":
            return update @ self.q.T
        if self.side(shape) == "left":
            return self.p @ update
        return self.p @ update @ self.q.T


class GaLoreAdamW:
    """Algorithm 2 of the GaLore paper with decoupled weight decay (arXiv 1711.05101).

    eps is added to the root of the uncorrected second moment, as in galore-torch and in the second form of Adam
    (arXiv 1412.6980, end of section 2); the paper's own line differs from it by the factor √(1−β2ᵗ) on eps.
    """

    def __init__(self, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, scale=1.0, projector=None) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.scale, self.projector = scale, projector
        self.t, self.m, self.v = 0, 0.0, 0.0

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        r = self.projector.project(grad, self.t) if self.projector else grad
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * r
        self.v = beta2 * self.v + (1 - beta2) * r**2
        correction = math.sqrt(1 - beta2**self.t) / (1 - beta1**self.t)
        n = correction * self.m / (torch.sqrt(self.v) + self.eps)
        full = self.scale * self.projector.back(n, weight.shape) if self.projector else n
        return weight - self.lr * full - self.lr * self.weight_decay * weight


class GaLoreAdafactor:
    """Adafactor, arXiv 1804.04235, Algorithms 4 and 5 (relative step sizes off), on the gradient or on R."""

    def __init__(
        self, lr=1e-3, eps=(1e-30, 1e-3), clip=1.0, decay=-0.8, beta1=None, weight_decay=0.0, scale=1.0, projector=None
    ) -> None:
        self.lr, self.eps, self.clip, self.decay, self.beta1 = lr, eps, clip, decay, beta1
        self.weight_decay, self.scale, self.projector = weight_decay, scale, projector
        self.t, self.row, self.col, self.v, self.m = 0, 0.0, 0.0, 0.0, 0.0

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        g = self.projector.project(grad, self.t) if self.projector else grad
        self.t += 1
        beta2 = 1 - self.t**self.decay
        square = g**2 + self.eps[0]
        if g.dim() == 2:
            self.row = beta2 * self.row + (1 - beta2) * square.mean(1)
            self.col = beta2 * self.col + (1 - beta2) * square.mean(0)
            v = self.row[:, None] * self.col[None, :] / self.row.mean()
        else:
            self.v = beta2 * self.v + (1 - beta2) * square
            v = self.v
        u = g / torch.sqrt(v)
        u = self.lr * u / max(1.0, float(torch.sqrt((u**2).mean())) / self.clip)
        if self.beta1 is not None:
            self.m = self.beta1 * self.m + (1 - self.beta1) * u
            u = self.m
        full = self.scale * self.projector.back(u, weight.shape) if self.projector else u
        return weight - full - self.lr * self.weight_decay * weight


class ReferenceOptimizer(torch.optim.Optimizer):
    """Runs a literal rule on each parameter, so that the references can be put into a training loop.

    Groups take galore-torch's keys. `rule` makes the rule of one parameter from a projector (or None) and a scale.
    """

    def __init__(self, params, rule, svd_dtype=None, lr=1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.rule, self.svd_dtype = rule, svd_dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    projector = None
                    if "rank" in group:
                        keys = (group["rank"], group["update_proj_gap"], group["proj_type"])
                        projector = GaLoreProjector(*keys, svd_dtype=self.svd_dtype)
                    state["rule"] = self.rule(projector=projector, scale=group.get("scale", 1.0))
                state["rule"].lr = group["lr"]
                param.copy_(state["rule"].step(param.clone(), param.grad))


def ldadam_rotate(m: Tensor, v: Tensor, q_new: Tensor, q_old: Tensor, t: int, betas: tuple[float, float]):
    """LDAdam, arXiv 2410.16103, Algorithm 1: the moments (r, n) after t steps, moved from one basis (m, r) to another.

    The first moment is rotated; the second is the rotated variance plus the square of the rotated mean, with the
    directions of the old basis taken as uncorrelated.
    """
    c = q_new.T @ q_old
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    new_m, new_v = torch.zeros_like(m), torch.zeros_like(v)
    for i in range(m.shape[0]):
        for j in range(m.shape[1]):
            mean = sum(c[i, k] * m_hat[k, j] for k in range(m.shape[0]))
            variance = sum(c[i, k] ** 2 * (v_hat[k, j] - m_hat[k, j] ** 2) for k in range(m.shape[0]))
            new_m[i, j] = (1 - betas[0] ** t) * mean
            new_v[i, j] = (1 - betas[1] ** t) * abs(variance + mean**2)
    return new_m, new_v


def ldadam_rotate_both(m: Tensor, v: Tensor, new: tuple, old: tuple, t: int, betas: tuple[float, float]):
    """`ldadam_rotate` for moments (r, r) between bases (P, Q) of both sides, with C = PᵀP_old and D = QᵀQ_old."""
    c, d = (one.T @ other for one, other in zip(new, old, strict=True))
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    new_m, new_v, r = torch.zeros_like(m), torch.zeros_like(v), range(m.shape[0])
    for i in r:
        for j in r:
            mean = sum(c[i, k] * d[j, h] * m_hat[k, h] for k in r for h in r)
            variance = sum((c[i, k] * d[j, h]) ** 2 * (v_hat[k, h] - m_hat[k, h] ** 2) for k in r for h in r)
            new_m[i, j] = (1 - betas[0] ** t) * mean
            new_v[i, j] = (1 - betas[1] ** t) * abs(variance + mean**2)
    return new_m, new_v


def qgalore_refreshes(gap: int, early: int, similar: list[bool], first: int = 0) -> list[int]:
    """Q-GaLore, arXiv 2407.08296, section 3.2: the steps of the refreshes, whose gap doubles after five similar ones.

    `similar` says of the refreshes after the first one whether the basis hardly turned. Without that they are `early`
    steps before each multiple of the gap.
    """
    steps, in_a_row, following = [first], 0, min(k * gap - early for k in range(100) if k * gap - early > first)
    for alike in similar:
        steps.append(following)
        in_a_row = in_a_row + 1 if alike else 0
        if in_a_row == 5:
            gap, in_a_row = gap * 2, 0
        following += gap
    return steps


def absmean_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """BitNet b1.58, arXiv 2402.17764, equations 1-3: codes in {-1, 0, 1} and their scale."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return (weight / scale).round().clamp(-1, 1), scale


def absmax_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """BitNet b1.58: codes in [-128, 127] and what they were multiplied by, per token."""
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round().clamp(-128, 127), scale


def bitlinear(x: Tensor, weight: Tensor, bias: Tensor | None, w_part: float = 1.0, x_part: float = 1.0) -> Tensor:
    """BitLinear with straight-through gradients, as x + (Q(x) - x).detach(); the parts are lambdas of a warm-up."""
    codes, scale = absmean_ternary(weight)
    tokens, multiplier = absmax_int8(x)
    weight = weight + w_part * (codes * scale - weight).detach()
    x = x + x_part * (tokens / multiplier - x).detach()
    return torch.nn.functional.linear(x, weight, bias)
