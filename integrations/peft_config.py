"""What a user says of BitLinear as a PEFT method."""

from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig

from hf_galore.checks import check_boolean, check_number
from hf_galore.integrations.peft_method import registered_type
from hf_galore.nn.convert import check_norms
from hf_galore.param_groups import ALL_LINEAR

NAME = "HF_GALORE_BITLINEAR"  # the member of peft's enumeration; `hf_galore.integrations.peft` adds it


@dataclass
class BitLinearConfig(PeftConfig):
    """Which linear layers become ternary, and how.

    Args:
        target_modules: "all-linear" (all but the output head), a regular expression, or names; peft matches them.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in peft's LoraConfig.
        quantize_activations: False trains ternary weights with the activations as they are.
        use_rms_norm: an RMSNorm of its own before every target.
        use_sub_norm: the same before targets named o_proj and down_proj alone (SubLN).
        rms_norm_eps: of these norms.
        keep_original: the weights as they are now are written to a temporary file (TMPDIR). Without them,
            `disable_adapter`, `unload` and `delete_adapter` work only until the first change.

    Raises:
        ValueError, TypeError: an argument is not one of these.
        RuntimeError: `hf_galore.register()` has not been called.
    """

    target_modules: list[str] | str | None = field(default=ALL_LINEAR)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    quantize_activations: bool = field(default=True)
    use_rms_norm: bool = field(default=False)
    use_sub_norm: bool = field(default=False)
    rms_norm_eps: float = field(default=1e-6)
    keep_original: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registered_type(NAME, self)
        for name in ("quantize_activations", "use_rms_norm", "use_sub_norm", "keep_original"):
            check_boolean(name, getattr(self, name))
        check_number("rms_norm_eps", self.rms_norm_eps, low=0.0)
        check_norms(self.use_rms_norm, self.use_sub_norm)
        check_modules(self, ALL_LINEAR)


def is_copy(config: BitLinearConfig, of: BitLinearConfig) -> bool:
    """Whether a second config asks for a frozen copy: it is the first itself, or as that and for inference."""
    return config is of or (config.inference_mode and _chosen(config) == _chosen(of))


def _chosen(config: BitLinearConfig) -> dict[str, Any]:
    """What the user chose, but for whether the original is kept; lists, which peft makes sets of, in no order."""
    names = {one.name for one in fields(BitLinearConfig)} - {one.name for one in fields(PeftConfig)}
    values = {name: getattr(config, name) for name in names - {"keep_original"}}
    return {name: set(value) if isinstance(value, list) else value for name, value in values.items()}


def check_modules(config: Any, everything: str, has_layers: bool = False) -> None:
    """Checks what a config says of modules.

    Args:
        everything: what stands for all modules of the method.
        has_layers: whether `layers_to_transform` goes with that.

    Raises:
        TypeError: `target_modules` or `exclude_modules` are neither a regular expression nor names.
        ValueError: they are empty, or `layers_to_transform` or `layers_pattern` lack what they go with.
    """
    _check_names("target_modules", config.target_modules, everything)
    if config.exclude_modules is not None:
        _check_names("exclude_modules", config.exclude_modules, everything)
    is_list = not isinstance(config.target_modules, str) or (has_layers and config.target_modules == everything)
    if config.layers_to_transform is not None and not is_list:
        raise ValueError(
            f"layers_to_transform goes with a list of names, not with target_modules={config.target_modules!r}"
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern goes with layers_to_transform, which is not given")


def _check_names(argument: str, names: Any, everything: str) -> None:
    """Raises TypeError unless these are names or a regular expression, ValueError if there are none."""
    is_collection = isinstance(names, list | tuple | set)
    if not isinstance(names, str) and not (is_collection and all(isinstance(name, str) for name in names)):
        raise TypeError(f"{argument}={names!r} must be {everything!r}, a regular expression, or a list of names")
    if not names:
        raise ValueError(f"{argument}={names!r} names no modules: pass {everything!r} or names")
