"""The basis of a layer of the projected backward, or of several layers that share one input, and its refreshes."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_galore import schedule
from hf_galore.bases import gram, method_at, normal, random, seeded
from hf_galore.basis_store import State, basis_format
from hf_galore.link import Link
from hf_galore.lowrank_layer import LowRankLayer, Settings, data_parallel_ranks
from hf_galore.lowrank_store import Momentum
from hf_galore.messages import unfit_gradient
from hf_galore.ops import matmul
from hf_galore.rounding import mix64
from hf_galore.sides import Left, Right, Side
from hf_galore.statistics import Observer, SubspaceStatistics, shared, statistics_of, turned
from hf_galore.subspace import align, refresh

_PROBES = 16  # random directions that the statistics of a sketch are estimated with
_FIRST_REFRESHES = 16  # steps over which the first streaming refreshes are spread if they are staggered


class Steering(Protocol):
    """What a basis asks of the engine it belongs to."""

    settings: Settings
    gradients_complete: Callable[[], bool]
    observe: Observer | None

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
        self.steps, self.tapping, self.seconds = 0, False, 0.0
        self._last_seconds = 0.0  # of the last refresh
        self.lazy: Tensor | None = None  # the schedule of `hf_galore.schedule.postponed`
        self.sketch: Tensor | None = None  # Z, in a streaming refresh
        self.momenta: Sequence[Momentum] | None = None  # of the layers, if they are to be mixed with Z
        self._made: Tensor | None = None  # the basis of Z
        self.candidate: State | None = None  # the basis that is to be adopted, as it is kept
        self._found: SubspaceStatistics | None = None  # of the candidate, where the engine is observed
        self._sent: tuple[State, Tensor] | None = None  # what was kept, and the basis of it on the device
        self._pass = -1  # the backward pass that added last
        self._shared: tuple[Tensor, int, Tensor, int] | None = None  # x, its version, x Q, layers that may still ask
        m, n = first.weight.shape
        rows = n if self.right else m
        self._format = basis_format(self.settings.basis_dtype, self.settings.state_dtype, rows, self.work)
        self.kept: State = self._format.encode(self._random(rows))
        for layer in layers:
            layer.basis, layer.test_matrix = self, None

    def start(self) -> None:
        """Before the first step, when all bases are known."""
        self.tapping = self.due()
        if self.tapping:
            self.aim_anywhere()

    def to(self, device: torch.device) -> None:
        """Moves the basis, and U's that have been handed out, to where the layers are now."""
        self.kept = {name: value.to(device) for name, value in self.kept.items()}
        for layer in self.layers:
            layer.test_matrix = None if layer.test_matrix is None else layer.test_matrix.to(device)

    @property
    def matrix(self) -> Tensor:
        """Q or P, the basis in force."""
        return self._format.decode(self.kept)

    def on(self, device: torch.device, link: Link | None) -> Tensor:
        """The basis in force on the device; through the link if there is one, and then once for each basis."""
        if link is None:
            return self.matrix.to(device)
        if self._sent is None or self._sent[0] is not self.kept or self._sent[1].device != device:
            self._sent = (self.kept, link.send(self.matrix))
        return self._sent[1]

    @property
    def _early(self) -> int:
        return self._share_of(self.settings.update_proj_gap)

    def _share_of(self, steps: int) -> int:
        return schedule.offset(self.index, self.engine.count, steps, bool(self.settings.stagger))

    def due(self) -> bool:
        """Whether the step after `steps` steps is a refresh."""
        settings, first = self.settings, 0
        if settings.refresh == "streaming":
            first = self._share_of(min(_FIRST_REFRESHES, settings.update_proj_gap))
        return schedule.due(self.steps, settings.update_proj_gap, self._early, self.lazy, first)

    def adopt(self, step: int) -> tuple[Tensor, Tensor]:
        """Puts the candidate of a refresh in this step in force; the new basis and the old, in working precision."""
        assert self.candidate is not None
        if self._found is not None and self.engine.observe is not None:
            self.engine.observe(self.layers[0].update, self._found)
        self._found = None
        old, self.kept, self.candidate = self.matrix.to(self.work), self.candidate, None
        new = self.matrix.to(self.work)
        if self.settings.lazy:
            gap, before = self.settings.update_proj_gap, None if self.lazy is None else old  # the first is random
            self.lazy = schedule.postponed(self.lazy, step, gap, self._early, new, before)
        return new, old

    def forget(self) -> None:
        """Drops what a step in progress has gathered."""
        self._shared = None
        self.sketch = self.momenta = self.candidate = self._found = None
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
        if this_pass != self._pass and not any(one.storage.has_gradient(one) for one in self.layers):
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
            test = layer.test_matrix if layer.link is None else layer.link.send(layer.test_matrix)
            test = test.to(device=x.device, dtype=self.work)
            one, other = (x, gy) if self.right else (gy, x)
            part = matmul(one.mT, matmul(other, test))
            if self.engine.observe is not None:  # products of their own: wider ones may round otherwise
                part = torch.cat((part, matmul(one.mT, matmul(other, self._probes(layer, test)))), dim=1)
            self.sketch = part if self.sketch is None else self.sketch.add_(part)

    def gradient_added(self, layer: LowRankLayer) -> None:
        """After a backward pass has added to B's gradient: an exact refresh puts G in the new coordinates there."""
        if layer.full is None or not self.engine.gradients_complete():
            return
        # As the optimizer path takes it, from the gradient as stored: the signs of an SVD depend on that.
        stored_side = layer.side if not layer.transposed else Left() if self.right else Right()
        made = self._new_basis(layer.full.mT if layer.transposed else layer.full, stored_side)
        self.candidate = self._format.encode(made)
        assert layer.update.grad is not None
        basis = self._format.decode(self.candidate)
        layer.update.grad.copy_(layer.side.project(layer.full, basis.to(layer.full.dtype)))
        if self.engine.observe is not None:
            new, old = basis.to(self.work), self.matrix
            self._found = statistics_of(layer.full, layer.side, new, old, self.steps, self._last_seconds)
        if self.settings.gradient_accumulation_steps == 1 and layer.uses <= 1:
            layer.full = None  # a shared layer under reentrant checkpointing adds to it in several passes

    # The end of a streaming refresh, a job of `divide`: the basis for the next step from Z, summed over all ranks.

    @property
    def cost(self) -> int:
        return self.rank * self.layers[0].weight.shape[1 if self.right else 0]

    def gather(self, rank: int, me: int) -> None:
        team = data_parallel_ranks()
        if team is not None:
            if self.sketch is None:  # a layer without tokens on this rank
                width = self.rank + (_PROBES if self.engine.observe is not None else 0)
                self.sketch = self.matrix.new_zeros(self.matrix.shape[0], width, dtype=self.work)
            dist.reduce(self.sketch, rank, group=team)

    def make(self) -> None:
        """The left singular vectors of Z, and what an observer is told of them."""
        if self.sketch is None:
            return
        link = self.layers[0].link
        if link is not None:
            self.sketch = link.receive(self.sketch)
        self.sketch, probed = self.sketch[:, : self.rank].contiguous(), self.sketch[:, self.rank :]
        if self.momenta is not None:
            self._add_momenta(self.momenta)
        self._made = self._new_basis(self.sketch, Left())
        if self.engine.observe is not None:
            self._found = self._estimated(self._format.decode(self._format.encode(self._made)).to(self.work), probed)

    def hand_out(self, rank: int, me: int) -> None:
        team = data_parallel_ranks()
        if team is not None:
            assert self.sketch is not None
            device = self.sketch.device  # where the layer computes, which offloaded states do not
            if self._made is None:
                self._made = torch.empty_like(self.matrix, dtype=self.work, device=device)
            self._made = self._made.contiguous()
            dist.broadcast(self._made, rank, group=team)
            if self.engine.observe is not None:
                self._found = shared(self._found, team, rank, device)
        if self._made is not None:
            self.candidate = self._format.encode(self._made.to(self.kept["basis"].device))
        self.sketch = self.momenta = self._made = None

    def _add_momenta(self, momenta: Sequence[Momentum]) -> None:
        """Z ← (1 − β)·Z + Q (β·M)ᵀ U with the M before the step: the sketch of the first moment after it.

        Z is of gradients as the backward pass made them, M of gradients that were clipped, unscaled and averaged over
        ranks since: the factor between the two is that between QᵀZ and RᵀU.
        """
        assert self.sketch is not None
        basis = self.matrix.to(self.sketch)
        after = torch.cat([self._tall(momentum.after) for momentum in momenta]).to(self.sketch)
        low = torch.cat([self._tall(momentum.low) for momentum in momenta]).to(self.sketch)
        test = torch.cat([part for layer in self.layers if (part := layer.test_matrix) is not None]).to(self.sketch)
        beta = momenta[0].beta
        seen, meant = basis.mT @ self.sketch, low.mT @ test
        factor = (seen * meant).sum() / seen.square().sum().clamp_(min=torch.finfo(self.work).tiny)
        carried = basis @ ((after - (1.0 - beta) * low).mT @ test)
        self.sketch = self.sketch.mul_((1.0 - beta) * factor).add_(carried)

    def _tall(self, low_rank: Tensor) -> Tensor:
        """A low-rank matrix in working precision with the basis's directions as its columns."""
        values = low_rank.detach().to(self.work)
        return values if self.right else values.mT

    def _probes(self, layer: LowRankLayer, test: Tensor) -> Tensor:
        """A layer's rows of a few columns of normal numbers, the same in all passes and on all ranks of a step."""
        return normal((test.shape[0], _PROBES), test, seeded(self._seed(3, layer.index)))

    def _estimated(self, new: Tensor, probed: Tensor) -> SubspaceStatistics:
        """The statistics of a streaming refresh, from the image GᵀΩ (n, s) of normal numbers.

        ‖G Q‖²/‖G‖² is about ‖QᵀGᵀΩ‖²/‖GᵀΩ‖². The stable rank is not known: Z says too little of ‖G‖₂.
        """
        image = probed.to(self.work)
        whole = float(image.square().sum())
        kept = float((new.mT @ image).square().sum())
        energy = kept / whole if whole > 0 else float("nan")
        turn = turned(new, self.matrix, Left(), new.shape)
        return SubspaceStatistics(self.steps - 1, energy, turn, float("nan"), self._last_seconds)

    def aim(self, moments: Sequence[Tensor]) -> None:
        """Takes the layers' U for the next refresh from the layers' first moments or low-rank gradients."""
        tall = [self._tall(moment) for moment in moments]
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
            layer.test_matrix = part.to(self.settings.state_dtype or self.work)

    def _new_basis(self, matrix: Tensor, side: Side) -> Tensor:
        started = time.perf_counter()
        settings, old = self.settings, self.matrix.to(self.work)
        method = method_at(settings.subspace, self.steps, settings.random_from)
        basis, reason = refresh(matrix, self.rank, side, method, old, self._seed(2))
        if settings.moments == "align":
            basis = align(basis, old)
        self._last_seconds = time.perf_counter() - started
        self.seconds += self._last_seconds
        if reason is not None:
            self.engine.warn(unfit_gradient(reason, self.layers[0].weight.shape, self.steps))
        return basis

    def _random(self, size: int) -> Tensor:
        device = self.layers[0].own_update.device
        like = torch.empty(size, self.rank, dtype=self.work, device="cpu" if device.type == "meta" else device)
        return random(like, self.rank, Left(), None, self._seed(0, size))[0]

    def _seed(self, *purpose: int) -> int:
        return mix64(self.settings.seed, self.index, self.steps, *purpose) >> 1


def _product(x: Tensor, basis: Tensor) -> Tensor:
    with torch.no_grad():
        rows = matmul(x.reshape(-1, x.shape[-1]), basis).to(x.dtype)
        return rows.reshape(*x.shape[:-1], basis.shape[-1])
