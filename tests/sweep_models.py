"""Tiny models of all architectures of transformers, from their own default configurations, and inputs they run on.

`rows` lists one class for each task of each architecture. `build` shrinks the configuration by the names of its
fields, and by magnitude what has an unknown name; `OVERRIDES` says what no rule finds. `inputs_of` tries generic
inputs. Both raise NotBuilt with the reason where that fails.
"""

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import ModelOutput

VOCABULARY, FIRST_TEXT = 64, 40  # ids below the second are special
WIDTH, INNER, HEAD, LONGEST, IMAGE = 32, 48, 8, 128, 32
MOST_PARAMETERS = 8_000_000
BATCH, TOKENS, SAMPLES = 4, 12, 2000

TASKS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "SPEECH_SEQ_2_SEQ",
    "TEXT_TO_WAVEFORM",
    "TEXT_TO_SPECTROGRAM",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "UNIVERSAL_SEGMENTATION",
    "VISUAL_QUESTION_ANSWERING",
    "TIME_SERIES_PREDICTION",
    "PRETRAINING",
)


class NotBuilt(Exception):
    """A class has no tiny model here, or no input; the message says why."""


def rows() -> dict[str, list[str]]:
    """Model class → its model types: the classes of TASKS, and the bare model of types that have none of these."""
    found: dict[str, list[str]] = {}
    tasks = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in TASKS]
    known = {model_type for mapping in tasks for model_type in mapping}
    bare = {kind: names for kind, names in modeling_auto.MODEL_MAPPING_NAMES.items() if kind not in known}
    for mapping in (*tasks, bare):
        for model_type, names in mapping.items():
            found.setdefault(names if isinstance(names, str) else names[0], []).append(model_type)
    return found


def _at_most(most: int) -> Callable[[int], int]:
    return lambda value: min(value, most)


def _where_large(small: int) -> Callable[[int], int]:
    return lambda value: small if value > 32 else value


# What a number whose field has such a name becomes; the first that fits is taken.
_RULES = [
    (r".*vocab_size.*|.*vocab|codebook_size|num_embeddings", _at_most(VOCABULARY)),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", _at_most(1)),
    (r"index_topk", _at_most(LONGEST)),  # all: near ties among fewer would be decided by rounding
    (r"n_group|topk_group|num_expert_group|topk_groups", _at_most(1)),
    (r".*experts_per_tok|.*top_?k|moe_k", _at_most(2)),
    (r".*experts|.*expert_num", _at_most(4)),
    (r".*kv_heads|.*key_value_heads", _at_most(2)),
    (r".*heads|.*n_head|.*num_head", _at_most(4)),
    (r".*(head_dim|head_size|d_kv|dim_head|d_head|kv_channels|lora_rank|rotary_dim)", _at_most(HEAD)),
    (r".*(intermediate|ffn|d_ff|dff|mlp_dim|n_inner|dim_ff|linear_units|feedforward).*", _where_large(INNER)),
    (r".*layers?|.*blocks|.*depth", _at_most(2)),
    (r".*(image_size|img_size|resolution|spec_size|crop_size)", _at_most(IMAGE)),
    (r".*patch_size", _at_most(8)),
    (r".*position.*|n_ctx|.*max_.*len.*|.*max_seq.*|max_length|.*pos_emb.*", _at_most(LONGEST)),
    (r"sliding_window.*|attention_window|local_attention", _at_most(16)),
    (r".*window_size", _at_most(4)),
    (r".*sampling_rate|.*sample_rate|rope_theta|.*temperature|.*_base", lambda value: value),
]
_SPECIAL = re.compile(r".*(token_id|token_index|_token|start_id|end_id|newline_id|bos_id|eos_id|pad_id)$")
_FIXED = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}

