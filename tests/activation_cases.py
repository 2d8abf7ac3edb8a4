"""Tiny models of transformers, and massive activations planted into them at a known place.

A tiny random model has none. `plant` makes START and DELIMITER, or two patches of an image, carry a feature SIGN that
one neuron of block BORN turns into SIZE at feature MASSIVE, and that one of block DIED takes away again. Nothing else
writes these features.
"""

import torch
import transformers
from torch import nn

HIDDEN, HEADS, BLOCKS, VOCABULARY = 32, 4, 4, 64
START, DELIMITER = 1, 7  # token ids
SIGN, MASSIVE = 9, 21  # features
BORN, DIED, SIZE = 1, 3, 3000.0
PATCH = 5  # of an image: the position of its marked token

COMMON = {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
TEXT = COMMON | {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": START, "eos_token_id": 2}
LONG = {"max_position_embeddings": 128, "intermediate_size": 64}
GROUPED = {"num_key_value_heads": 2}
ONE = {"num_experts_per_tok": 1}
EXPERTS = ONE | {"num_local_experts": 2}
IMAGES = ("vit", "dinov2")


def _config(name: str, **kwargs) -> transformers.PreTrainedConfig:
    return getattr(transformers, f"{name}Config")(**kwargs)


CONFIGS = {
    "llama": lambda: _config("Llama", **TEXT, **LONG, **GROUPED),
    "mistral": lambda: _config("Mistral", **TEXT, **LONG, **GROUPED, sliding_window=6),
    "qwen3": lambda: _config("Qwen3", **TEXT, **LONG, **GROUPED, head_dim=8),
    "gemma3": lambda: _config(
        "Gemma3Text", **TEXT, **LONG, **GROUPED, head_dim=8, sliding_window=6, query_pre_attn_scalar=8
    ),
    "mixtral": lambda: _config("Mixtral", **TEXT, **LONG, **GROUPED, **EXPERTS),
    "phi": lambda: _config("Phi", **TEXT, **LONG),
    "gpt2": lambda: _config("GPT2", **TEXT, n_positions=128),
    "opt": lambda: _config("OPT", **TEXT, ffn_dim=64, max_position_embeddings=128, word_embed_proj_dim=HIDDEN),
    "gpt_neox": lambda: _config("GPTNeoX", **TEXT, **LONG),
    "falcon": lambda: _config("Falcon", **TEXT, bias=True, alibi=False),
    "bloom": lambda: _config("Bloom", **TEXT),
    "gptj": lambda: _config(
        "GPTJ", vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
    ),
    "gpt_oss": lambda: _config("GptOss", **TEXT, **LONG, **GROUPED, head_dim=8, **EXPERTS, sliding_window=6),
    "qwen3_moe": lambda: _config(
        "Qwen3Moe", **TEXT, **LONG, **GROUPED, head_dim=8, moe_intermediate_size=8, num_experts=2, **ONE
    ),
    "dinov2": lambda: _config("Dinov2", **COMMON, mlp_ratio=2, image_size=24, patch_size=8),
    "vit": lambda: _config("ViT", **COMMON, intermediate_size=64, image_size=24, patch_size=8),
}
PLANTED = ["llama", "mistral", "qwen3", "gpt2", "opt", "gpt_neox", "falcon", "bloom", "vit"]


def make(name: str, dtype: torch.dtype = torch.float64, attention: str = "eager", spread: float = 0.02) -> nn.Module:
    """A random model of this architecture, in eval mode; `spread` is the standard deviation of its weights."""
    torch.manual_seed(1)
    settings = CONFIGS[name]()
    settings.update({"init_std" if name == "opt" else "initializer_range": spread})
    settings._attn_implementation = attention
    kind = transformers.AutoModelForImageClassification if name in IMAGES else transformers.AutoModelForCausalLM
    return kind.from_config(settings).to(dtype).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Sequences that begin with START and have neither START nor DELIMITER again."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCABULARY, (batch, length), generator=generator)
    ids[:, 0] = START
    return ids


def inputs(name: str, batch: int = 3, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward, with delimiters at positions 4, 5, … of the rows, and again two further on."""
    if name in IMAGES:
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=generator, dtype=torch.float64)}
    ids = tokens(batch, length, seed)
    for row in range(batch):
        ids[row, 4 + row % 3] = ids[row, 6 + row % 3] = DELIMITER
    return {"input_ids": ids}


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The model's list of blocks, by the names that these architectures have for it."""
    found = [module for name, module in model.named_modules() if name.split(".")[-1] in ("layers", "layer", "h")]
    (blocks,) = found
    return blocks


def _matrices(block: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """What reads the residual stream in the MLP, and what writes to it."""
    modules = {name.split(".")[-1]: module for name, module in block.named_modules()}
    pairs = ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h")
    for reads, writes in pairs:
        if reads in modules:
            return [modules[reads]], modules[writes]
    if "c_fc" in modules:
        return [modules["c_fc"]], block.mlp.c_proj
    return [modules["gate_proj"], modules["up_proj"]], modules["down_proj"]


def _by_output(module: nn.Module) -> torch.Tensor:
    """The weight (out, in), as a view."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


@torch.no_grad()
def plant(model: nn.Module) -> nn.Module:
    """Plants the massive activations, and returns the model."""
    image = not hasattr(model, "lm_head") and not hasattr(model, "embed_out")
    for block in blocks_of(model):
        for module in block.modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                weight = _by_output(module)
                if weight.shape[0] == HIDDEN:
                    weight[[SIGN, MASSIVE]] = 0
                    if module.bias is not None:
                        module.bias[[SIGN, MASSIVE]] = 0
    if image:
        embeddings = model.vit.embeddings
        embeddings.position_embeddings[..., [SIGN, MASSIVE]] = 0
        embeddings.cls_token[..., [SIGN, MASSIVE]] = 0
        embeddings.patch_embeddings.projection.weight[[SIGN, MASSIVE]] = 0
        embeddings.patch_embeddings.projection.bias[[SIGN, MASSIVE]] = 0
        embeddings.position_embeddings[0, [0, PATCH], SIGN] = 40
        sample = {"pixel_values": torch.zeros(1, 3, 24, 24, dtype=model.dtype)}
    else:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight[:, [SIGN, MASSIVE]] = 0
        weight = model.get_input_embeddings().weight
        weight[[START, DELIMITER], SIGN] = 50 * weight.std()
        sample = {"input_ids": tokens(1, 4)}
    for number, feature, wanted in ((BORN, SIGN, SIZE), (DIED, MASSIVE, 0.0)):
        block = blocks_of(model)[number]
        _neuron(block, feature)
        size, neuron = _look(model, sample, block)
        _by_output(_matrices(block)[1])[MASSIVE, 0] = (wanted - size) / neuron
    return model


def _neuron(block: nn.Module, feature: int) -> None:
    """Makes neuron 0 of the block fire where this feature stands out, and write nothing."""
    reads, writes = _matrices(block)
    for module in reads:
        _by_output(module)[0] = 0
        _by_output(module)[0, feature] = 4
        if module.bias is not None:
            module.bias[0] = -8  # another token has at most 1 there
    _by_output(writes)[:, 0] = 0


def _look(model: nn.Module, sample: dict[str, torch.Tensor], block: nn.Module) -> tuple[float, float]:
    """Of the first token: feature MASSIVE after the block, and what neuron 0 puts out."""
    found = {}

    def after(module, args, output):
        found["size"] = float((output[0] if isinstance(output, tuple) else output)[0, 0, MASSIVE])

    def before(module, args):
        found["neuron"] = float(args[0].reshape(-1, args[0].shape[-1])[0, 0])

    handles = [block.register_forward_hook(after), _matrices(block)[1].register_forward_pre_hook(before)]
    try:
        model(**sample)
    finally:
        for handle in handles:
            handle.remove()
    return found["size"], found["neuron"]


@torch.no_grad()
def hidden_states(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What every block puts out: (batch, tokens, d) each, stored by hooks of our own.

    All but the last are compared with `output_hidden_states`, whose last is after the final norm.
    """
    found = []

    def after(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(after) for block in blocks_of(model)]
    try:
        states = model(**batch, output_hidden_states=True).hidden_states
    finally:
        for handle in handles:
            handle.remove()
    for ours, theirs in zip(found[:-1], states[1:-1], strict=True):
        assert torch.equal(ours, theirs)
    return found


def hooks(model: nn.Module) -> int:
    """How many hooks the modules have."""
    return sum(
        len(vars(module)[kind])
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks")
    )


PADDINGS = [
    *((name, None) for name in CONFIGS),
    *((name, side) for name in CONFIGS if name not in IMAGES for side in ("right", "left")),  # images have none
]


def delimiters(name):
    return () if name in IMAGES else (DELIMITER,)


def padded(name, side, batch=3, length=12):
    """Rows of 12, 9 and 6 tokens in one batch, without START and DELIMITER in the padding."""
    given = inputs(name, batch, length)
    if side is None:
        return given
    ids = given["input_ids"].clone()
    mask = torch.ones_like(ids)
    for row in range(batch):
        spare = 3 * row
        if side == "right" and spare:
            mask[row, length - spare :] = 0
        elif side == "left" and spare:
            ids[row] = ids[row].roll(spare)
            mask[row, :spare] = 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def dtype_for(name, side):
    """float64 where transformers has it.

    Its eager softmax is in float32, where the mask's −1.8e308 makes a row that is masked everywhere NaN; its products
    of experts are not for float64.
    """
    return torch.float32 if side is not None or name in ("mixtral", "gpt_oss", "qwen3_moe") else torch.float64


def kind_of(position, ids):
    """start, first_delimiter or other, by counting."""
    if position == 0:
        return "start"
    before = [] if ids is None else [at for at in range(1, len(ids)) if ids[at] == DELIMITER]
    return "first_delimiter" if before[:1] == [position] else "other"


class Boom(Exception):
    """Of the tests."""


def raise_boom(*_):
    raise Boom
