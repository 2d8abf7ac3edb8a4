"""What happens around a step in the projected backward: bases adopted, updates folded, refreshes prepared."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_galore import resume
from hf_galore.lowrank_basis import LayerBasis
from hf_galore.lowrank_layer import LowRankLayer, Settings, data_parallel_ranks
from hf_galore.lowrank_store import Change, UpdateStore
from hf_galore.subspace import rotate
from hf_galore.teamwork import divide


class Engine(Protocol):
    """What the steps ask of the projected backward they belong to."""

    model: nn.Module
    settings: Settings
    bases: list[LayerBasis]

    @property
    def layers(self) -> dict[Tensor, LowRankLayer]:
        """By B."""

    def hide(self) -> None:
        """Makes `model.parameters()` those of the plain model."""

    def warn(self, message: str) -> None:
        """Warns once for each kind of message."""


class Steps:
    """Folds and refreshes around every step, whoever takes it; the store says where B and its moments are.

    Args:
        at_once: whether the optimizer folds each step as it computes it.
    """

    def __init__(self, engine: Engine, store: UpdateStore, at_once: bool = False) -> None:
        self.engine, self.store, self.at_once = engine, store, at_once

    def before(self) -> None:
        """Before a step, with its gradients at hand."""
        for basis, stepping in self._stepping().items():
            if basis.candidate is not None:
                self._adopt(basis, basis.steps)
            for layer in stepping if not self.at_once else ():
                layer.wake()

    def after(self) -> None:
        """After a step, with its gradients still at hand where the store needs them."""
        stepping = self._stepping()
        for basis, stepped in stepping.items():
            basis.steps += 1
            for layer in stepped:
                layer.uses = 0
                if not self.at_once:
                    layer.pending = True
                    layer.decay *= self.store.decay(layer)
        self._finish_sketches(stepping)
        for basis, stepped in stepping.items():
            if basis.candidate is not None:
                self._adopt(basis, basis.steps - 1)
            basis.forget()
            if basis.steps % self.engine.settings.fold_every == 0:
                for layer in basis.layers:
                    layer.fold()
            self._aim(basis)
            for layer in stepped:
                self.store.keep(layer, kept_of(layer))

    def _stepping(self) -> dict[LayerBasis, list[LowRankLayer]]:
        """The layers that the step moves, by basis."""
        found: dict[LayerBasis, list[LowRankLayer]] = {}
        for layer in self.store.stepping():
            found.setdefault(layer.basis, []).append(layer)
        return found

    def _finish_sketches(self, bases: Iterable[LayerBasis]) -> None:
        """Ends the streaming refreshes that the step was taken in; ranks divide the work."""
        if self.engine.settings.refresh == "streaming":
            tapped = [basis for basis in bases if basis.tapping]
            for basis in tapped if self.engine.settings.source == "moment" else ():
                basis.momenta = [self.store.momentum(layer) for layer in basis.layers]
            divide(tapped, data_parallel_ranks())

    def _aim(self, basis: LayerBasis) -> None:
        """Prepares a refresh that the next step is to be taken in, if it is."""
        basis.tapping = basis.due()
        for layer in basis.layers:
            layer.test_matrix = None
        if basis.tapping and self.engine.settings.refresh == "streaming":
            basis.aim([self.store.first_moment(layer) for layer in basis.layers])

    def _adopt(self, basis: LayerBasis, step: int) -> None:
        """Puts the candidate in force: folds what is in the old coordinates, moves the moments if asked to."""
        for layer in basis.layers:
            layer.fold()
        new, old = basis.adopt(step)
        for layer in basis.layers:
            if self.engine.settings.moments == "rotate":
                self.store.change_moments(layer, _turn(layer, new, old))
            elif self.engine.settings.moments == "reset":
                self.store.reset_moments(layer)


def _turn(layer: LowRankLayer, new: Tensor, old: Tensor) -> Change:
    """What takes moments from the old basis to the new one."""
    turn = partial(rotate, new=new, old=old, side=layer.side)
    return lambda moments, bias1, bias2: turn(moments, bias1=bias1, bias2=bias2)


# What a run that goes on needs of a basis: each layer has it all, tensors only.

_BASIS = ("basis", "basis_scale")
KEPT = (*_BASIS, "basis_steps", "test_matrix", "refresh_schedule")
READ_BY_THE_HOST = ("basis_steps", "refresh_schedule")  # small, and never on a device
_NO_SCHEDULE = torch.zeros(3, dtype=torch.int64)  # what stands for a lazy schedule before the first refresh


def kept_of(layer: LowRankLayer) -> dict[str, Tensor]:
    """The layer's basis, the steps taken with it, its lazy schedule, and U if its next step is a refresh."""
    basis = layer.basis
    kept = {**basis.kept, "basis_steps": torch.tensor(float(basis.steps))}
    if basis.settings.lazy:
        kept["refresh_schedule"] = _NO_SCHEDULE.clone() if basis.lazy is None else basis.lazy
    if layer.test_matrix is not None:
        kept["test_matrix"] = layer.test_matrix
    return kept


def options_of(engine: Engine, layers: Iterable[LowRankLayer]) -> dict[str, Any]:
    """The options of the engine that a run which goes on is compared by, and the names of the layers' weights."""
    names = {module: f"{name}.weight" for name, module in engine.model.named_modules()}
    options = {name: value for name, value in vars(engine.settings).items() if name in resume.FIXED + resume.FREE}
    options["share_inputs"] = [list(siblings) for siblings in engine.settings.siblings]
    return options | {resume.TARGETS: [names[layer.module] for layer in layers]}


def check_basis(layer: LowRankLayer, kept: dict[str, Any]) -> None:
    """Raises ValueError for a state without a basis of the projected backward, or with one that is kept otherwise."""
    if "basis" not in kept or "basis_steps" not in kept:
        raise resume.refused("the state has no basis of the projected backward: another optim wrote it")
    saved, ours = kept["basis"], layer.basis.kept["basis"]
    if saved.dtype != ours.dtype and not (saved.dtype.is_floating_point and ours.dtype.is_floating_point):
        raise resume.refused(
            f"basis_dtype: a basis was saved as {saved.dtype}, and this model keeps it as {ours.dtype}"
        )
    if saved.shape != ours.shape:
        raise resume.refused(
            f"a basis was saved with shape {tuple(saved.shape)}, and this run's has shape {tuple(ours.shape)}: rank, "
            "proj_type or target modules are others"
        )


def restore(layer: LowRankLayer, kept: dict[str, Any]) -> None:
    """Makes the layer go on from what `kept_of` gave."""
    basis = layer.basis
    if "basis" in kept:
        basis.kept = {name: kept[name] for name in _BASIS if name in kept}
        basis.steps, schedule = int(kept["basis_steps"]), kept.get("refresh_schedule")
        basis.lazy = schedule if schedule is not None and schedule.any() else None
        layer.test_matrix = kept.get("test_matrix")
        basis.tapping = basis.due()


def aim_if_lost(basis: LayerBasis, store: UpdateStore) -> None:
    """After all layers and moments have been restored: the U's of a refresh that is next, from the moments again."""
    if basis.tapping and any(layer.test_matrix is None for layer in basis.layers):
        basis.aim([store.first_moment(layer) for layer in basis.layers])
