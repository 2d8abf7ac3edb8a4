"""What a user says of the explicit attention bias as a PEFT method."""

from dataclasses import dataclass, field

from peft import PeftConfig

from hf_galore.attention.bias import PAPER_STD, check_bias
from hf_galore.integrations.attention_modules import ALL_ATTENTION
from hf_galore.integrations.peft_config import check_modules
from hf_galore.integrations.peft_method import registered_type

NAME = "HF_GALORE_ATTENTION_BIAS"  # the member of peft's enumeration


@dataclass
class AttentionBiasConfig(PeftConfig):
    """Which attention modules get columns, and of what kind.

    Args:
        target_modules: "all-attention", a regular expression, or names; peft matches them.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in peft's LoraConfig.
        kind, start, n, std: as in `add_attention_bias`.

    Raises:
        ValueError, TypeError: an argument is not one of these.
        RuntimeError: `hf_galore.register()` has not been called.
    """

    target_modules: list[str] | str | None = field(default=ALL_ATTENTION)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    kind: str = field(default="key_value")
    start: str = field(default="noop")
    n: int = field(default=1)
    std: float = field(default=PAPER_STD)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = registered_type(NAME, self)
        check_bias(self.kind, self.start, self.n, self.std)
        check_modules(self, ALL_ATTENTION, has_layers=True)
        if self.kind == "off_by_one" and self.start == "random":
            raise ValueError("kind='off_by_one' has nothing to train: start='noop' gives it a gate that has")
