"""The explicit attention bias as a PEFT method: `get_peft_model(model, AttentionBiasConfig())`.

    import hf_galore; hf_galore.register()
    model = get_peft_model(model, AttentionBiasConfig())   # trains k', v' and a gate of every attention
    ...
    model.save_pretrained(folder)                          # an adapter of a few kilobytes

A model may have several such adapters, of which one is active. They are merged only where a model has sinks of its
own, as gpt-oss, and the adapter has trained nothing else.
"""

from copy import copy
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn

from hf_galore.attention.bias import AttentionBias
from hf_galore.integrations.attention_bias import CHILD, check_targets, install, uninstall
from hf_galore.integrations.attention_modules import ALL_ATTENTION, attention_modules, heads_of
from hf_galore.integrations.peft_attention_bias_config import NAME, AttentionBiasConfig
from hf_galore.integrations.peft_attention_bias_layer import AttentionBiasLayer
from hf_galore.integrations.peft_method import register_method, unregister_method


def register() -> None:
    """Makes peft know `AttentionBiasConfig`. Idempotent; see `unregister`."""
    register_method(NAME, AttentionBiasConfig, AttentionBiasModel)


def unregister() -> None:
    """Restores peft exactly as it was before `register`. Does nothing if it is not registered."""
    unregister_method(NAME)


class AttentionBiasModel(BaseTuner):
    """Puts columns on a model's attention and takes them off: the tuner that peft makes for an AttentionBiasConfig."""

    prefix = AttentionBiasLayer.prefix
    tuner_layer_cls = AttentionBiasLayer
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
            ValueError: the attention of the model cannot be reached, a target is none, or there is a `state_dict`.
        """
        if state_dict is not None:
            raise ValueError("the targets of an attention bias are those of its config: leave out state_dict")
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def _prepare_model(self, peft_config: AttentionBiasConfig, model: nn.Module) -> None:
        """Finds the targets, and checks that columns can be put on them."""
        found = self._found = attention_modules(model)
        self._wanted, self._everything = copy(peft_config), peft_config.target_modules == ALL_ATTENTION
        if self._everything:
            self._wanted.target_modules = list({path.rpartition(".")[2] for path in found})
        paths = [path for path, _ in model.named_modules() if path]
        chosen = [path for path in paths if self._check_target_module_exists(self._wanted, path)]
        for path in chosen:
            if path not in found:
                raise ValueError(f"target_modules: {path!r} is no attention module; there are {', '.join(found)}")
        fresh = {
            path: found[path]
            for path in chosen
            if not isinstance(getattr(found[path], CHILD, None), AttentionBiasLayer)
        }
        check_targets(model, fresh)
        self._dtype: Any = model.dtype

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        return (key in self._found or not self._everything) and check_target_module_exists(self._wanted, key)

    def _create_and_replace(
        self,
        peft_config: AttentionBiasConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not hasattr(target, CHILD):
            install(target, AttentionBiasLayer(target, heads_of(current_key, target)))
        layer: Any = getattr(target, CHILD)
        options = {name: getattr(peft_config, name) for name in ("kind", "start", "n", "std")}
        layer.kv_columns[adapter_name] = AttentionBias(layer.heads, **options, device=layer.device, dtype=self._dtype)
        layer.set_adapter(self.active_adapters)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = [module for module in self.model.modules() if isinstance(module, AttentionBiasLayer)]
        for layer in layers:
            for name in adapter_names or layer.active_adapters:
                if merge and name in layer.kv_columns:
                    layer.check_mergeable(name)
        for layer in layers:
            if merge:
                layer.merge(safe_merge, adapter_names)
            else:
                layer.unmerge()
            uninstall(layer.attention)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
