"""The layer of the explicit attention bias as a PEFT method: the columns of one attention module, by adapter."""

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hf_galore.attention.bias import Heads
from hf_galore.integrations.peft_one_active import OneActiveLayer


class AttentionBiasLayer(OneActiveLayer):
    """The columns of one attention module, by adapter: the child that the attention asks for its bias."""

    prefix = "kv_columns"
    what = "attention bias"
    adapter_layer_names = (prefix,)
    kv_columns: nn.ModuleDict

    def __init__(self, attention: nn.Module, heads: Heads) -> None:
        super().__init__(attention)
        self.heads = heads
        self._attention = (attention,)  # in a tuple, so that it is no child
        self._unmerged: Tensor | None = None

    @property
    def attention(self) -> Any:
        """The module whose child this is."""
        return self._attention[0]

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
