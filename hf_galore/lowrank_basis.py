"""The basis of a layer of the projected backward, or of several layers that share one input, and its refreshes."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_galore.bases import SUBSPACES, gram, random
from hf_galore.lowrank_layer import LowRankLayer, Settings, several_ranks
from hf_galore.ops import matmul
from hf_galore.rounding import mix64
from hf_galore.sides import Left, Right, Side
from hf_galore.subspace import refresh


class Steering(Protocol):
    """What a basis asks of the engine it belongs to."""

    settings: Settings
    gradients_complete: Callable[[], bool]

    def warn(self, message: str) -> None:
        """Warns of a refresh that could not give what was asked for, once for each kind of message."""

    @property
    def count(self) -> int:
        """The number of bases."""


class LayerBasis:
    """Q (n, r) or P (m, r) of its layers, the steps taken with it, and what a refresh in progress has gathered.

    Layers that share a basis are projected on the right, with the basis of their stacked gradients.
    """

    def __init__(self, layers: Sequence[LowRankLayer], index: int, engine: Steering) -> None:
        self.layers, self.index, self.engine, self.settings = layers, index, engine, engine.settings
        first = layers[0]
        self.right, self.work, self.rank = first.right, first.work, first.rank
        self.steps, self.tapping, self.seconds = 0, True, 0.0
        self.sketch: Tensor | None = None  # Z, in a streaming refresh
        self.candidate: Tensor | None = None  # the basis that is to be adopted
        self._pass = -1  # the backward pass that added last
        self._shared: tuple[Tensor, int, Tensor, int] | None = None  # x, its version, x Q, layers that may still ask
        m, n = first.weight.shape
        self.matrix = self._random(n if self.right else m)
        for layer in layers:
            layer.basis = self
        self.aim_anywhere()

    def due(self) -> bool:
        """Whether the step after `steps` steps is a refresh."""
        gap = self.settings.update_proj_gap
        offset = self.index * gap // self.engine.count if self.settings.stagger else 0
        return self.steps == 0 or (self.steps + offset) % gap == 0

    def forget(self) -> None:
        """Drops what a step in progress has gathered."""
        self._shared = None
        self.sketch = self.candidate = None
        for layer in self.layers:
            layer.full = None

    def project(self, given: Tensor, x: Tensor, basis: Tensor) -> Tensor:
        """x Q (..., r) in x's dtype; computed once for all layers of this basis that are called with `given` in turn.

        Args:
            given: the layer's input; x is that in the dtype the layer computes in.
        """
        if len(self.layers) == 1 or torch.compiler.is_compiling():
            return _product(x, basis)
        if self._shared is not None:
            known, version, kept, left = self._shared
            if known is given and version == given._version and kept.dtype == x.dtype:
                self._shared = (known, version, kept, left - 1) if left > 1 else None
                return kept
        kept = _product(x, basis)
        self._shared = (given, given._version, kept, len(self.layers) - 1)
        return kept

    # The data of a refresh.

    def receive(self, layer: LowRankLayer, x: Tensor, gy: Tensor) -> None:
        """Adds one use of a layer in the backward pass, x (tokens, n) and gy (tokens, m), to its G or to Z.

        Raises:
            RuntimeError: a second backward pass before the step, in an exact refresh that was to have only one.
        """
        this_pass = torch._C._current_graph_task_id()
        if this_pass != self._pass and not any(_has_gradient(one.update) for one in self.layers):
            self.forget()  # gradients that were thrown away, or a pass that failed, left something
        self._pass = this_pass
        if self.settings.refresh == "exact":
            if self.candidate is not None and layer.full is None:
                raise RuntimeError(
                    "refresh='exact' has used and freed the full gradients of this step, and a second backward pass "
                    "adds to them: pass gradient_accumulation_steps, or refresh='streaming'"
                )
            grad = (gy.mT @ x).to(layer.update.dtype)
            layer.full = grad if layer.full is None else layer.full.add_(grad)
        else:
            assert layer.test_matrix is not None
            test = layer.test_matrix.to(x.device)
            part = matmul(x.mT, matmul(gy, test)) if self.right else matmul(gy.mT, matmul(x, test))
            self.sketch = part if self.sketch is None else self.sketch.add_(part)

    def gradient_added(self, layer: LowRankLayer) -> None:
        """After a backward pass has added to B's gradient: an exact refresh puts G in the new coordinates there."""
        if layer.full is None or not self.engine.gradients_complete():
            return
        # As the optimizer path takes it, from the gradient as stored: the signs of an SVD depend on that.
        stored_side = layer.side if not layer.transposed else Left() if self.right else Right()
        self.candidate = self._new_basis(layer.full.mT if layer.transposed else layer.full, stored_side)
        assert layer.update.grad is not None
        layer.update.grad.copy_(layer.side.project(layer.full, self.candidate.to(layer.full.dtype)))
        if self.settings.gradient_accumulation_steps == 1 and layer.uses <= 1:
            layer.full = None  # a shared layer under reentrant checkpointing adds to it in several passes

    def finish_sketch(self) -> None:
        """The basis for the next step from Z, summed over the ranks of a process group: its left singular vectors."""
        if self.tapping and self.settings.refresh == "streaming" and several_ranks():
            if self.sketch is None:  # a layer without tokens on this rank
                self.sketch = torch.zeros_like(self.matrix, dtype=self.work)
            dist.all_reduce(self.sketch)
        if self.sketch is not None:
            self.candidate = self._new_basis(self.sketch, Left())
            self.sketch = None

    def aim(self, moments: Sequence[Tensor]) -> None:
        """Takes the layers' U for the next refresh from the layers' first moments or low-rank gradients."""
        tall = [moment.detach().to(self.work) for moment in moments]
        tall = tall if self.right else [moment.mT for moment in tall]
        started = time.perf_counter()
        test = refresh(torch.cat(tall), self.rank, Left(), gram, None, self._seed(1))[0]
        self.seconds += time.perf_counter() - started
        self._hand_out(test)

    def aim_anywhere(self) -> None:
        """Takes random U's: for the first refresh of all."""
        self._hand_out(self._random(sum(self._heights())))

    def _heights(self) -> list[int]:
        return [layer.weight.shape[0 if self.right else 1] for layer in self.layers]

    def _hand_out(self, test: Tensor) -> None:
        for layer, part in zip(self.layers, test.split(self._heights()), strict=True):
            layer.test_matrix = part

    def _new_basis(self, matrix: Tensor, side: Side) -> Tensor:
        started = time.perf_counter()
        method = SUBSPACES[self.settings.subspace]
        basis, reason = refresh(matrix, self.rank, side, method, self.matrix, self._seed(2))
        self.seconds += time.perf_counter() - started
        if reason is not None:
            shape, step = tuple(self.layers[0].weight.shape), self.steps
            self.engine.warn(
                f"a basis refresh found that {reason} (parameter of shape {shape}, step {step}): keeping the old "
                "basis, or taking seeded random directions for what is missing"
            )
        return basis.to(self.settings.state_dtype or self.work)

    def _random(self, size: int) -> Tensor:
        like = torch.empty(size, self.rank, dtype=self.work, device=self.layers[0].weight.stored.device)
        return random(like, self.rank, Left(), None, self._seed(0, size))[0]

    def _seed(self, *purpose: int) -> int:
        return mix64(self.settings.seed, self.index, self.steps, *purpose) >> 1


def _product(x: Tensor, basis: Tensor) -> Tensor:
    with torch.no_grad():
        rows = matmul(x.reshape(-1, x.shape[-1]), basis).to(x.dtype)
        return rows.reshape(*x.shape[:-1], basis.shape[-1])


def _has_gradient(update: Tensor) -> bool:
    return update.grad is not None and bool(update.grad.any())
