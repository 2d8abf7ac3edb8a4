"""BitLinear as a PEFT method: `get_peft_model(model, BitLinearConfig())`.

    import hf_galore; hf_galore.register()
    model = get_peft_model(model, BitLinearConfig())       # trains the full weight of every linear layer, as ternary
    ...
    model.save_pretrained(folder)                          # the float32 weights that were trained, as an adapter
    model = model.merge_and_unload(weights="packed")       # modules of transformers, with 2 bits for a weight

An adapter holds whole weights, so that a model has one that trains. Its layers are the model's own modules
(`peft_layer`), and what they were is in a temporary file (`hf_galore.nn.originals`), from which `disable_adapter`,
`unload` and `delete_adapter` take it.

Further adapters are frozen copies of what it computes when they are added, in two bits a weight:

    model.add_adapter("ref", model.peft_config["default"])

TRL's trainers of preferences and rewards do that, and have their reference model in it.
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.integrations import is_fsdp_enabled

from hf_galore.checks import check_choice
from hf_galore.experts import fused_experts
from hf_galore.integrations.peft_config import NAME, BitLinearConfig, is_copy
from hf_galore.integrations.peft_layer import (
    COPIES,
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
from hf_galore.nn.convert import RESTORED, called, check_convertible, check_untied, is_normed, share_activations
from hf_galore.nn.frozen_copy import FrozenCopy
from hf_galore.nn.originals import TensorFile
from hf_galore.param_groups import all_linear, is_all_linear

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
            ValueError: the model has an adapter already and this is no frozen copy of it, a target cannot become
                ternary, or there is a `state_dict`.
            OSError: there is no room for the original weights.
        """
        first = next(iter(self.peft_config))
        if first != adapter_name and not is_copy(self.peft_config[adapter_name], self.peft_config[first]):
            del self.peft_config[adapter_name]
            raise ValueError(
                f"the model has the adapter {first!r} already: a BitLinear adapter holds whole weights, so that a "
                "model has one that trains. For another, load the model again. For a frozen copy of the one there is, "
                f"add_adapter({adapter_name!r}, model.peft_config[{first!r}])"
            )
        if state_dict is not None:
            raise ValueError("the targets of BitLinear are those of its config: leave out state_dict")
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        if first == adapter_name:
            share_activations(model)
        else:
            _copy_modules_to_save(model, first, adapter_name)

    def _prepare_model(self, peft_config: BitLinearConfig, model: nn.Module) -> None:
        """Checks the targets and keeps what they are; for a frozen copy, that they can be copied.

        "all-linear" is what it is in all of hf_galore.
        """
        layers = {path: m for path, m in model.named_modules() if isinstance(m, BitLinearLayer)}
        if layers:
            _refuse_uncopied(layers)
            return
        wanted = peft_config.target_modules
        everything = isinstance(wanted, str) and is_all_linear(wanted)
        if everything:
            _refuse_experts(model)
            peft_config.target_modules = sorted(all_linear(model))
            if not peft_config.target_modules:
                raise ValueError(
                    f"target_modules={wanted!r}: {type(model).__name__} has no nn.Linear, but for its heads"
                )
        modules = {
            path: module
            for path, module in model.named_modules()
            if path and self._check_target_module_exists(peft_config, path)
        }
        kept = called(model, list(modules), everything)
        if everything:
            peft_config.target_modules = kept
            modules = {path: modules[path] for path in kept}
        for path, module in modules.items():
            check_layer(path, module)
        check_untied(model, modules)
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
        if isinstance(target, BitLinearLayer):
            target.freeze(adapter_name)
            return
        install(
            target,
            self._originals.pop(target),
            adapter_name,
            quantize_activations=peft_config.quantize_activations,
            use_rms_norm=is_normed(target_name, peft_config.use_rms_norm, peft_config.use_sub_norm),
            rms_norm_eps=peft_config.rms_norm_eps,
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """As peft's.

        Raises:
            ValueError: the original is not known, or there are copies of the adapter.
        """
        copies = [name for layer in self._layers().values() if layer.adapter == adapter_name for name in layer.frozen]
        if copies:
            raise ValueError(f"{adapter_name!r} has the frozen copy {copies[0]!r}: delete that adapter first")
        super().delete_adapter(adapter_name)

    def _layers(self) -> dict[str, BitLinearLayer]:
        return {path: m for path, m in self.model.named_modules() if isinstance(m, BitLinearLayer)}

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
                that cannot be packed; the adapter is a frozen copy; or with `safe_merge`, a weight is not finite.
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
        layers = self._layers()
        chosen = {name for layer in layers.values() for name in (adapter_names or layer.active_adapters)}
        copies = sorted({name for layer in layers.values() for name in layer.frozen} & chosen)
        if merge and copies:
            raise ValueError(
                f"{copies[0]!r} is a frozen copy, which is not merged: set_adapter to the one that trains"
            )
        merge = merge and all(layer.adapter in chosen for layer in layers.values())
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

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel around the PeftModel does not send: copies, which never change, in every call.

        torch asks the module that it wraps, and a PeftModel asks this.
        """
        copies = [f"base_model.{name}" for name, _ in self.named_buffers() if f".{COPIES}." in name]
        return [*getattr(self.model, "_ddp_params_and_buffers_to_ignore", ()), *copies]

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The key: those of the trained weights do not have the name of the adapter."""
        return key

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: BitLinearConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """As peft's; of a copy, what it holds.

        Raises:
            ValueError: the layers are merged, so that their weights are not those that were trained.
        """
        if any(isinstance(module, BitLinearLayer) and module.merged for module in model.modules()):
            raise ValueError("the adapter is merged: call unmerge_adapter() before it is saved")
        copies = _copies(model, adapter_name)
        if copies:
            return {f"{path}.{name}": value for path, kept in copies.items() for name, value in kept.values().items()}
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BitLinearConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As peft's; what is of a copy is loaded here, as it is no part of the model's state dict.

        Raises:
            ValueError: a file of a copy is loaded as the adapter that trains, or the other way round, or it is of
                other layers.
        """
        copies = _copies(model, adapter_name)
        in_file = {key for key in state_dict if f".{COPIES}." in key}
        if in_file and not copies:
            raise ValueError(f"{adapter_name!r}: the file has a frozen copy, and no weights that could be trained")
        if copies and not in_file:
            raise ValueError(f"{adapter_name!r} is a frozen copy here, and the file has weights that were trained")
        for path, kept in copies.items():
            start = f"{path}."
            kept.load({key.removeprefix(start): state_dict[key] for key in in_file if key.startswith(start)})
        others = {key: value for key, value in state_dict.items() if key not in in_file}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, others)


def _copies(model: nn.Module, adapter: str) -> dict[str, FrozenCopy]:
    """The copies of the adapter by what they are called in its file; none for the adapter that trains."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, BitLinearLayer) and adapter in m.frozen}
    return {f"{path}.{COPIES}": layer.frozen[adapter] for path, layer in layers.items()}


def _copy_modules_to_save(model: nn.Module, source: str, target: str) -> None:
    """Gives an adapter the values of another's modules_to_save, where peft put those of the original."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and target in module.modules_to_save:
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())


def _refuse_uncopied(layers: dict[str, BitLinearLayer]) -> None:
    """Raises ValueError for layers of which two bits a weight do not say what they compute, or that are not here."""
    if is_fsdp_enabled():
        raise ValueError(
            "FSDP_CPU_RAM_EFFICIENT_LOADING: ranks other than the first have no weights yet that a frozen copy could "
            "be made of; set it to false"
        )
    for path, layer in layers.items():
        if layer.weight_lambda != 1 or layer.activation_lambda != 1:
            raise ValueError(
                f"{path!r} has weight_lambda={layer.weight_lambda}, activation_lambda={layer.activation_lambda}: a "
                "frozen copy holds two bits a weight, those of a layer with 1 and 1. Set these (set_lambdas), or give "
                "TRL's trainer (DPO, KTO) a second model with the adapter as ref_model=second.get_base_model()"
            )


def _refuse_experts(model: nn.Module) -> None:
    """Raises ValueError for experts of a mixture that are in one tensor."""
    for path, module in model.named_modules():
        for name in fused_experts(module):
            check_convertible(f"{path}.{name}", None)


def _refuse_norms(layers: dict[str, BitLinearLayer]) -> None:
    """Raises ValueError for layers with an RMSNorm of their own."""
    for path, layer in layers.items():
        if layer.rms_norm is not None:
            raise ValueError(
                f"{path!r} has an RMSNorm of its own (use_rms_norm, use_sub_norm) and cannot be nn.Linear; "
                "weights='packed' keeps it"
            )
