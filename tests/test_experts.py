"""Which parameters are the experts of a mixture: by what a model says of them, not by their shape."""

import pytest
import torch
import transformers
from torch import nn

from hf_galore import replace_linear
from hf_galore.experts import fused_experts, stores_transposed
from hf_galore.param_groups import find_targets

MOE = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32, "num_key_value_heads": 2}
PLAIN = {**MOE, "intermediate_size": 24, "pad_token_id": 0}
GATED = {"gate_up_proj", "down_proj"}
MIXTURES = {
    "one expert": ("Mixtral", {**PLAIN, "num_local_experts": 1, "num_experts_per_tok": 1}, GATED, False),
    "with biases": ("GptOss", {**PLAIN, "head_dim": 8, "num_local_experts": 3}, GATED, True),
    "no interface, transposed": ("Llama4", {**PLAIN, "num_local_experts": 3}, GATED, True),
    "no interface, several counts": (
        "LongcatFlash",
        {"num_layers": 1, "n_routed_experts": 3, "zero_expert_num": 2, "expert_ffn_hidden_size": 24},
        GATED,
        False,
    ),
    "one matrix a module": ("JetMoe", {**MOE, "intermediate_size": 24, "num_local_experts": 3}, {"weight"}, False),
    "no gate": ("NemotronH", {"layers_block_type": ["moe"], "n_routed_experts": 3}, {"up_proj", "down_proj"}, False),
}


def causal_lm(family, **options):
    config = getattr(transformers, family + ("TextConfig" if family == "Llama4" else "Config"))
    with torch.device("meta"):
        return getattr(transformers, family + "ForCausalLM")(config(**options))


@pytest.mark.parametrize(("family", "options", "names", "transposed"), MIXTURES.values(), ids=MIXTURES)
def test_experts_are_found_with_their_layout(family, options, names, transposed):
    if not hasattr(transformers, family + "ForCausalLM"):
        pytest.skip("newer than this transformers")
    model = causal_lm(family, **options)
    holders = {path: module for path, module in model.named_modules() if fused_experts(module)}
    assert holders
    assert {frozenset(fused_experts(module)) for module in holders.values()} == {frozenset(names)}
    assert {stores_transposed(module) for module in holders.values()} == {transposed}
    matrices = {name for name, param in model.named_parameters() if param.dim() == 3}
    assert find_targets(model, "all-linear") >= {name for name in matrices if not name.endswith("bias")}
    assert not {name for name in find_targets(model, "all-linear") if name.endswith("bias")}


AUDIO = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embeddings": 4}
OTHERS = {
    "weight-normed convolution": ("UniSpeechForCTC", {**AUDIO, **CONVOLUTIONS, "num_conv_pos_embedding_groups": 2}),
    "weight-normed convolution of another": (
        "SEWForCTC",
        {**AUDIO, **CONVOLUTIONS, "num_conv_pos_embedding_groups": 2, "squeeze_factor": 2},
    ),
    "grouped layers": ("ConvBertForMaskedLM", {"num_hidden_layers": 1, "num_groups": 2}),
    "heads apart": ("XLNetLMHeadModel", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "vocab_size": 32}),
    "relative attention": ("FunnelForMaskedLM", {"block_sizes": [1], "d_model": 16, "n_head": 2, "d_head": 8}),
}


@pytest.mark.parametrize(("name", "options"), OTHERS.values(), ids=OTHERS)
def test_other_parameters_of_three_dimensions_are_none(name, options):
    """They are not projected, and BitLinear takes the model."""
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**options))
    three = {name for name, param in model.named_parameters() if param.dim() == 3 and "original0" not in name}
    assert three
    assert not three & find_targets(model, "all-linear")
    assert replace_linear(model) is model


def test_a_stack_of_matrices_of_a_module_that_counts_no_experts():
    module = nn.Module()
    module.table = nn.Parameter(torch.zeros(4, 8, 8))
    assert not fused_experts(module)
    module.num_experts = 4
    assert set(fused_experts(module)) == {"table"}
