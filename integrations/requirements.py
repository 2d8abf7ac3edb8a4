"""What hf_galore needs of other libraries beyond their documented interfaces, by feature.

An upgrade may take any of it away. `register` asks for all of it: where something is missing it warns once, naming the
features that are off, these are refused by name when they are used, and everything else works.

Each need is a line: "module:name", "module:Class.member", and with arguments, "module:function(a, b)", that it takes
some of these names in this order. A member may be an attribute that the methods of the class set or read.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import CodeType
from typing import Any, NamedTuple


class Feature(NamedTuple):
    """A part of hf_galore that can be off while the rest works.

    Attributes:
        name: in messages.
        modules: of hf_galore.integrations, which cannot be imported without what it needs.
        needs: see the module.
        on_use: its library is imported late, and it is asked for then.
    """

    name: str
    modules: tuple[str, ...]
    needs: tuple[str, ...]
    on_use: bool = False


_PEFT = (
    "peft:PeftType._member_map_",
    "peft:PeftType._value2member_map_",
    "peft:PeftType._member_names_",
    "peft.mapping:PEFT_TYPE_TO_PREFIX_MAPPING",
    "peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING",
    "peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING",
    "peft.utils:register_peft_method(name, config_cls, model_cls, prefix)",
    "peft.tuners.tuners_utils:BaseTuner.inject_adapter"
    "(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)",
    "peft.tuners.tuners_utils:BaseTuner._prepare_model(peft_config, model)",
    "peft.tuners.tuners_utils:BaseTuner._prepare_adapter_config(peft_config, model_config)",
    "peft.tuners.tuners_utils:BaseTuner._check_target_module_exists(peft_config, key)",
    "peft.tuners.tuners_utils:BaseTuner._create_and_replace"
    "(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)",
    "peft.tuners.tuners_utils:BaseTuner._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)",
    "peft.tuners.tuners_utils:BaseTunerLayer._move_adapter_to_device_of_base_layer(adapter_name, device)",
    "peft.tuners.tuners_utils:check_adapters_to_merge(module, adapter_names)",
)
_ATTENTION = ("transformers.modeling_utils:AttentionInterface.get_interface(attn_implementation, default)",)
_BIAS = (
    *_ATTENTION,
    "transformers.integrations.sdpa_attention:repeat_kv",
    "transformers.integrations.sdpa_attention:use_gqa_in_sdpa(attention_mask, key, value)",
    "transformers.modeling_flash_attention_utils:_is_packed_sequence(position_ids, batch_size)",
    "transformers.modeling_flash_attention_utils:flash_attn_supports_top_left_mask",
    "transformers.utils.import_utils:is_torchdynamo_compiling",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
)
_CACHES = (
    "transformers.cache_utils:CacheLayerMixin.is_initialized",
    "transformers.cache_utils:CacheLayerMixin.lazy_initialization(key_states, value_states)",
    "transformers.cache_utils:CacheLayerMixin.get_mask_sizes(query_length)",
    "transformers.cache_utils:Cache.get_max_length(layer_idx)",
    "transformers.cache_utils:DynamicSlidingWindowLayer",
    "transformers.cache_utils:get_layer_types_and_kwargs(config)",
    "transformers.masking_utils:create_sliding_window_causal_mask(config, inputs_embeds, attention_mask)",
)
_REGISTERS = (
    *_CACHES,
    "transformers.cache_utils:Cache.is_croppable",
    "transformers.cache_utils:StaticLayer.max_cache_len",
)

TRAINER = Feature(
    "optim='galore_…' in transformers' Trainer",
    ("transformers",),
    (
        "transformers.trainer_optimizer:_OPTIMIZER_HANDLERS",
        "transformers.trainer_optimizer:_parse_optim_args(optim_args_str)",
        "transformers.trainer_optimizer:OptimizerContext(args, model, optimizer_kwargs, adam_kwargs, optim_args)",
        "transformers.trainer:_parse_optim_args",
        "transformers.trainer:validate_quantization_for_training(model)",
        "transformers.trainer:TRAINER_STATE_NAME",
        "transformers.trainer:SCHEDULER_NAME",
        "transformers.trainer:Trainer._load_from_checkpoint(resume_from_checkpoint, model)",
        "transformers.trainer:Trainer._load_best_model",
        "transformers.trainer:Trainer._load_optimizer_and_scheduler(checkpoint)",
        "transformers.trainer:Trainer.get_decay_parameter_names(model)",
        "transformers.utils.import_utils:is_galore_torch_available",
        "accelerate.state:AcceleratorState._shared_state",
        "accelerate.state:GradientState.sync_gradients",
        "torch:_disable_dynamo",
        "torch:_fused_adamw_",
    ),
)
PROJECTED_BACKWARD = Feature(
    "the projected backward (optim='galore_…_layerwise')",
    ("accelerate_parameters",),
    (
        "torch:_C._current_graph_task_id",
        "torch:ops.aten._unsafe_view",
        "accelerate:Accelerator._models",
        "accelerate:Accelerator.prepare(args, device_placement)",
        "accelerate:Accelerator.clip_grad_norm_(parameters, max_norm, norm_type)",
        "accelerate:Accelerator.clip_grad_value_(parameters, clip_value)",
    ),
)
FSDP2 = Feature(
    "FSDP2",
    ("fsdp",),
    ("accelerate.accelerator:fsdp2_prepare_model(accelerator, model)",),
)
DEEPSPEED = Feature(
    "DeepSpeed through accelerate",
    ("deepspeed",),
    ("accelerate:Accelerator._prepare_deepspeed", "accelerate:Accelerator.deepspeed_plugin"),
)
DEEPSPEED_ENGINE = Feature(
    "the projected backward under DeepSpeed",
    ("deepspeed_engine", "deepspeed_zero"),
    (
        "deepspeed.utils:safe_get_full_fp32_param(param)",
        "deepspeed.utils:safe_set_full_fp32_param(param, value)",
        "deepspeed.utils:safe_set_local_fp32_param(param, value)",
        "deepspeed.runtime.zero:register_external_parameter(module, parameter)",
        "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload.partition_all_parameters",
        "deepspeed.runtime.engine:DeepSpeedEngine.was_step_applied",
        "deepspeed.runtime.engine:DeepSpeedEngine.skipped_steps",
        "deepspeed.runtime.engine:DeepSpeedEngine.use_node_local_storage",
        "deepspeed.runtime.engine:DeepSpeedEngine.load_universal_checkpoint",
        "deepspeed.runtime.engine:DeepSpeedEngine._zero3_consolidated_16bit_state_dict",
        "deepspeed.runtime.engine:DeepSpeedEngine._get_zero_param_shapes",
        "deepspeed.runtime.engine:DeepSpeedEngine._get_zero_frozen_param_attributes(attr_func)",
        "deepspeed.runtime.engine:DeepSpeedEngine._get_param_shape_func(param)",
        "deepspeed.runtime.engine:DeepSpeedEngine._get_param_fragment_func(param)",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.single_partition_of_fp32_groups",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.round_robin_bit16_padding",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.grad_position",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.get_param_id(param)",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.sub_group_to_group_id",
        "deepspeed.utils.tensor_fragment:tensor_fragment.hp_fragment_address",
        "deepspeed.utils.tensor_fragment:tensor_fragment.lp_fragment_address",
    ),
    on_use=True,
)
BITSANDBYTES = Feature(
    "weights that bitsandbytes has quantized",
    ("bitsandbytes",),
    (
        "bitsandbytes.functional:QuantState(absmax, shape, code, blocksize, quant_type, dtype, offset, state2)",
        "bitsandbytes.functional:QuantState.nested",
        "bitsandbytes.functional:QuantState.as_dict",
        "bitsandbytes.functional:_convert_weight_packed_for_cpu_inverse",
        "bitsandbytes.functional:dequantize_blockwise(A, quant_state)",
        "bitsandbytes.functional:int8_vectorwise_dequant(A, stats)",
        "bitsandbytes.utils:unpack_tensor_to_dict(tensor_data)",
        "torch:ops.bitsandbytes.dequantize_4bit",
    ),
)
BITLINEAR_ADAPTER = Feature(
    "BitLinearConfig",
    ("peft", "peft_config", "peft_layer", "peft_packed"),
    (
        *_PEFT,
        "peft.tuners.tuners_utils:_maybe_include_all_linear_layers(peft_config, model)",
        "peft.tuners.tuners_utils:BaseTuner._remove_adapter_name_from_key(key, adapter_name)",
        "peft.tuners.tuners_utils:BaseTuner._get_adapter_state_dict(model)",
        "torch:_int_mm",
    ),
)
ATTENTION_HOOKS = Feature("hooks on attention", ("attention", "attention_modules"), _ATTENTION)
ATTENTION_BIAS = Feature("add_attention_bias", ("attention_bias", "attention_bias_kernels"), _BIAS)
ATTENTION_BIAS_ADAPTER = Feature(
    "AttentionBiasConfig",
    ("peft_attention_bias", "peft_attention_bias_config", "peft_attention_bias_layer"),
    (*_PEFT, *_BIAS, "peft.tuners.tuners_utils:check_target_module_exists(config, key)"),
)
PEFT_VERSION = Feature(
    "the advice where transformers asks for a newer peft",
    ("peft_version",),
    ("transformers.integrations.peft:check_peft_version(min_version)",),
)
REGISTER_TOKENS = Feature("add_register_tokens", ("register_tokens", "register_decoder", "prefixed_cache"), _REGISTERS)
REGISTER_TOKENS_ADAPTER = Feature("RegisterTokensConfig", ("peft_register_tokens",), (*_PEFT, *_REGISTERS))
SINK_CACHE = Feature("SinkCache", ("sink_cache", "sink_forward", "sink_layer", "streaming"), _CACHES)
BITNET_FILES = Feature(
    "save_bitnet and load_bitnet",
    ("bitnet", "bitnet_export", "bitnet_load"),
    (
        "transformers.integrations.bitnet:BitLinear",
        "transformers.integrations.bitnet:AutoBitLinear.online_quant",
        "transformers.integrations.bitnet:WeightQuant",
        "transformers.integrations.bitnet:unpack_weights",
        "transformers.quantizers.quantizers_utils:should_convert_module(full_name, patterns)",
    ),
    on_use=True,
)
FEATURES = (
    TRAINER,
    PROJECTED_BACKWARD,
    FSDP2,
    DEEPSPEED,
    DEEPSPEED_ENGINE,
    BITSANDBYTES,
    BITLINEAR_ADAPTER,
    ATTENTION_HOOKS,
    ATTENTION_BIAS,
    ATTENTION_BIAS_ADAPTER,
    PEFT_VERSION,
    REGISTER_TOKENS,
    REGISTER_TOKENS_ADAPTER,
    SINK_CACHE,
    BITNET_FILES,
)


def missing(feature: Feature) -> list[str]:
    """What the feature needs and the installed libraries do not have; nothing where one of them is not installed."""
    needs = [need for need in feature.needs if find_spec(need.partition(":")[0].partition(".")[0]) is not None]
    return [need for need in needs if not is_there(need)] if len(needs) == len(feature.needs) else []


def require(feature: Feature) -> None:
    """Raises ImportError where the feature is off, with what is missing."""
    found = missing(feature)
    if found:
        raise ImportError(f"hf_galore: {feature.name} is off: {_sentence(found)}")


def require_module(path: str) -> None:
    """`require` of the features that the module belongs to."""
    for feature in FEATURES:
        if path.removeprefix("hf_galore.integrations.") in feature.modules:
            require(feature)


def warn_of_missing() -> None:
    """One warning that names the features that are off, if any are."""
    found = {feature.name: missing(feature) for feature in FEATURES if not feature.on_use}
    parts = [f"{name} ({_sentence(needs)})" for name, needs in found.items() if needs]
    if parts:
        warnings.warn(f"hf_galore: off with the installed versions: {'; '.join(parts)}", stacklevel=3)


def is_there(need: str) -> bool:
    """Whether the installed library has it."""
    module, _, rest = need.partition(":")
    path, _, arguments = rest.removesuffix(")").partition("(")
    try:
        holder: Any = import_module(module)
    except ImportError:
        return False
    for name in path.split("."):
        if not hasattr(holder, name):
            return inspect.isclass(holder) and name in _members(holder)
        holder = getattr(holder, name)
    return not arguments or _takes(holder, arguments.split(", "))


def _takes(function: Callable[..., Any], names: list[str]) -> bool:
    """Whether the function has these parameters, in this order."""
    parameters = iter(inspect.signature(function).parameters)
    return all(name in parameters for name in names)


def _members(cls: type) -> Iterator[str]:
    """Names that the methods of the class use as attributes, and that its body declares."""
    for base in cls.__mro__[:-1]:
        yield from inspect.get_annotations(base)
        for member in vars(base).values():
            code = getattr(inspect.unwrap(getattr(member, "fget", member)), "__code__", None) if member else None
            yield from code.co_names if isinstance(code, CodeType) else ()


def _sentence(needs: list[str]) -> str:
    libraries = sorted({need.partition(":")[0].partition(".")[0] for need in needs})
    there = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"{there} has no {', no '.join(need.replace(':', '.') for need in needs)}"
