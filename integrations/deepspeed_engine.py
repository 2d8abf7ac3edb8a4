"""DeepSpeed's engine with the projected backward: what a step, a checkpoint and a consolidated state dict add.

Only methods of this one engine are wrapped. All of them are collective calls, as DeepSpeed's own are.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import register_external_parameter
from torch import Tensor

from hf_galore import resume
from hf_galore.frozen_weight import PlainWeight
from hf_galore.integrations.deepspeed_zero import ShardedWeight, ZeroStorage, ZeroStore, partitioned
from hf_galore.lowrank_backward import LowRankBackward
from hf_galore.lowrank_steps import READ_BY_THE_HOST, Steps, aim_if_lost, check_basis, kept_of, options_of, restore

BASES = "hf_galore_bases.pt"  # in the folder of a checkpoint, beside DeepSpeed's own files
_FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # of ZeRO-1 and 2, of ZeRO-3
_PADDINGS = "param_alignment_paddings"


def attach(engine: LowRankBackward, deepspeed: Any, numbers: dict[Tensor, int]) -> None:
    """Makes every step of DeepSpeed's engine fold and refresh, and its checkpoints those of the plain model.

    Args:
        numbers: the parameter group of each parameter.
    """
    layers = list(engine.layers.values())
    for layer in layers:
        layer.storage = ZeroStorage()
        if partitioned(layer.update):
            assert isinstance(layer.weight, PlainWeight)  # codes have been refused
            layer.weight = ShardedWeight(layer.weight)
    for basis in engine.bases:
        basis.to(deepspeed.device)
    if partitioned(layers[0].update):
        _make_found(engine, deepspeed)
    store = ZeroStore(layers, deepspeed.optimizer, numbers)
    _wrap(deepspeed, "step", _Step(engine, deepspeed, store))
    Checkpoints(engine, deepspeed, store, {numbers[layer.update] for layer in layers})


def _make_found(engine: LowRankBackward, deepspeed: Any) -> None:
    """Lets ZeRO-3 find hidden parameters: one by one around the module that uses them, and all after a step."""
    for layer, module in engine.members():
        register_external_parameter(module, layer.update)
    _wrap(deepspeed.optimizer.parameter_offload, "partition_all_parameters", partial(_shown, engine))
    _wrap(deepspeed, "parameters", partial(_shown_list, engine))


def _shown(engine: LowRankBackward, original: Callable[[], None]) -> None:
    with engine.shown():
        original()


def _shown_list(engine: LowRankBackward, original: Callable[..., Iterator[Tensor]], *args: Any) -> Iterator[Tensor]:
    """Parameters of DeepSpeed's engine, the small ones too: who generates without ZeRO-3's hooks gathers these."""
    if not engine.installed:  # training is over
        return original(*args)
    with engine.shown():
        return iter(list(original(*args)))


def _wrap(holder: Any, name: str, around: Callable[..., Any]) -> None:
    """Puts `around(original, *args)` in the place of a method, under its signature."""
    original = getattr(holder, name)
    setattr(holder, name, functools.wraps(original)(functools.partial(around, original)))


class _Step:
    """A call of `step`: whether it was a step, and then what comes after one."""

    def __init__(self, engine: LowRankBackward, deepspeed: Any, store: ZeroStore) -> None:
        self.engine, self.deepspeed, self.store = engine, deepspeed, store
        self.steps = Steps(engine, store)

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        skipped = self.deepspeed.skipped_steps
        self.store.note_rates()
        result = original(*args, **kwargs)
        if self.deepspeed.was_step_applied():
            with torch.no_grad():
                self.steps.after()
        elif self.deepspeed.skipped_steps > skipped:  # its gradients were not finite
            for basis in self.engine.bases:
                basis.forget()
        return result


class Checkpoints:
    """Checkpoints that hold the folded model under its own names, and the bases in a file of their own.

    Args:
        small: the parameter groups of the small parameters. They are zero in a checkpoint: they are left out of it,
            so that zero_to_fp32 finds the plain model, and put back when it is loaded.
    """

    def __init__(self, engine: LowRankBackward, deepspeed: Any, store: ZeroStore, small: set[int]) -> None:
        self.engine, self.deepspeed, self.store, self.small = engine, deepspeed, store, small
        _wrap(deepspeed, "save_checkpoint", self.save)
        _wrap(deepspeed, "load_checkpoint", self.load)
        _wrap(deepspeed.optimizer, "state_dict", self.without_small)
        _wrap(deepspeed.optimizer, "load_state_dict", self.with_small)
        if partitioned(next(iter(engine.layers))):
            _wrap(deepspeed, "_zero3_consolidated_16bit_state_dict", self.consolidated)

    def save(
        self,
        original: Callable[..., Any],
        save_dir: Any,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """DeepSpeed's method on the folded model, frozen weights included always: they are what trains here."""
        self.engine.fold()
        tag = str(tag or f"global_step{self.deepspeed.global_steps}")
        local = self.deepspeed.use_node_local_storage()
        if (self.deepspeed.local_rank if local else self.deepspeed.global_rank) == 0:
            folder = Path(save_dir) / tag
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self._bases(), folder / BASES)
        with self._installed():
            return original(save_dir, tag, {**(client_state or {}), **self._shapes()}, save_latest)

    def load(self, original: Callable[..., Any], load_dir: Any, tag: Any = None, *args: Any, **options: Any) -> Any:
        """DeepSpeed's method, and the bases where it loads the optimizer's state.

        Raises:
            ValueError: the checkpoint is not one of a run like this.
            RuntimeError: it is one of another number of ranks.
        """
        names = ("load_module_strict", "load_optimizer_states", "load_lr_scheduler_states", "load_module_only")
        options |= dict(zip(names, args, strict=False))
        if options.get("load_module_only") or not options.get("load_optimizer_states", True):
            return original(load_dir, tag, **options)
        if self.deepspeed.load_universal_checkpoint():
            raise ValueError("load_universal=True does not know the bases; load the checkpoint that it was made of")
        latest = Path(load_dir) / "latest"
        if tag is None and not latest.is_file():
            return original(load_dir, tag, **options)  # says so itself
        tag = str(tag or latest.read_text().strip())
        kept = self._read(Path(load_dir) / tag)
        with self._installed():
            loaded = original(load_dir, tag, **options)
        self._restore(kept)
        return loaded

    def _bases(self) -> dict[str, Any]:
        layers = [
            {name: value.cpu() for name, value in kept_of(layer).items()} for layer in self.engine.layers.values()
        ]
        options = options_of(self.engine, self.engine.layers.values())
        return {"ranks": dist.get_world_size(), "options": options, "layers": layers}

    def _read(self, folder: Path) -> list[dict[str, Tensor]]:
        file = folder / BASES
        if not file.is_file():
            raise ValueError(
                f"resume_from_checkpoint: {folder} has no {BASES}: no run of the projected backward under DeepSpeed "
                "wrote it, or not to its end. Start from its weights instead: load them as the model"
            )
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["ranks"] != dist.get_world_size():
            raise RuntimeError(
                f"resume_from_checkpoint: {folder} was written by {saved['ranks']} ranks and this run has "
                f"{dist.get_world_size()}, for which DeepSpeed cannot divide the optimizer's state again. Resume with "
                f"{saved['ranks']} ranks, or start from the checkpoint's weights (its model files, or zero_to_fp32.py)"
            )
        layers = list(self.engine.layers.values())
        ours, before = options_of(self.engine, layers), saved.get("options", {})
        groups = [{"params": layers, resume.BACKWARD: ours}], [{"params": saved["layers"], resume.BACKWARD: before}]
        resume.check_groups(*groups)
        found = resume.changes(ours, before)
        for layer, kept in zip(layers, saved["layers"], strict=True):
            check_basis(layer, kept)
        resume.tell(found)
        return [resume.with_schedule(kept, ours, before) for kept in saved["layers"]]

    def _restore(self, layers: list[dict[str, Tensor]]) -> None:
        for layer, kept in zip(self.engine.layers.values(), layers, strict=True):
            layer.basis.forget()
            device = self.deepspeed.device
            restore(layer, {n: value if n in READ_BY_THE_HOST else value.to(device) for n, value in kept.items()})
        for basis in self.engine.bases:
            aim_if_lost(basis, self.store)

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """Training may be over and the model its user's own: DeepSpeed's engine still has the small parameters."""
        absent = not self.engine.installed
        if absent:
            self.engine.install()
        try:
            with self.engine.shown():
                yield
        finally:
            if absent:
                self.engine.uninstall()

    # What DeepSpeed's tools read of a checkpoint.

    def _shapes(self) -> dict[str, Any]:
        """What zero_to_fp32 needs: shapes without the small parameters, and the frozen weights also of ZeRO-1."""
        engine, stage = self.deepspeed, self.deepspeed.zero_optimization_stage()
        shapes = engine._get_zero_param_shapes()
        groups = self._groups()
        state = {"param_shapes": [one for one, group in zip(shapes, groups, strict=True) if group not in self.small]}
        if stage == 1:
            state["frozen_param_shapes"] = engine._get_zero_frozen_param_attributes(engine._get_param_shape_func)
            state["frozen_param_fragments"] = engine._get_zero_frozen_param_attributes(engine._get_param_fragment_func)
        return state

    def consolidated(self, original: Callable[..., Any], exclude_frozen_parameters: bool = False) -> Any:
        """DeepSpeed's method on the folded model, frozen weights included always."""
        self.engine.fold()
        return original()

    def without_small(self, original: Callable[..., Any]) -> dict[str, Any]:
        """The state of DeepSpeed's optimizer without the flat partitions of small parameters."""
        state: dict[str, Any] = original()
        for name in {*_FLAT, _PADDINGS} & state.keys():
            state[name] = [
                one for one, group in zip(state[name], self._groups(), strict=True) if group not in self.small
            ]
        return state

    def with_small(self, original: Callable[..., Any], state_dict_list: list[Any], **options: Any) -> None:
        """Loads states that `without_small` gave."""
        ours = {name: [torch.zeros_like(flat) for flat in self._partitions()] for name in _FLAT}
        ours[_PADDINGS] = getattr(self.deepspeed.optimizer, "round_robin_bit16_padding", [])
        for state in filter(None, state_dict_list):
            for name in ours.keys() & state.keys():
                saved = iter(state[name])
                state[name] = [
                    one if group in self.small else next(saved)
                    for one, group in zip(ours[name], self._groups(), strict=True)
                ]
        original(state_dict_list=state_dict_list, **options)

    def _partitions(self) -> list[Tensor]:
        zero = self.deepspeed.optimizer
        return list(getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups)

    def _groups(self) -> list[int]:
        """The parameter group of each flat partition: of each group there are several in ZeRO-3."""
        known = getattr(self.deepspeed.optimizer, "sub_group_to_group_id", None)
        return [index if known is None else known[index] for index in range(len(self._partitions()))]
