"""Register tokens as a PEFT method: `get_peft_model(model, RegisterTokensConfig(n_tokens=1))`.

    import hf_galore; hf_galore.register()
    model = get_peft_model(model, RegisterTokensConfig())  # trains a decoder's sink token, and nothing else
    ...
    model.save_pretrained(folder)                          # an adapter of a few kilobytes

What they do is what `add_register_tokens` says. A model may have several such adapters, of which one is active.
"""

from dataclasses import dataclass, field
from typing import Any, NoReturn

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from hf_galore.attention.registers import STD, RegisterTokens, check_registers
from hf_galore.integrations.peft_method import register_method, registered_type, unregister_method
from hf_galore.integrations.peft_one_active import OneActiveLayer
from hf_galore.integrations.register_decoder import CHILD
from hf_galore.integrations.register_tokens import Home, check, find_home, install, uninstall

NAME = "HF_GALORE_REGISTER_TOKENS"  # the member of peft's enumeration


def register() -> None:
    """Makes peft know `RegisterTokensConfig`. Idempotent; see `unregister`."""
    register_method(NAME, RegisterTokensConfig, RegisterTokensModel)


def unregister() -> None:
    """Restores peft exactly as it was before `register`. Does nothing if it is not registered."""
    unregister_method(NAME)


@dataclass
class RegisterTokensConfig(PeftConfig):
    """How many register tokens a model gets.

    Args:
        n_tokens, std: as in `add_register_tokens`.
        modules_to_save: as in peft's LoraConfig.

    Raises:
        ValueError, TypeError: an argument is not one of these.
        RuntimeError: `hf_galore.register()` has not been called.
    """

    n_tokens: int = field(default=1)
    std: float = field(default=STD)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registered_type(NAME, self)
        check_registers(self.n_tokens, self.std)
        self.target_modules = None  # peft asks every config


class RegisterTokensLayer(OneActiveLayer):
    """The tokens by adapter: the child that the hooks ask for embeddings."""

    prefix = "register_embeddings"
    what = "set of register tokens"
    adapter_layer_names = (prefix,)

    def __init__(self, home: Home) -> None:
        super().__init__(home.module)
        self.dim = home.dim

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError("register tokens are part of no weight of the model: keep the adapter, or unload() it")

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class RegisterTokensModel(BaseTuner):
    """Puts register tokens into a model and takes them out: the tuner that peft makes for a RegisterTokensConfig."""

    prefix = RegisterTokensLayer.prefix
    tuner_layer_cls = RegisterTokensLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 as peft has it

    def _prepare_adapter_config(self, peft_config: RegisterTokensConfig, model_config: dict) -> RegisterTokensConfig:
        return peft_config  # peft would ask for target_modules

    def _prepare_model(self, peft_config: RegisterTokensConfig, model: nn.Module) -> None:
        """Finds the module that has the tokens, and checks that it can."""
        hosts = [path for path, module in model.named_modules() if isinstance(_layer(module), RegisterTokensLayer)]
        if not hosts:
            self._home = find_home(model)
            hosts = [path for path, module in model.named_modules() if module is self._home.module]
            if hosts == [""]:
                raise ValueError(
                    f"model: {type(model).__name__}: peft puts nothing on the model itself; give it one with a head, "
                    "or use add_register_tokens"
                )
            check(self._home)
        self._host = hosts[0]
        self._dtype: Any = model.dtype

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return key == self._host

    def _create_and_replace(
        self,
        peft_config: RegisterTokensConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not hasattr(target, CHILD):
            install(self._home, RegisterTokensLayer(self._home))
        layer: Any = _layer(target)
        layer.of_adapters[adapter_name] = RegisterTokens(
            peft_config.n_tokens, layer.dim, peft_config.std, device=layer.device, dtype=self._dtype
        )
        layer.set_adapter(self.active_adapters)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            RegisterTokensLayer.merge(_layer(self.model.get_submodule(self._host)))
        uninstall(self.model)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)


def _layer(host: nn.Module) -> Any:
    return getattr(host, CHILD, None)
