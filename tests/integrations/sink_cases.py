"""Tiny models with rotary embeddings, and StreamingLLM written literally: keys without positions, rotated anew."""

import sys
from contextlib import contextmanager
from functools import partial

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from version_cases import with_cache

from hf_galore.integrations.decoders import KEEP_NO_KEYS, decoder_of

S, W = 3, 9
N = S + W
TOKENS = 5 * N
VOCAB = 64
# transformers' rotary tables are float32: angles of up to 60 radians, exact to 4e-6, in logits with slopes below 1
SINGLE_TABLES = {"rtol": 0, "atol": 1e-5}

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
_SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}

# model type, and what differs from _SMALL
ARCHITECTURES = {
    "llama": ("llama", {}),
    "llama_mha": ("llama", {"num_key_value_heads": 4, "head_dim": 12}),
    "llama_yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **_SCALED}}),  # scales cos and sin
    "llama_dynamic": (
        "llama",
        {
            "max_position_embeddings": 2 * N,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "llama_longrope": (  # other frequencies beyond the original length
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [8.0] * 4,
                **_SCALED,
                "original_max_position_embeddings": 2 * N,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_sliding": ("mistral", {"sliding_window": N}),  # in all layers, and sinks are within it
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma3": (  # a rotary embedding for each type of layer
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_neox": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi": ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "glm": ("glm", {"head_dim": 16, "pad_token_id": 0}),  # channels in pairs, and partial
    "olmo2": ("olmo2", {}),
    "modernbert": (  # its head is called `decoder`
        "modernbert-decoder",
        {"local_attention": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_oss": (  # sinks of its own, mixed layers, experts; half as many angles as channels
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "qwen3_next": (  # linear attention beside full, and experts
        "qwen3_next",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": (  # both in each layer
        "falcon_h1",
        {
            "head_dim": 16,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
}
LATENT = {  # heads of multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
}
_LATENT = {**LATENT, "v_head_dim": 6, "num_hidden_layers": 1, "first_k_dense_replace": 1}
# Of one layer, or of two that share keys: no key depends on what was evicted.
SHALLOW = {
    "llama": ("llama", {"num_hidden_layers": 1}),
    "deepseek_v2": ("deepseek_v2", _LATENT),  # latent attention, and angles that are complex numbers
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "minicpm3": ("minicpm3", _LATENT),
    "bailing_hybrid": ("bailing_hybrid", _LATENT | {"layer_types": ["full_attention"]}),  # no function that rotates
    "gemma4": (  # two layers with the same keys, which look up an input by the token's id
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "layer_types": ["full_attention"] * 2,
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    "lfm2_moe": (  # a rotary embedding of another name
        "lfm2_moe",
        {"num_hidden_layers": 1, "layer_types": ["full_attention"], "num_dense_layers": 1, "num_experts": 4},
    ),
}
STATES = {"qwen3_next", "lfm2", "falcon_h1"}  # layers of theirs keep states, and take no padding token by token
NO_SDPA = {"gpt_oss"}
BY_TYPE = {"gemma3", "modernbert"}  # a rotary embedding for each type of layer
PARTIAL = {"phi"}  # where the modeling file divides the channels before it rotates some


def build(name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes):
    """The model of ARCHITECTURES, seeded, with weights large enough that attention is not flat."""
    kind, own = (SHALLOW | ARCHITECTURES)[name]
    config = CONFIG_MAPPING[kind](**{**_SMALL, **own, **changes})
    attention = "eager" if name in NO_SDPA else attention
    torch.manual_seed(0)
    options = {"attn_implementation": attention, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **options).to(dtype).eval()
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def tokens(count: int = TOKENS, rows: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, count), generator=torch.Generator().manual_seed(1))


@contextmanager
def all_in_float64():
    """Modeling code that computes norms, softmax and rotary tables in float32 does so in float64."""
    names = {"float32": torch.float32, "float": torch.float}
    single = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    for name in names:
        setattr(torch, name, torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = single
        for name, value in names.items():
            setattr(torch, name, value)


class LiteralLayer(CacheLayerMixin):
    """Keys as they were before any rotation; all that are kept are rotated in each step, at their place among them."""

    is_sliding = False

    def __init__(self, n_sink, window, rope):
        super().__init__()
        self.n_sink, self.window, self.rope = n_sink, window, rope

    def lazy_initialization(self, key_states, value_states):
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        assert key_states.shape[2] == 1
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        if self.keys.shape[2] > self.n_sink + self.window:
            for name in ("keys", "values"):
                old = getattr(self, name)
                setattr(self, name, torch.cat([old[:, :, : self.n_sink], old[:, :, self.n_sink + 1 :]], 2))
        return self.rope(self.keys), self.values

    def get_mask_sizes(self, query_length):
        length = self.get_seq_length() + 1
        return length, 0

    def get_seq_length(self):
        return min(0 if self.keys is None else self.keys.shape[2], self.n_sink + self.window - 1)

    def get_max_length(self):
        return -1


class LiteralHybridLayer(LinearAttentionLayer, LiteralLayer):
    """That beside the states of the library."""

    def __init__(self, *args):
        LiteralLayer.__init__(self, *args)
        LinearAttentionLayer.__init__(self)

    def lazy_initialization(self, *args, **kwargs):
        (LiteralLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)


@torch.no_grad()
def literal_logits(name: str, model, ids: torch.Tensor, n_sink: int = S, window: int = W) -> torch.Tensor:
    """Logits (1, tokens, vocab) of one row, token by token. Native sliding layers keep their own window, no sinks."""
    decoder = decoder_of(model)
    modeling = sys.modules[type(decoder).__module__]
    apply = modeling.apply_rotary_pos_emb
    types, options = get_layer_types_and_kwargs(decoder.config)
    mixed = len(set(types)) > 1 or name == "falcon_h1"
    position = 0

    def rope(keys, kind):
        count = keys.shape[2]
        places = torch.arange(position + 1 - count, position + 1)[None]
        extra = [kind] if name in BY_TYPE else []
        cos, sin = decoder.rotary_emb(keys, places, *extra)
        part = cos.shape[-1] if name in PARTIAL else keys.shape[-1]
        turned = apply(keys[..., :part], keys[..., :part], cos, sin)[1]
        return torch.cat([turned, keys[..., part:]], -1)

    layers = []
    for kind, option in zip(types, options, strict=True):
        if kind in KEEP_NO_KEYS:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**option))
            continue
        native = mixed and kind == "sliding_attention"
        sizes = (0, decoder.config.sliding_window) if native else (n_sink, window)
        literal = LiteralHybridLayer if kind == "hybrid" else LiteralLayer
        layers.append(literal(*sizes, partial(rope, kind=kind)))
    cache = Cache(layers=layers)
    modeling.apply_rotary_pos_emb = lambda q, k, cos, sin, *rest: (apply(q, q, cos, sin, *rest)[0], k)
    try:
        out = []
        for index in range(ids.shape[1]):
            position = min(index, n_sink + window - 1)
            places = torch.tensor([[position]])
            # Every kept key is seen: no mask, in any layer.
            mask = dict.fromkeys({*types, "full_attention", "linear_attention"}) if mixed else None
            logits = model(
                ids[:, index : index + 1], position_ids=places, attention_mask=mask, **with_cache(model, cache)
            ).logits
            out.append(logits)
    finally:
        modeling.apply_rotary_pos_emb = apply
    return torch.cat(out, 1)


@torch.no_grad()
def fed(model, cache, ids: torch.Tensor, sizes=None, **kwargs) -> torch.Tensor:
    """Logits of all tokens, given to the model in pieces of these sizes, by default one by one."""
    pieces = ids.split(sizes or [1] * ids.shape[1], dim=1)
    out, seen = [], 0
    mask = kwargs.pop("attention_mask", None)
    for piece in pieces:
        seen += piece.shape[1]
        part = None if mask is None else mask[:, :seen]
        out.append(model(piece, attention_mask=part, use_cache=True, **with_cache(model, cache), **kwargs).logits)
    return torch.cat(out, 1)
