"""Ternary models as GGUF files, which llama.cpp computes with: TQ2_0 and TQ1_0.

Both formats hold blocks of 256 codes of a row with their scale, s, in float16. llama.cpp rounds activations to 8 bits
as well, but with a scale for each 256 of them, not for each token.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from hf_galore.checks import check_choice
from hf_galore.integrations.bitnet_export import NOT_TERNARY
from hf_galore.integrations.bitnet_plain import PlainModel, check_exportable
from hf_galore.integrations.bitnet_verify import ExportReport
from hf_galore.integrations.gguf_tokenizer import add_tokenizer

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
TYPES = {"tq2_0": GGMLQuantizationType.TQ2_0, "tq1_0": GGMLQuantizationType.TQ1_0}
FILE = "model.gguf"
BLOCK = gguf.QK_K

Stored = dict[str, tuple[np.ndarray, GGMLQuantizationType]]  # values, before they are rounded to the type


def save_gguf(plain: PlainModel, directory: Path, gguf_type: str, tokenizer: Any, verify: bool) -> ExportReport:
    """Writes model.gguf into the directory and, with `verify`, compares all that gguf's own reader finds in it.

    Raises:
        ValueError: `gguf_type`, the architecture or the tokenizer is none of those supported.
        RuntimeError: other values were read than written.
    """
    check_choice("gguf_type", gguf_type, TYPES)
    check_exportable(plain)
    check_architecture(plain)
    narrow = f"{BLOCK} does not divide in_features"
    unconverted = {path: narrow for path, layer in plain.layers.items() if layer.in_features % BLOCK}
    stored = values_by_name(plain, unconverted, TYPES[gguf_type])
    write(plain, directory / FILE, stored, gguf_type, tokenizer)
    if verify:
        check_file(directory / FILE, stored)
    converted = [path for path in plain.layers if path not in unconverted]
    if not plain.base.config.tie_word_embeddings:
        unconverted["lm_head"] = NOT_TERNARY
    return ExportReport("gguf", gguf_type, converted, unconverted, codes_equal=True if verify else None)


def check_architecture(plain: PlainModel) -> None:
    """Raises ValueError for models that llama.cpp has no, or another, architecture for."""
    config = plain.base.config
    check_choice("target='gguf' and model_type", config.model_type, ARCHITECTURES)
    rope = config.rope_parameters["rope_type"]
    problems = {
        "its layers have an RMSNorm of their own": plain.norms != "none",
        f"rope_type={rope!r}": rope != "default",
        "sliding windows": "sliding_attention" in (getattr(config, "layer_types", None) or []),
        f"hidden_act={config.hidden_act!r}": config.hidden_act != "silu",
    }
    found = [problem for problem, is_so in problems.items() if is_so]
    if found:
        raise ValueError(f"target='gguf' has no place for what this model has: {', '.join(found)}")


def values_by_name(plain: PlainModel, unconverted: dict[str, str], ternary: GGMLQuantizationType) -> Stored:
    """All tensors under llama.cpp's names, and the types that they are stored in.

    Ternary matrices are t·s. Other matrices are float16, vectors float32.

    Raises:
        ValueError: a name is unknown, or a value too large for float16.
    """
    config = plain.base.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    stored: Stored = {}

    def store(name: str, value: Tensor, kind: GGMLQuantizationType) -> None:
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ValueError(f"model: {name!r} has no place in the architecture {config.model_type} of llama.cpp")
        if kind == GGMLQuantizationType.F16 and not value.half().isfinite().all():
            raise ValueError(f"model: {name!r} has values that are not finite in float16")
        stored[known] = permuted(name, value.detach().float().cpu(), config).numpy(), kind

    for path, layer in plain.layers.items():
        codes, scale = layer.ternary()
        store(f"{path}.weight", codes * scale, GGMLQuantizationType.F16 if path in unconverted else ternary)
        if layer.bias is not None:
            store(f"{path}.bias", layer.bias, GGMLQuantizationType.F32)
    for name, value in plain.others.items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            store(name, value, GGMLQuantizationType.F16 if value.dim() > 1 else GGMLQuantizationType.F32)
    return stored


def permuted(name: str, value: Tensor, config: Any) -> Tensor:
    """Rows of q_proj and k_proj of a Llama in llama.cpp's order, which rotates neighbours and not halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type != "llama" or heads is None:
        return value
    return value.view(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def write(plain: PlainModel, file: Path, stored: Stored, gguf_type: str, tokenizer: Any) -> None:
    """Writes the file: what llama.cpp asks to know of the model, the tokenizer if there is one, and the tensors."""
    config = plain.base.config
    writer = gguf.GGUFWriter(file, config.model_type)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{gguf_type.upper()}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_tokenizer(writer, tokenizer, config)
    for name, (value, kind) in stored.items():
        writer.add_tensor(name, quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_file(file: Path, stored: Stored) -> None:
    """Raises RuntimeError unless gguf reads t·s with s in float16, and all else as rounded to its type."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    if found.keys() != stored.keys():
        raise RuntimeError(f"{file.name} has other tensors than were written: {sorted(found.keys() ^ stored.keys())}")
    for name, (value, kind) in stored.items():
        exact = torch.float32 if kind == GGMLQuantizationType.F32 else torch.float16
        expected = torch.from_numpy(value).to(exact).float().numpy()
        read = quants.dequantize(found[name].data, found[name].tensor_type).reshape(value.shape)
        if found[name].tensor_type != kind or not np.array_equal(read, expected):
            raise RuntimeError(f"{file.name} has other values of {name!r} than were written")