# model type → fields of its configuration that no rule finds, dotted for parts
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS = _ROPE | {"mrope_section": [2, 1, 1]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cosmos3_edge_text": {"rope_parameters": _SECTIONS},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": None}},
    "deepseek_v2": _EXPERTS | {"first_k_dense_replace": 1},
    "donut-swin": {"window_size": 2},
    "dots1": _EXPERTS,
    "emu3": {"vocabulary_map": {"<image>": 3}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0},
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    "gemma3n_text": {
        "intermediate_size": [48] * 5,
        "activation_sparsity_pattern": [0.5] * 5,
        "num_kv_shared_layers": 0,
    },
    "gemma4": {"text_config.num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "glm5_next_text": {"index_kpool": 2, "index_topk": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "hunyuan_vl_text": {"head_dim": HEAD},
    "hy_v4_vl_text": {"rope_parameters": _SECTIONS},
    "idefics": {"vision_config.image_size": IMAGE},
    "informer": {"prediction_length": 4},
    "kyutai_speech_to_text": {"vocab_size": VOCABULARY},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": HEAD},
    "mobilebert": {"embedding_size": 16, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "mobilevit": {"hidden_sizes": [32, 32, 32], "neck_hidden_sizes": [16, 16, 16, 16, 16, 16, 32]},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 8},
    "nystromformer": {"segment_means_seq_len": 8, "num_landmarks": 4},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "shieldgemma2": {"yes_token_index": 40, "no_token_index": 41},
    "swin": {"window_size": 2},
    "time_series_transformer": {"prediction_length": 4},
    "wav2vec2": {"vocab_size": VOCABULARY},
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3},
}


class _Ids:
    """Gives every special token of a model another id."""

    def __init__(self) -> None:
        self.by_value: dict[int, int] = {}

    def of(self, name: str, value: int) -> int:
        if value < 0:
            return value
        if name in _FIXED:
            return _FIXED[name]
        return self.by_value.setdefault(value, min(3 + len(self.by_value), FIRST_TEXT - 1))


def small_config(cls: Any) -> PreTrainedConfig:
    """The default configuration of the model class with all sizes small."""
    wanted = {"is_decoder": True} if cls.__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else {}
    config = _small(cls.config_class(), wanted, _Ids())
    for part in _tree(config):
        _fit_sections(part)
    return config


def _tree(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configuration and its parts."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _tree(value)


def _fit_sections(config: Any) -> None:
    """Makes the sections of multimodal rotary embeddings sum to half of the channels that rotate."""
    rope = vars(config).get("rope_parameters")
    known = getattr(config, "ignore_keys_at_rope_validation", ())
    if isinstance(rope, dict) and ("mrope_section" in rope or "mrope_section" in known):
        width = _value(config, "head_dim") or config.hidden_size // config.num_attention_heads
        pairs = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]


def _small(config: PreTrainedConfig, overrides: dict[str, Any], ids: _Ids) -> PreTrainedConfig:
    cls = type(config)
    own = {field.name: field for field in dataclasses.fields(cls)}
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    given = {key: value for key, value in overrides.items() if key.partition(".")[0] in own}
    wanted = OVERRIDES.get(config.model_type, {}) | given
    kwargs: dict[str, Any] = {}
    for name, field in own.items():
        value = _value(config, name)
        below = {key.partition(".")[2]: item for key, item in wanted.items() if key.startswith(name + ".")}
        if name in wanted:
            kwargs[name] = wanted[name]
        elif isinstance(value, PreTrainedConfig):
            kwargs[name] = _small(value, below, ids)
        elif isinstance(value, dict) and value and all(isinstance(v, PreTrainedConfig) for v in value.values()):
            kwargs[name] = {key: _small(item, below, ids) for key, item in value.items()}
        elif name in _FIXED or (name not in inherited and field.default is not None):
            kwargs[name] = _shrunk(name, value, ids)
    kwargs = {name: value for name, value in kwargs.items() if value is not None or own[name].default is not None}
    if "num_key_value_heads" in kwargs and config.num_key_value_heads == _value(config, "num_attention_heads"):
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]  # not grouped
    kwargs |= {name: value for name, value in wanted.items() if "." not in name}
    return _with_all_kinds(cls, kwargs, config)


def _value(config: PreTrainedConfig, name: str) -> Any:
    """The field's value; its default where layers have values of their own."""
    try:
        return getattr(config, name, None)
    except Exception:
        return getattr(type(config), name, None)


