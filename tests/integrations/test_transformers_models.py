"""Which parameters of real architectures the Trainer's GaLore names project, and that those train: mixtures of experts
with fused weights, GPT-2's Conv1D, tied embeddings, shared layers, frozen parameters, PEFT adapters."""

import pytest
import torch
import transformers
from trainer_cases import (
    METHODS,
    RANK,
    Run,
    build,
    llama,
    projected_names,
    state_of,
    weights,
)

peft = pytest.importorskip("peft")

# PEFT 0.21 asks transformers 5.23 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")

EXPERTS = 4
MIXTURES = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": EXPERTS, "intermediate_size": 24}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": EXPERTS, "moe_intermediate_size": 24, "intermediate_size": 48, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {"num_local_experts": EXPERTS, "intermediate_size": 24, "num_experts_per_tok": 2},
    ),
}
SMALL_HEADS = {"head_dim": 16, "num_key_value_heads": 2}
ATTENTION = {f"self_attn.{which}_proj.weight" for which in "qkvo"}
FUSED = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def mixture(name, **changes):
    config, settings = MIXTURES[name]
    return build(config, **SMALL_HEADS, **settings | changes)


def in_groups(trainer):
    """The ids of all parameters in the optimizer's groups, in order."""
    return [id(param) for group in trainer.optimizer.param_groups for param in group["params"]]


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("method", METHODS)
def test_mixture_of_experts(method, name, ours, tmp_path):
    """Attention and all experts are projected, each expert with its own basis; router, embeddings and head are not."""
    model = mixture(name)
    start = weights(model)
    trainer = Run(method, tmp_path).train(model)
    projected = projected_names(trainer)
    assert projected == {f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ATTENTION | FUSED}
    assert sorted(in_groups(trainer)) == sorted(id(param) for param in model.parameters())
    for part in sorted(f"model.layers.1.{part}" for part in FUSED):
        moved = (model.get_parameter(part).detach() - start[part]).flatten(1).norm(dim=1)
        assert (moved > 0).all(), f"{part}: some experts did not train"
        basis = state_of(trainer)[part]["basis"]
        assert basis.shape == (EXPERTS, min(start[part].shape[1:]), RANK)
        gram = basis.mT @ basis
        torch.testing.assert_close(gram, torch.eye(RANK).expand_as(gram), rtol=0.0, atol=1e-5)
        assert not torch.allclose(basis[0], basis[1], atol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_experts_without_a_token(method, ours, tmp_path):
    """An expert that no token reaches keeps its weights, is warned of, and gets a basis that is no coordinate axes."""
    model = mixture("mixtral", num_experts_per_tok=1)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = torch.zeros_like(layer.mlp.gate.weight)
        layer.mlp.gate.weight.requires_grad_(False)  # all logits equal: the first expert gets every token
    start = weights(model)
    with pytest.warns(UserWarning, match="zero or not finite"):
        trainer = Run(method, tmp_path).train(model)
    for part in sorted(FUSED):
        name = f"model.layers.0.{part}"
        moved = (model.get_parameter(name).detach() - start[name]).flatten(1).norm(dim=1)
        busy = moved.argmax()
        assert moved[busy] > 0
        lonely = [expert for expert in range(EXPERTS) if moved[expert] == 0]
        assert len(lonely) == EXPERTS - 1
        basis = state_of(trainer)[name]["basis"]
        gram = basis.mT @ basis
        torch.testing.assert_close(gram, torch.eye(RANK).expand_as(gram), rtol=0.0, atol=1e-5)
        # A coordinate axis has an entry of 1. A random unit vector of length n >= 24 has one above 0.9 with
        # probability below 2n·(1 − 0.81)^((n−1)/2) < 1e-6.
        assert (basis[lonely].abs().amax(dim=1) < 0.9).all()
    assert all(value.isfinite().all() for value in weights(model).values())


def experts_are_projected(run):
    """Two thirds of this mixture: at a hidden size of 32 two tables of 128 × 32 are much; of Mixtral it is 97 %."""
    model = mixture("mixtral")
    trainer = run.train(model, max_steps=1)
    projected = sum(model.get_parameter(name).numel() for name in projected_names(trainer))
    assert projected / sum(param.numel() for param in model.parameters()) > 0.6, "the experts are not projected"


def gpt2_trains_projected(run):
    """GPT-2's matrices are transformers' Conv1D, not nn.Linear."""
    model = build(transformers.GPT2Config)
    trainer = run.train(model)
    layers = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    wanted = {f"transformer.h.{n}.{part}.weight" for n in (0, 1) for part in layers}
    assert projected_names(trainer) == wanted, "Conv1D is not projected"


def tied_embeddings_are_one_parameter(run):
    """A tied table is trained at full rank by "all-linear" and projected if the head is named; once, both times."""
    for targets, projected in (("all-linear", False), (["lm_head", "mlp"], True)):
        model = llama(tie_word_embeddings=True)
        trainer = run.train(model, max_steps=1, optim_target_modules=targets)
        assert in_groups(trainer).count(id(model.lm_head.weight)) == 1
        assert ("model.embed_tokens.weight" in projected_names(trainer)) is projected, "the tied head was dropped"


def a_shared_layer_is_stepped_once(run):
    model = llama(use_cache=False)
    model.model.layers[1] = model.model.layers[0]
    trainer = run.train(model, max_steps=2)
    assert sorted(in_groups(trainer)) == sorted(id(param) for param in model.parameters())
    assert {int(state["step"]) for state in state_of(trainer).values()} == {2}


def frozen_parameters_are_in_no_group(run):
    model = llama()
    for param in (*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()):
        param.requires_grad_(False)
    start = weights(model)
    trainer = run.train(model)
    assert sorted(in_groups(trainer)) == sorted(id(p) for p in model.parameters() if p.requires_grad), "frozen too"
    still = {name for name, value in weights(model).items() if torch.equal(value, start[name])}
    assert still == {name for name, param in model.named_parameters() if not param.requires_grad}


def lora_model():
    return peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def all_linear_spares_adapters(run):
    """In a LoRA model all that "all-linear" could project is frozen, or a factor that is low-rank already."""
    with pytest.raises(ValueError, match=r"leaves 0 parameters to project.*PEFT adapter"):
        run.train(lora_model())


def named_adapters_are_projected(run):
    """With lora_A named it is projected, lora_B trains at full rank, and the base stays as it is, in no group."""
    model = lora_model()
    start = weights(model)
    trainer = run.train(model, optim_target_modules=["lora_A"], optim_args=", rank=2")
    factors = {name for name in start if "lora_" in name}
    assert projected_names(trainer) == {name for name in factors if "lora_A" in name}
    assert {name for name, value in weights(model).items() if not torch.equal(value, start[name])} == factors
    assert len(in_groups(trainer)) == len(factors), "frozen parameters in a group"


ARCHITECTURES = [
    experts_are_projected,
    gpt2_trains_projected,
    tied_embeddings_are_one_parameter,
    a_shared_layer_is_stepped_once,
    frozen_parameters_are_in_no_group,
    all_linear_spares_adapters,
    named_adapters_are_projected,
]


@pytest.mark.parametrize("check", ARCHITECTURES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_architecture(method, check, ours, tmp_path):
    check(Run(method, tmp_path))


@pytest.mark.filterwarnings("ignore::FutureWarning:galore_torch")
@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (gpt2_trains_projected, AssertionError, "Conv1D is not projected"),
        (tied_embeddings_are_one_parameter, AssertionError, "the tied head was dropped"),
        (frozen_parameters_are_in_no_group, AssertionError, "frozen too"),
        (all_linear_spares_adapters, pytest.fail.Exception, "DID NOT RAISE"),
        (named_adapters_are_projected, AssertionError, "frozen parameters in a group"),
        (experts_are_projected, AssertionError, "the experts are not projected"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_galore_torch_does_not(check, error, message, incumbent, tmp_path):
    with pytest.raises(error, match=message):
        check(Run("galore_adamw", tmp_path))
