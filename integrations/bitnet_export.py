"""What is written for a model with BitLinear layers: tensors under plain names, and the config that fits them."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_galore.integrations.bitnet_plain import PlainModel, check_exportable
from hf_galore.nn.convert import SUB_NORM
from hf_galore.nn.functional import Ternary, absmean_ternary, dequantize
from hf_galore.nn.masters import round_masters
from hf_galore.nn.packing import PER_BYTE, pack_ternary

LINEAR_CLASSES = {
    "transformers": ("bitlinear", "offline"),
    "transformers-auto": ("autobitlinear", "offline"),
    "online": ("autobitlinear", "online"),
}
NOT_TERNARY = "not a BitLinear in the model"
_SUB_NORMS = {"o_proj": "attn_sub_norm", "down_proj": "ffn_sub_norm"}  # of transformers' bitnet architecture


@dataclass
class Export:
    """A model on its way into a checkpoint.

    Attributes:
        shell: the model that transformers will build, on the meta device and with nn.Linear layers.
        tensors: what is stored, by the names of the shell.
        ternaries: codes and scales that the stored layers compute with, by the same names.
        unconverted: linear layers that are stored as such, and why.
    """

    plain: PlainModel
    target: str
    dtype: torch.dtype
    shell: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ternaries: dict[str, Ternary] = field(default_factory=dict)
    unconverted: dict[str, str] = field(default_factory=dict)

    @property
    def converted(self) -> list[str]:
        return [path for path in self.plain.layers if path not in self.unconverted]

    def write(self, directory: Path, max_shard_size: int | str) -> None:
        """Writes weights, config.json and generation_config.json."""
        self.shell.save_pretrained(directory, state_dict=dict(self.tensors), max_shard_size=max_shard_size)


def prepare(plain: PlainModel, target: str, dtype: torch.dtype) -> Export:
    """Converts the tensors of the model.

    Raises:
        ValueError: the model cannot be exported to this target.
    """
    check_exportable(plain)
    shell = build_shell(plain, dtype)
    export = Export(plain, target, dtype, shell)
    linears = {name for name, module in shell.named_modules() if isinstance(module, nn.Linear)}
    for path in sorted(linears - set(plain.layers)):
        export.unconverted[path] = NOT_TERNARY
    for path, layer in plain.layers.items():
        if path not in linears:
            raise ValueError(f"model: {path!r} is no nn.Linear in {type(shell).__name__}, which would load it")
        if target != "online" and layer.out_features % PER_BYTE:
            export.unconverted[path] = f"{PER_BYTE} does not divide out_features={layer.out_features}"
        _check_layer(export, path)
    for path in plain.layers:
        _store_layer(export, path)
    _store_others(export)
    _check_names(export)
    shell.config.quantization_config = quantization_config(export)
    return export


def build_shell(plain: PlainModel, dtype: torch.dtype) -> Any:
    """The model that transformers builds from the config, without weights; `bitnet` for a Llama with SubLN.

    Raises:
        ValueError: there is no causal language model of this config, or no architecture with these norms.
    """
    if plain.base.get_output_embeddings() is None:
        raise ValueError(f"model: {type(plain.base).__name__} has no layer for logits; export the model that has it")
    config = copy.deepcopy(plain.base.config)
    if plain.norms == "sub":
        config = bitnet_config(plain)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"model: AutoModelForCausalLM has no model of {type(config).__name__}")
    with torch.device("meta"):
        shell = AutoModelForCausalLM._model_mapping[type(config)]._from_config(config, dtype=dtype)
    shell.generation_config = copy.deepcopy(plain.base.generation_config)
    return shell


def bitnet_config(plain: PlainModel) -> BitNetConfig:
    """The config of transformers' `bitnet` architecture, a Llama with SubLN, for a Llama with SubLN.

    Raises:
        ValueError: it is not such a model.
    """
    config = plain.base.config
    problems = {
        f"its architecture is {config.model_type}": config.model_type != "llama",
        "mlp_bias": getattr(config, "mlp_bias", False),
        "not every o_proj and down_proj is a BitLinear": len(plain.layers.keys() & _sub_normed(plain.base))
        != len(SUB_NORM) * config.get_text_config().num_hidden_layers,
        "the inputs of o_proj are not as wide as the hidden states": any(
            path.endswith("o_proj") and layer.in_features != layer.out_features for path, layer in plain.layers.items()
        ),
        "the eps of its norms is not config.rms_norm_eps": any(
            layer.rms_norm is not None and layer.rms_norm.eps != getattr(config, "rms_norm_eps", None)
            for layer in plain.layers.values()
        ),
    }
    found = [problem for problem, is_so in problems.items() if is_so]
    if found:
        raise ValueError(
            "model: norms before o_proj and down_proj alone (use_sub_norm) exist in transformers' bitnet "
            f"architecture, which is a Llama; this model is none: {'; '.join(found)}"
        )
    left_out = {"model_type", "architectures", "mlp_bias", "pretraining_tp", "transformers_version", "dtype"}
    return BitNetConfig(**{key: value for key, value in config.to_dict().items() if key not in left_out})


def _sub_normed(base: nn.Module) -> set[str]:
    return {name for name, _ in base.named_modules() if name.rpartition(".")[2] in SUB_NORM}


def _check_layer(export: Export, path: str) -> None:
    layer, kept = export.plain.layers[path], path in export.unconverted
    if kept and export.plain.norms == "every":
        raise ValueError(
            f"target={export.target!r}: {path!r} is stored as nn.Linear, as {export.unconverted[path]}, which has no "
            "place for its RMSNorm; choose target='online'"
        )
    if not kept and export.target == "transformers-auto" and layer.bias is not None:
        raise ValueError(
            f"target='transformers-auto': {path!r} has a bias, which this kind of layer multiplies by the scale; "
            "choose target='transformers' or 'online'"
        )


def _store_layer(export: Export, path: str) -> None:
    layer, dtype, tensors = export.plain.layers[path], export.dtype, export.tensors
    codes, scale = layer.ternary()
    scale = scale.float()
    if path in export.unconverted:
        weight, used = dequantize(Ternary(codes, scale), dtype), scale.to(dtype).float()
    elif export.target == "online":
        weight = round_masters(layer.weight, codes, dtype)
        used = absmean_ternary(weight).scale
    else:
        inverse = export.target == "transformers"
        stored = (1.0 / scale if inverse else scale).to(dtype)
        weight, used = pack_ternary(codes), 1.0 / stored.float() if inverse else stored.float()
        tensors[f"{path}.weight_scale"] = stored.reshape(1).cpu()
    tensors[f"{path}.weight"] = weight.cpu()
    export.ternaries[path] = Ternary(codes, used)
    if layer.bias is not None:
        tensors[f"{path}.bias"] = layer.bias.detach().to("cpu", dtype)
    if layer.rms_norm is not None:
        tensors[_norm_name(export, path)] = layer.rms_norm.weight.detach().to("cpu", dtype)


def _norm_name(export: Export, path: str) -> str:
    if export.plain.norms == "every":
        return f"{path}.rms_norm.weight"
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{_SUB_NORMS[leaf]}.weight"


def _store_others(export: Export) -> None:
    cast: dict[tuple[int, torch.Size], Tensor] = {}  # tied tensors stay so
    for name, tensor in export.plain.others.items():
        if tensor.is_floating_point():
            known = (tensor.data_ptr(), tensor.shape)
            cast[known] = tensor = cast.get(known, tensor.detach().to("cpu", export.dtype))
        export.tensors[name] = tensor


def _check_names(export: Export) -> None:
    """Raises ValueError unless the stored tensors are those that the shell has, and tied where it ties them."""
    shell, tensors = export.shell.state_dict(), export.tensors
    extra = {name for name in tensors if name.endswith((".weight_scale", ".rms_norm.weight"))} - shell.keys()
    if missing := shell.keys() - tensors.keys():
        raise ValueError(f"model: it has no tensor {min(missing)!r}, which {type(export.shell).__name__} has")
    if unknown := tensors.keys() - shell.keys() - extra:
        raise ValueError(
            f"model: {type(export.shell).__name__} has no {min(unknown)!r}; merge or remove what was added"
        )
    for name in shell.keys() - {f"{path}.weight" for path in export.plain.layers}:
        if shell[name].shape != tensors[name].shape:
            raise ValueError(f"model: {name!r} is not whole in this process; gather the model first")
    for name, other in getattr(export.shell, "all_tied_weights_keys", {}).items():
        if not torch.equal(tensors[name], tensors[other]):
            raise ValueError(
                f"model: the config ties {name!r} to {other!r}, but they differ, as after training one of them; "
                "set config.tie_word_embeddings=False"
            )


def quantization_config(export: Export) -> dict[str, Any]:
    """The entry of config.json from which transformers builds the layers.

    Raises:
        ValueError: transformers would not convert a layer that is stored in packed form, or the norms' eps differ.
    """
    linear_class, mode = LINEAR_CLASSES[export.target]
    kept = [
        name if all(should_convert_module(path, [name]) for path in export.converted) else f"^{name}$"
        for name in sorted(export.unconverted)
    ]
    always = list(getattr(export.shell, "_keep_in_fp32_modules", None) or [])
    for path in export.converted:
        if not should_convert_module(path, kept + always):
            raise ValueError(
                f"model: {type(export.shell).__name__} keeps {path!r} in float32 and would not convert it"
            )
    normed = export.plain.norms == "every"
    epsilons = {layer.rms_norm.eps for layer in export.plain.layers.values() if layer.rms_norm is not None}
    if normed and len(epsilons) > 1:
        raise ValueError(f"model: the norms of its layers have several values of eps: {sorted(map(str, epsilons))}")
    return {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": mode,
        "modules_to_not_convert": kept,
        "use_rms_norm": normed,
        "rms_norm_eps": epsilons.pop() if normed else 1e-6,
    }