def _with_all_kinds(cls: Any, kwargs: dict[str, Any], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, with as many layers as it takes to have each kind of layer that the default has."""
    kinds = list(_value(config, "layer_types") or [])
    unique = list(dict.fromkeys(kinds))
    layers = getattr(cls, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    variants = [kwargs]
    if kinds:
        first = next(n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds))
        each = unique if len(unique) > 1 else unique * 2
        variants += [kwargs | {layers: len(each), "layer_types": each}, kwargs | {layers: max(first, 2)}]
    error: Exception | None = None
    for variant in variants:
        try:
            made = cls(**copy.deepcopy(variant))
        except Exception as raised:
            error = raised
        else:
            if set(_value(made, "layer_types") or []) >= set(unique):
                return made
    raise error or ValueError(f"layers of all kinds ({', '.join(unique)}) need more than a few layers")


def _shrunk(name: str, value: Any, ids: _Ids) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, str | float):
        return value
    if isinstance(value, int):
        return _shrunk_number(name, value, ids)
    if isinstance(value, dict):
        return {key: _shrunk(key, item, ids) if key == "mrope_section" else item for key, item in value.items()}
    if isinstance(value, list | tuple) and value:
        return _shrunk_list(name, value, ids)
    return value


def _shrunk_number(name: str, value: int, ids: _Ids) -> int:
    if _SPECIAL.fullmatch(name):
        return ids.of(name, value)
    for pattern, rule in _RULES:
        if re.fullmatch(pattern, name):
            return rule(value)
    return WIDTH if value > 40 else value


def _shrunk_list(name: str, value: Any, ids: _Ids) -> Any:
    kind = type(value)
    if name == "mrope_section":
        return [2, 1, 1]
    if _SPECIAL.fullmatch(name.removesuffix("s")):
        return kind(ids.of(name, one) for one in value)
    if all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        least = min(value)
        if re.fullmatch(r".*(depths|num_blocks|layer_depths|blocks|num_layers)", name):
            return kind(1 for _ in value)
        if re.fullmatch(r".*heads", name) and least > 0:
            return kind(max(1, one // least) for one in value)
        if re.fullmatch(r".*(image_size|img_size|resolution|input_size)", name):
            return kind(min(one, IMAGE) for one in value)
        if least >= 16 and max(value) > 40:
            return kind(max(8, one * 16 // least) for one in value)
    return value


def build(name: str) -> PreTrainedModel:
    """A seeded model of the class, with all parameters away from 0 and 1.

    Raises:
        NotBuilt: there is none, or it is not small.
    """
    cls: Any = getattr(transformers, name, None)
    if cls is None:
        raise NotBuilt("transformers does not export it")
    try:
        config = small_config(cls)
        size = _size(cls, config)
        if size > MOST_PARAMETERS:
            raise NotBuilt(f"{size} parameters")
        torch.manual_seed(0)
        model: PreTrainedModel = cls(config)
    except NotBuilt:
        raise
    except ImportError as error:
        raise NotBuilt(f"needs a package: {_line(error)}") from error
    except Exception as error:
        raise NotBuilt(f"configuration: {type(error).__name__}: {_line(error)}") from error
    with torch.no_grad():
        for param in model.parameters():
            if param.is_floating_point():
                param.add_(torch.randn_like(param), alpha=0.02)
    return model


def _size(cls: Any, config: PreTrainedConfig) -> int:
    """The number of parameters, found without memory for them; 0 where a model cannot be made so."""
    try:
        with torch.device("meta"):
            return sum(param.numel() for param in cls(copy.deepcopy(config)).parameters())
    except (NotImplementedError, RuntimeError):
        return 0


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The first of the generic inputs that the model runs on.

    Raises:
        NotBuilt: it runs on none.
    """
    reasons: dict[str, None] = {}
    model.eval()
    for candidate in _candidates(model):
        try:
            with torch.no_grad(), torch.random.fork_rng():
                out = model(**copy.deepcopy(candidate))
            if any(True for _ in floats(out)):
                return candidate
            reasons["no tensor comes out"] = None
        except Exception as error:
            reasons[f"{', '.join(candidate)}: {type(error).__name__}: {_line(error)[:120]}"] = None
    raise NotBuilt("inputs: " + "; ".join(reasons))


def _candidates(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """One part alone, the main one first; with text, or a decoder's text; with all else that the model may ask for."""
    names = set(inspect.signature(model.forward).parameters)
    parts = sorted(_parts(model, names), key=lambda part: model.main_input_name not in part)
    text = {"input_ids": _ids(model.config)} if "input_ids" in names else {}
    decoder = {"decoder_input_ids": _ids(model.config)} if "decoder_input_ids" in names else {}
    more = {name: make() for name, make in _MORE.items() if name in names}
    yield from parts
    for part in parts or [{}]:
        for extra in (decoder, text, text | decoder, more, more | text, more | text | decoder):
            if extra and not extra.keys() <= part.keys():
                yield part | extra


_BINS = ("num_mel_bins", "feature_size", "input_dim", "n_mels", "input_feat_size", "feature_projection_input_dim")


def _parts(model: Any, names: set[str]) -> Iterator[dict[str, Tensor]]:
    config = model.config
    if "input_ids" in names:
        yield {"input_ids": _ids(config)}
    grids = [name for name in ("grid_thw", "image_grid_thw", "grid_hws") if name in names]
    for name in ("pixel_values", "hidden_states"):
        if name in names and grids and "input_ids" not in names:
            width = next(param[0].numel() for param in model.parameters() if param.dim() > 1)
            grid = torch.tensor([[1, 4, 4]])
            yield {name: _noise(16, width), grids[0]: grid[:, 1:] if grids[0] == "grid_hws" else grid}
    if "spatial_shapes" in names:
        side = _found(config, ("patch_size",), 8)
        yield {
            "pixel_values": _noise(BATCH, 16, 3 * side * side),
            "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
        }
    if "pixel_values_videos" in names:
        for frames in (4, 16):
            yield {"pixel_values_videos": _noise(BATCH, frames, 3, _side(config), _side(config))}
    if "past_values" in names:
        length = _found(config, ("context_length", "seq_length"), 32)
        yield {"past_values": _noise(BATCH, length, _found(config, ("num_input_channels",), 1))}
        yield {"past_values": _noise(BATCH, length)}
    if "pixel_values" in names:
        channels = _found(config, ("num_channels", "in_channels", "in_chans"), 3)
        sizes = dict.fromkeys([_side(config), IMAGE, 64, 224])
        for side in sizes:
            yield {"pixel_values": _noise(BATCH, channels, side, side)}
        for frames in (2, _found(config, ("num_frames",), 4)):
            yield {"pixel_values": _noise(BATCH, frames, channels, _side(config), _side(config))}
    if "input_values" in names:
        yield {"input_values": _noise(BATCH, SAMPLES)}
        yield {"input_values": _noise(BATCH, 1, SAMPLES)}
        bins = _found(config, ("num_mel_bins", "feature_size"), 32)
        yield {"input_values": _noise(BATCH, _found(config, ("max_length",), LONGEST), bins)}
    if "input_features" in names:
        bins = _found(config, _BINS, 32)
        length = 2 * _found(config, ("max_source_positions",), 32)
        for size in dict.fromkeys([length, 64, 256]):
            yield {"input_features": _noise(BATCH, bins, size)}
            yield {"input_features": _noise(BATCH, size, bins)}


def _found(config: Any, names: tuple[str, ...], default: int) -> int:
    """The first of the attributes that is a number, here or in a part."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    parts = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return next((value for value in (_found(part, names, -1) for part in parts) if value >= 0), default)


def _side(config: Any) -> int:
    for one in (config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))):
        size = getattr(one, "image_size", None)
        size = size[0] if isinstance(size, list | tuple) and size else size
        if isinstance(size, int):
            return size
    return IMAGE


def _ids(config: Any) -> Tensor:
    """Ids of text, with no special one where the vocabulary allows that."""
    end = min(_found(config, ("vocab_size",), VOCABULARY), VOCABULARY)
    start = min(FIRST_TEXT, end // 2)
    return torch.randint(start, end, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


# What some models ask for beside their main inputs.
_MORE: dict[str, Callable[[], Tensor]] = {
    "bbox": lambda: torch.zeros(BATCH, TOKENS, 4, dtype=torch.long),
    "state": lambda: _noise(BATCH, WIDTH),
    "input_features_mask": lambda: torch.ones(BATCH, 64, dtype=torch.long),
    "query_embeds": lambda: _noise(BATCH, 4, WIDTH),
    "attention_mask": lambda: torch.ones(BATCH, TOKENS, dtype=torch.long),
}


def floats(out: Any) -> Iterator[Tensor]:
    """All tensors of numbers in what a model returns, but caches."""
    if isinstance(out, Tensor):
        if out.is_floating_point() and out.numel():
            yield out
    elif isinstance(out, ModelOutput | dict):
        for value in out.values():
            yield from floats(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from floats(value)
