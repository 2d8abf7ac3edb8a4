"""The layer of the explicit attention bias as a PEFT method: the columns of one attention module, by adapter."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from hf_galore.attention.bias import Columns, Heads


class AttentionBiasLayer(nn.Module, BaseTunerLayer):
    """The columns of one attention module, by adapter: the child that the attention asks for its bias."""

    prefix = "kv_columns"  # by which transformers finds our parameters in a file, and not the module that has them
    adapter_layer_names = (prefix,)
    kv_columns: nn.ModuleDict
    active_adapters: list[str]

    def __init__(self, attention: nn.Module, heads: Heads) -> None:
        super().__init__()
        self.kv_columns = nn.ModuleDict()
        self.heads = heads
        self.device = next(attention.parameters()).device
        self._attention = (attention,)  # in a tuple, so that it is no child
        self._unmerged: Tensor | None = None

    @property
    def attention(self) -> Any:
        """The module whose child this is."""
        return self._attention[0]

    def forward(self, device: torch.device) -> Columns | None:
        """The columns of the active adapter; None if there is none here, it is disabled or it is merged."""
        names = [name for name in self.active_adapters if name in self.kv_columns]
        if self.disable_adapters or self.merged or not names:
            return None
        columns: Columns = self.kv_columns[names[0]](device)
        return columns

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As peft's.

        Raises:
            ValueError: several at once.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"one attention bias is active at a time, not {', '.join(adapter_names)}")
        super().set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds learned sinks to the sinks that the attention has: log(exp(sink) + Σ_j exp(logit_j)), exactly.

        Raises:
            ValueError: there is no such weight, or with `safe_merge` the result is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.kv_columns:
                bias = self.check_mergeable(name)
                sinks = self.attention.sinks
                added = bias.logit.detach().view(-1, bias.n).logsumexp(-1)
                merged = torch.logaddexp(sinks.detach().to(added), added).to(sinks)
                if safe_merge and not merged.isfinite().all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                self._unmerged = sinks.detach().clone()
                sinks.data.copy_(merged)
                self.merged_adapters = [name]

    def check_mergeable(self, adapter: str) -> Any:
        """The bias of the adapter; raises ValueError if no weight of the attention can hold what it does."""
        bias: Any = self.kv_columns[adapter]
        if (
            bias.kind == "sink_logits"
            and bias.gate is None
            and isinstance(self._attention[0]._parameters.get("sinks"), Tensor)
        ):
            return bias
        raise ValueError(
            "an attention bias depends on the query, or on a gate, and no weight of the model can hold it: only "
            "kind='sink_logits' with start='random' is merged, into a model with sinks of its own such as gpt-oss. "
            "Keep the adapter, or unload() it"
        )

    def unmerge(self) -> None:
        """Undoes `merge`."""
        if self._unmerged is not None:
            self.attention.sinks.data.copy_(self._unmerged)
        self._unmerged = None
        self.merged_adapters = []

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """peft's, called when the parameters of a file have taken the place of those that were here."""
        if adapter_name in self.kv_columns and not any(p.is_meta for p in self.kv_columns[adapter_name].parameters()):
            self.kv_columns[adapter_name].to(self.device if device is None else device)
