"""Tiny models of many architectures, and the attention with columns as the paper writes it: for the tests of both."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.models.gptj import modeling_gptj

VOCABULARY = 99
LENGTH = 12
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_DEEPSEEK |= {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 4}),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 8}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        _GROUPED | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("PhiConfig", _GROUPED),
    "stablelm": ("StableLmConfig", _GROUPED),  # these two do not declare `_supports_attention_backend`
    "biogpt": ("BioGptConfig", {"hidden_dropout_prob": 0.0}),
    "mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", _GROUPED | _EXPERTS | {"head_dim": 8}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "llama4": (
        "Llama4TextConfig",
        _GROUPED | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 8},
    ),
    "modernbert_decoder": ("ModernBertDecoderConfig", {"local_attention": 8, "cls_token_id": 0, "sep_token_id": 1}),
}
# Attention that sdpa has not in transformers: capped scores, and native sinks.
EAGER_ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", _GROUPED | {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0}),
    "gpt_oss": ("GptOssConfig", _GROUPED | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 4}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {}),
    "vit": ("ViTConfig", {"image_size": 8, "patch_size": 4}),
}
UNREACHABLE = {
    "bloom": ("BloomConfig", {"n_layer": 1, "n_head": 2}),
    "falcon": ("FalconConfig", {}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 1, "n_heads": 2}),
    "gpt_neo": ("GPTNeoConfig", {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]}),
    "big_bird": ("BigBirdConfig", {"is_decoder": True, "attention_type": "original_full", "use_cache": False}),
    "xglm": ("XGLMConfig", {"d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32}),
}
# These go through the interface from transformers 5.24 on.
(DECODERS if "get_interface" in inspect.getsource(modeling_gptj) else UNREACHABLE).update(
    gptj=("GPTJConfig", {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}),
    codegen=("CodeGenConfig", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}),
)
MODELS = DECODERS | EAGER_ALONE | ENCODERS | UNREACHABLE


def model_of(
    name: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float64, **changes: Any
) -> transformers.PreTrainedModel:
    """The tiny model of the architecture, the same at every call, whose attention is far from uniform."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**_SIZES | settings | changes)
    makers: dict[str, Any] = {"vit": transformers.AutoModel, "bert": transformers.AutoModelForMaskedLM}
    maker = makers.get(name, transformers.AutoModelForCausalLM)
    config._experts_implementation = "eager"  # the others have no float64
    model = maker.from_config(config, attn_implementation=implementation)
    for param in model.parameters():
        if param.dim() > 1:
            nn.init.normal_(param, std=0.3)
    return model.to(dtype).eval()


def inputs_of(name: str, padded: bool = False) -> dict[str, Tensor]:
    """Two rows of random tokens, the first with three pads at its left if `padded`; or two images."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)}
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: nn.Module, **inputs: Tensor) -> Tensor:
    """The model's first output: logits, or hidden states of a model without a head."""
    with torch.no_grad():
        result: Tensor = model(**inputs)[0]
    return result


def biases(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules that have a bias, by path."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "kv_bias")}


def disturb(model: nn.Module) -> None:
    """Gives the columns' parameters values of the order of one, so that they weigh as much as a token."""
    generator = torch.Generator().manual_seed(2)
    for module in biases(model).values():
        for param in module.kv_bias.parameters():
            param.data.copy_(torch.randn(param.shape, generator=generator))


@contextlib.contextmanager
def literal_attention(columns: dict[nn.Module, Any]) -> Iterator[str]:
    """An attention implementation, by name, that computes every head of a module as the paper writes it.

    `columns` has the AttentionBias of each module; a module that is not in it has none.
    """

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any):
        scale, cap = options["scaling"], options.get("softcap")
        heads, per_key = query.shape[1], query.shape[1] // key.shape[1]
        bias = columns.get(module)

        def scores(q: Tensor, k: Tensor) -> Tensor:
            s = q @ k.mT * scale
            return s if cap is None else cap * torch.tanh(s / cap)

        results = []
        for h in range(heads):
            g = h // per_key
            s = scores(query[:, h], key[:, g])
            s = s if mask is None else s + mask[:, 0]
            sink = s.new_zeros(*s.shape[:2], 0)
            if options.get("s_aux") is not None:
                sink = options["s_aux"][h].expand(*s.shape[:2], 1)
            n = sink.shape[2]
            plain = torch.softmax(torch.cat([sink, s], -1), -1)[..., n:] @ value[:, g]
            if bias is not None:
                n_columns = bias.n
                k1 = torch.zeros(n_columns, key.shape[3], dtype=s.dtype)
                v1 = torch.zeros(n_columns, value.shape[3], dtype=s.dtype)
                if bias.kind == "key_value":
                    k1 = bias.key.view(key.shape[1], n_columns, -1)[g]
                    v1 = bias.value.view(key.shape[1], n_columns, -1)[g]
                s1 = scores(query[:, h], k1)
                if bias.kind == "sink_logits":
                    s1 = s1 + bias.logit.view(heads, n_columns)[h]
                p = torch.softmax(torch.cat([sink, s1, s], -1), -1)[..., n:]
                out = p[..., :n_columns] @ v1 + p[..., n_columns:] @ value[:, g]
                plain = out if bias.gate is None else plain + torch.tanh(bias.gate[h]) * (out - plain)
            results.append(plain)
        return torch.stack(results, 2), None

    AttentionInterface.register("literal", forward)
    AttentionMaskInterface.register("literal", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    try:
        yield "literal"
    finally:
        del AttentionInterface._global_mapping["literal"], AttentionMaskInterface._global_mapping["literal"]
