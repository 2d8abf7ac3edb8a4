"""BitLinear as a PEFT method: `get_peft_model(model, BitLinearConfig())`.

    import hf_galore; hf_galore.register()
    model = get_peft_model(model, BitLinearConfig())       # trains the full weight of every linear layer, as ternary
    ...
    model.save_pretrained(folder)                          # the float32 weights that were trained, as an adapter
    model = model.merge_and_unload(weights="packed")       # modules of transformers, with 2 bits for a weight

An adapter holds whole weights, so that a model has one. Its layers are the model's own modules (`peft_layer`), and
what they were is in a temporary file (`hf_galore.nn.originals`), from which `disable_adapter`, `unload` and
`delete_adapter` take it.
"""

from copy import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from torch import Tensor, nn

from hf_galore.checks import check_choice
from hf_galore.integrations.peft_config import NAME, BitLinearConfig
from hf_galore.integrations.peft_layer import (
    BitLinearLayer,
    FormerLayer,
    Originals,
    check_layer,
    install,
    merged,
    originals_of,
    restore,
)
from hf_galore.integrations.peft_method import register_method, unregister_method
from hf_galore.integrations.peft_packed import check_packable, packed
from hf_galore.nn.convert import RESTORED, check_convertible, is_normed, share_activations
from hf_galore.nn.originals import TensorFile
from hf_galore.param_groups import ALL_LINEAR, fused_experts

MERGED = (*RESTORED, "packed")


def register() -> None:
    """Makes peft know `BitLinearConfig`. Idempotent; see `unregister`."""
    register_method(NAME, BitLinearConfig, BitLinearModel)


def unregister() -> None:
    """Restores peft exactly as it was before `register`. Does nothing if it is not registered."""
    unregister_method(NAME)


class BitLinearModel(BaseTuner):
    """Puts BitLinearLayer into a model and takes it out: the tuner that peft makes for a BitLinearConfig."""

    prefix = NAME.lower() + "_"
    tuner_layer_cls = BitLinearLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 as peft has it

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As peft's; nothing is changed if there is an error.

        Raises:
            ValueError: the model has an adapter already, a target cannot become ternary, or there is a `state_dict`.
            OSError: there is no room for the original weights.
        """
        others = [name for name in self.peft_config if name != adapter_name]
        if others:
            del self.peft_config[adapter_name]
            raise ValueError(
                f"the model has the adapter {others[0]!r} already: a BitLinear adapter holds whole weights, so that a "
                "model has one. Delete that adapter first, or load the model again"
            )
        if state_dict is not None:
            raise ValueError("the targets of BitLinear are those of its config: leave out state_dict")
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        share_activations(model)

    def _prepare_model(self, peft_config: BitLinearConfig, model: nn.Module) -> None:
        """Checks the targets and keeps what they are."""
        wanted = copy(peft_config)
        if isinstance(wanted.target_modules, str) and wanted.target_modules.lower() == ALL_LINEAR:
            _refuse_experts(model)
            wanted = _maybe_include_all_linear_layers(wanted, model)
        modules = {
            path: module
            for path, module in model.named_modules()
            if path and self._check_target_module_exists(wanted, path)
        }
        for path, module in modules.items():
            check_layer(path, module)
        _refuse_tied(model, modules)
        file = TensorFile() if peft_config.keep_original else None
        self._originals: dict[nn.Module, Originals] = {m: originals_of(m, file) for m in modules.values()}

    def _create_and_replace(
        self,
        peft_config: BitLinearConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        install(
            target,
            self._originals.pop(target),
            adapter_name,
            quantize_activations=peft_config.quantize_activations,
            use_rms_norm=is_normed(target_name, peft_config.use_rms_norm, peft_config.use_sub_norm),
            rms_norm_eps=peft_config.rms_norm_eps,
        )

    def unload(self) -> nn.Module:
        """The original model.

        Raises:
            ValueError: the original weights were not kept, and have changed.
        """
        return super().unload()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        weights: str = "master",
    ) -> nn.Module:
        """A model without peft's classes that has what was trained.

        Args:
            weights: `master`, nn.Linear with the weights that were trained, which are not ternary; `dequantized`,
                nn.Linear with what these are rounded to; both in the dtypes of before. `packed`, transformers'
                BitLinear, which computes as the trained model does.

        Raises:
            ValueError: `weights` is none of these; a layer has an RMSNorm of its own, which nn.Linear has not; a layer
                that cannot be packed; or with `safe_merge`, a weight is not finite.
        """
        check_choice("weights", weights, MERGED)
        return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names, weights)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        weights: str = "master",
    ) -> nn.Module:
        layers = {path: m for path, m in self.model.named_modules() if isinstance(m, BitLinearLayer)}
        merge = merge and all(layer.adapter in (adapter_names or layer.active_adapters) for layer in layers.values())
        if merge and weights == "packed":
            check_packable(layers)
        elif merge:
            _refuse_norms(layers)
        for layer in layers.values():
            if not merge:
                layer.original()
            elif safe_merge:
                layer.check_finite()
        for path, layer in layers.items():
            if not merge:
                restore(layer)
            elif weights == "packed":
                self.model.set_submodule(path, packed(layer))
            else:
                merged(layer, weights)
        for module in self.model.modules():
            if isinstance(module, FormerLayer):
                module.leave()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The key: those of the trained weights do not have the name of the adapter."""
        return key

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As peft's.

        Raises:
            ValueError: the layers are merged, so that their weights are not those that were trained.
        """
        if any(isinstance(module, BitLinearLayer) and module.merged for module in model.modules()):
            raise ValueError("the adapter is merged: call unmerge_adapter() before it is saved")
        return super()._get_adapter_state_dict(model, *args, **kwargs)


def _refuse_experts(model: nn.Module) -> None:
    """Raises ValueError for experts of a mixture that are in one tensor."""
    for path, module in model.named_modules():
        for name, _ in fused_experts(path, module):
            check_convertible(name, None)


def _refuse_tied(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Raises ValueError for targets whose weight is that of another module."""
    chosen = set(targets.values())
    others = {id(p): path for path, m in model.named_modules() if m not in chosen for p in m.parameters(recurse=False)}
    for path, module in targets.items():
        owner = others.get(id(module.weight))
        if owner is not None:
            raise ValueError(f"target_modules: {path!r} has the weight of {owner!r}, which would not be ternary")
        others[id(module.weight)] = path


def _refuse_norms(layers: dict[str, BitLinearLayer]) -> None:
    """Raises ValueError for layers with an RMSNorm of their own."""
    for path, layer in layers.items():
        if layer.rms_norm is not None:
            raise ValueError(
                f"{path!r} has an RMSNorm of its own (use_rms_norm, use_sub_norm) and cannot be nn.Linear; "
                "weights='packed' keeps it"
            )
