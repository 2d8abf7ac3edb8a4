"""Weights that are stored as (in_features, out_features): `proj_type` means the side that it means for nn.Linear."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DecisionTransformerConfig,
    DecisionTransformerModel,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)
from transformers.pytorch_utils import Conv1D

from hf_galore import GaLoreAdamW
from hf_galore.param_groups import galore_param_groups
from hf_galore.subspace import PROJ_TYPES

WIDE, TALL, SQUARE = (16, 24), (24, 16), (16, 16)
OPTIONS = {"rank": 4, "update_proj_gap": 2, "scale": 1.0, "subspace": "svd", "equal_state": True}


def steps(module, groups, gradients, key=None):
    """The weight (m, n) after a step for each gradient (m, n)."""
    optimizer, weight = GaLoreAdamW(groups, lr=1e-2), module.weight
    for gradient in gradients:
        weight.grad = gradient.clone() if isinstance(module, nn.Linear) else gradient.mT.contiguous()
        optimizer.step()
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().mT


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE], ids=str)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_steps_are_those_of_the_linear_layer(proj_type, shape):
    """Through refreshes, in float64: the bases of a matrix and of its transpose differ by rounding, which Adam divides
    by the root of its small second moments."""
    m, n = shape
    linear, conv = nn.Linear(n, m, bias=False).double(), Conv1D(m, n).double()
    conv.weight.data.copy_(linear.weight.mT)
    gradients = [torch.randn(m, n, dtype=torch.float64) for _ in range(5)]
    results = [
        steps(module, galore_param_groups(nn.Sequential(module), proj_type=proj_type, **OPTIONS), gradients)
        for module in (linear, conv)
    ]
    assert (results[0] - results[1]).abs().max() <= 1e-10


def tiny(**names):
    return {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 16, "vocab_size": 32, **names}


MIXTURE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "intermediate_size": 24,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
MODELS = {
    "gpt2": (lambda: AutoModelForCausalLM.from_config(GPT2Config(**tiny(n_inner=24))), "c_attn", "lm_head"),
    "openai-gpt": (lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**tiny())), "c_fc", "lm_head"),
    "decision transformer": (
        lambda: DecisionTransformerModel(DecisionTransformerConfig(**tiny(hidden_size=16, state_dim=3, act_dim=2))),
        "c_fc",
        "embed_state",
    ),
    "gpt-oss": (lambda: AutoModelForCausalLM.from_config(GptOssConfig(**MIXTURE)), "experts", "q_proj"),
    "llama 4": (
        lambda: AutoModelForCausalLM.from_config(Llama4TextConfig(**MIXTURE, pad_token_id=0)),
        "experts",
        "q_proj",
    ),
}


@pytest.mark.filterwarnings("ignore:only .* are projected")
@pytest.mark.parametrize(("make", "transposed", "plain"), MODELS.values(), ids=MODELS)
def test_groups_say_which_weights_are_transposed(make, transposed, plain):
    model = make()
    groups = [group for group in galore_param_groups(model, [transposed, plain], rank=2) if "rank" in group]
    names = {id(param): name for name, param in model.named_parameters()}
    found = {names[id(param)]: group.get("transposed", False) for group in groups for param in group["params"]}
    assert found == {name: transposed in name for name in found}
    assert set(found.values()) == {True, False}


def test_an_optimizer_state_of_before_goes_on_where_the_side_is_the_same():
    """Groups did not say `transposed`; `std` meant the same side, `right` the other one."""

    def optimizer(proj_type, **keys):
        conv = Conv1D(24, 16)
        made = GaLoreAdamW([{"params": [conv.weight], "proj_type": proj_type, "rank": 4, **keys}])
        conv.weight.grad = torch.randn(16, 24)
        made.step()
        return made

    old = optimizer("std").state_dict()
    new = optimizer("std", transposed=True)
    new.load_state_dict(old)
    assert new.param_groups[0]["transposed"]
    new.step()
    with pytest.raises(ValueError, match="shape"):
        optimizer("right", transposed=True).load_state_dict(optimizer("right").state_dict())
