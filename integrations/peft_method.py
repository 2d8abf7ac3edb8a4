"""Methods of ours in peft's closed enumeration: put in by `register`, and taken out without a trace."""

from typing import Any

from peft import PeftType
from peft import mapping as peft_mapping
from peft.utils import register_peft_method


def register_method(name: str, config: type, tuner: Any) -> None:
    """Makes `name` a member of PeftType whose adapters peft makes with these classes. Idempotent."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_, member._sort_order_ = name, name, len(PeftType)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):
        PeftType._hashable_values_.append(name)
    register_peft_method(name=name.lower(), config_cls=config, model_cls=tuner, prefix=tuner.prefix)


def unregister_method(name: str) -> None:
    """Restores peft exactly as it was before `register_method`. Does nothing if it is not registered."""
    if name not in PeftType.__members__:
        return
    for mapping in (
        peft_mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        PeftType._member_map_,
        PeftType._value2member_map_,
    ):
        del mapping[name]
    PeftType._member_names_.remove(name)
    if hasattr(PeftType, "_hashable_values_"):
        PeftType._hashable_values_.remove(name)
    type.__delattr__(PeftType, name)


def registered_type(name: str, config: Any) -> PeftType:
    """The member of the enumeration that a config has.

    Raises:
        RuntimeError: `hf_galore.register()` has not been called.
    """
    if name not in PeftType.__members__:
        raise RuntimeError(f"peft does not know {type(config).__name__} yet: call hf_galore.register() first")
    return PeftType[name]
