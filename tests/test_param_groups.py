"""Which parameters are projected, and what the groups say."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

import hf_galore
from hf_galore.param_groups import find_targets, galore_param_groups

TINY = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
MOE = {**TINY, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
ATTENTION = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
LAYER = "model.layers.0."


def causal_lm(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def llama(**more):
    return causal_lm(LlamaConfig(**TINY, intermediate_size=24, **more))


def gpt2():
    return causal_lm(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=32, n_positions=32))


LLAMA_LINEAR = {LAYER + name for name in ATTENTION | {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}}

ALL_LINEAR = {
    "llama, untied head": (llama, LLAMA_LINEAR),
    "llama, tied head": (lambda: llama(tie_word_embeddings=True), LLAMA_LINEAR),
    "gpt2, Conv1D": (
        gpt2,
        {f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    ),
    "mixtral": (
        lambda: causal_lm(MixtralConfig(**MOE, num_local_experts=4)),
        {LAYER + name for name in ATTENTION | EXPERTS},
    ),
    "qwen3 moe": (
        lambda: causal_lm(Qwen3MoeConfig(**MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)),
        {LAYER + name for name in ATTENTION | EXPERTS},
    ),
    "gpt-oss": (
        lambda: causal_lm(GptOssConfig(**MOE, num_local_experts=4, num_experts_per_tok=2)),
        {LAYER + name for name in ATTENTION | EXPERTS},
    ),
    "llama classifier": (
        lambda: AutoModelForSequenceClassification.from_config(LlamaConfig(**TINY, intermediate_size=24)),
        LLAMA_LINEAR,
    ),
}


@pytest.mark.parametrize(("make", "expected"), ALL_LINEAR.values(), ids=ALL_LINEAR)
def test_all_linear(make, expected):
    assert find_targets(make(), "all-linear") == expected
    assert find_targets(make(), ["all_linear"]) == expected


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("q_proj", {"self_attn.q_proj"}),
        (["q_proj", "v_proj"], {"self_attn.q_proj", "self_attn.v_proj"}),
        (r".*\.(gate|up)_proj", {"mlp.gate_proj", "mlp.up_proj"}),
        ([r".*self_attn\.[qk]_proj", "down"], {"self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"}),
        ("mlp", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ("model.layers.0.self_attn.o_proj", {"self_attn.o_proj"}),
        (("attn", "mlp"), {name.removesuffix(".weight").removeprefix(LAYER) for name in LLAMA_LINEAR}),
    ],
)
def test_names_parts_of_names_and_expressions(target_modules, expected):
    assert find_targets(llama(), target_modules) == {f"{LAYER}{name}.weight" for name in expected}


def test_fused_experts_by_name():
    model = causal_lm(MixtralConfig(**MOE, num_local_experts=4))
    assert find_targets(model, ["experts"]) == {LAYER + name for name in EXPERTS}
    assert find_targets(model, r".*experts\.down_proj") == {LAYER + "mlp.experts.down_proj"}


@pytest.mark.parametrize(
    ("target_modules", "error", "match"),
    [
        ("q_porj", ValueError, "'q_porj' matches no module; near matches: .*q_proj"),
        (["q_proj", "nonsense"], ValueError, "'nonsense' matches no module; near matches: "),
        (["input_layernorm"], ValueError, "'input_layernorm' matches only modules without a matrix"),
        (["embed_tokens"], ValueError, "'embed_tokens' matches only modules without a matrix"),
        ("q_proj(", ValueError, r"'q_proj\(' is no valid regular expression"),
        ([], ValueError, "names no modules"),
        ("", ValueError, "names no modules"),
        (None, TypeError, "target_modules=None must be"),
        ([1], TypeError, "must be"),
        ({"q_proj": 8}, TypeError, "must be"),
    ],
)
def test_what_matches_nothing_is_an_error(target_modules, error, match):
    with pytest.raises(error, match=match):
        galore_param_groups(llama(), target_modules)


def test_frozen_parameters_are_in_no_group():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    groups = galore_param_groups(model, "all-linear", rank=4)
    grouped = {id(param) for group in groups for param in group["params"]}
    assert grouped == {id(param) for param in model.parameters() if param.requires_grad}
    assert id(frozen) not in grouped


def test_all_frozen_is_an_error():
    model = llama()
    for name, param in model.named_parameters():
        param.requires_grad_("proj" not in name)
    with pytest.raises(ValueError, match=r"leaves 0 parameters to project: .* every one is frozen"):
        galore_param_groups(model, "all-linear")


def test_a_tied_head_is_handled_once_and_projected_only_if_named():
    model = llama(tie_word_embeddings=True)
    assert find_targets(model, ["lm_head"]) == {"model.embed_tokens.weight"}
    groups = galore_param_groups(model, ["lm_head", "q_proj"], rank=4)
    params = [id(param) for group in groups for param in group["params"]]
    assert len(params) == len(set(params)) == len(list(model.parameters()))


def test_shared_modules_are_handled_once():
    layer = nn.Linear(8, 8)
    groups = galore_param_groups(nn.Sequential(layer, nn.ReLU(), layer), "all-linear", rank=2)
    assert [param for group in groups if "rank" in group for param in group["params"]] == [layer.weight]


def test_few_matched_parameters_warn_with_the_figure():
    model = causal_lm(LlamaConfig(**{**TINY, "vocab_size": 4000}, intermediate_size=24))
    with pytest.warns(UserWarning, match=r"only 1\.7% of the trainable parameters are projected"):
        galore_param_groups(model, "all-linear")


def test_convolutions_and_single_row_parameters_are_no_targets():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv1d(4, 4, 3), nn.Linear(4, 4)
            self.position = nn.Parameter(torch.zeros(1, 9, 4))

    assert find_targets(Net(), "all-linear") == {"linear.weight"}


def test_groups_carry_their_keys_and_weight_decay():
    model = llama()
    decays = {name for name, param in model.named_parameters() if param.dim() == 2}
    options = {"rank": 4, "update_proj_gap": 10, "scale": 2.0, "proj_type": "right", "subspace": "svd"}
    groups = galore_param_groups(model, ["self_attn"], weight_decay=0.1, decay_parameters=decays, **options)
    kinds = [("rank" in group, group["weight_decay"]) for group in groups]
    assert kinds == [(False, 0.1), (False, 0.0), (True, 0.1)]
    assert {key: groups[-1][key] for key in options} == options
    assert {id(p) for p in groups[-1]["params"]} == {
        id(param) for name, param in model.named_parameters() if "self_attn" in name
    }
    assert all("weight_decay" not in group for group in galore_param_groups(model, ["self_attn"]))


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_any_training_loop(make):
    """The groups in a bare torch loop: every weight moves and the loss falls."""
    model = make()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = hf_galore.GaLoreAdamW(galore_param_groups(model, "all-linear", rank=4, scale=1.0), lr=1e-2)
    tokens = torch.randint(0, 32, (4, 16))
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert not [name for name, param in model.named_parameters() if torch.equal(param, before[name])]


def test_peft_factors_are_projected_only_if_named():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["k_proj"]))
    trained_base = {"base_model.model.model.layers.0.self_attn.k_proj.modules_to_save.default.weight"}
    assert find_targets(model, "all-linear") == trained_base
    factors = find_targets(model, ["lora_A"])
    assert {name.split(".")[-3] for name in factors} == {"lora_A"}
    assert {name.split(".")[-3] for name in find_targets(model, r".*lora_[AB].*")} == {"lora_A", "lora_B"}


LISTS = [
    "q_proj,v_proj",
    "q_proj, v_proj",
    " q_proj v_proj,",
    '["q_proj", "v_proj"]',
    "['q_proj','v_proj']",
    "[q_proj, v_proj]",
    ["q_proj,", "v_proj"],  # a shell divides at spaces
    ["[q_proj,", "v_proj]"],
    r'[".*self_attn\\.q_proj", ".*\\.v_pro{1,2}j"]',
    r".*\.q_proj,.*\.v_proj",
]


@pytest.mark.parametrize("text", LISTS, ids=str)
def test_a_list_in_a_text(text):
    model = llama()
    assert find_targets(model, text) == find_targets(model, ["q_proj", "v_proj"])


@pytest.mark.parametrize("text", [r".*layers\.0{1,2}\..*_proj", "[a-z]+[.]layers[.]0[.](mlp|self_attn)[.].*"])
def test_a_regular_expression_with_what_divides_lists(text):
    """Every projection of the first layer."""
    model = causal_lm(LlamaConfig(**TINY | {"num_hidden_layers": 2}, intermediate_size=24))
    assert find_targets(model, text) == {name for name in find_targets(model, "all-linear") if ".0." in name}


def test_an_unknown_name_in_a_text_is_named():
    with pytest.raises(ValueError, match=r"'w_proj' matches no module; near matches: .*v_proj"):
        find_targets(llama(), "q_proj,w_proj")
    with pytest.raises(ValueError, match=r"matches no module.*a list on a command line is q_proj v_proj"):
        find_targets(llama(), r"(x{1,2}),y\.+")
