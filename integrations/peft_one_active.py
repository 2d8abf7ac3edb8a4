"""A layer of peft that holds parameters of ours by adapter, of which those of the active one are used."""

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class OneActiveLayer(nn.Module, BaseTunerLayer):
    """A module by adapter, in the attribute `prefix` of a subclass.

    It has no base layer: it is a child of the module that asks it. Called with a device, it returns what the module of
    the active adapter does; None if there is none here, it is disabled or it is merged.
    """

    prefix: ClassVar[str]  # by which transformers finds our parameters in a file, and not the module that has them
    what: ClassVar[str]
    active_adapters: list[str]

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        setattr(self, self.prefix, nn.ModuleDict())
        self.device = next(host.parameters()).device

    @property
    def of_adapters(self) -> Any:
        """The modules by adapter."""
        return getattr(self, self.prefix)

    def forward(self, device: torch.device) -> Any:
        """See the class."""
        names = [name for name in self.active_adapters if name in self.of_adapters]
        if self.disable_adapters or self.merged or not names:
            return None
        return self.of_adapters[names[0]](device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As peft's.

        Raises:
            ValueError: several at once.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"one {self.what} is active at a time, not {', '.join(adapter_names)}")
        super().set_adapter(adapter_names, inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """peft's, called when the parameters of a file have taken the place of those that were here."""
        if adapter_name in self.of_adapters and not any(
            p.is_meta for p in self.of_adapters[adapter_name].parameters()
        ):
            self.of_adapters[adapter_name].to(self.device if device is None else device)
