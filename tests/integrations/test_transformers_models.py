"""Which parameters of real architectures the Trainer's GaLore names project, and that those train: mixtures of experts
with fused weights, GPT-2's Conv1D, tied embeddings, shared layers, frozen parameters, PEFT adapters."""

import itertools
import warnings

import pytest
import torch
import transformers
from parts import in_part
from safetensors.torch import load_file
from trainer_cases import (
    LAYERWISE,
    NAMES,
    RANK,
    Run,
    build,
    in_groups,
    layers_of,
    llama,
    projected_names,
    state_of,
    weights,
)

from hf_galore import subspace

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
MAIN = (NAMES[0], LAYERWISE[0])  # of each kind, one
ATTENTION = {f"self_attn.{which}_proj.weight" for which in "qkvo"}
FUSED = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def mixture(name, **changes):
    config, settings = MIXTURES[name]
    return build(config, **SMALL_HEADS, **settings | changes)


def named(model):
    """The names of all parameters, in alphabetical order."""
    return sorted(name for name, _ in model.named_parameters())


UNSWAPPED = "ignore:.* keep their full gradients:UserWarning"  # of targets that the projected backward cannot take


@pytest.mark.filterwarnings(UNSWAPPED)
@pytest.mark.parametrize(
    ("method", "name"), in_part(itertools.product(NAMES, MIXTURES), *itertools.product(MAIN, MIXTURES))
)
def test_mixture_of_experts(method, name, ours, tmp_path):
    """Attention and all experts are projected, each expert with its own basis; router, embeddings and head are not."""
    model = mixture(name)
    start = weights(model)
    trainer = Run(method, tmp_path).train(model)
    projected = projected_names(trainer)
    assert projected == {f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ATTENTION | FUSED}
    assert in_groups(trainer) == named(model)
    for part in sorted(f"model.layers.1.{part}" for part in FUSED):
        moved = (model.get_parameter(part).detach() - start[part]).flatten(1).norm(dim=1)
        assert (moved > 0).all(), f"{part}: some experts did not train"
        basis = state_of(trainer)[part]["basis"]
        rows, cols = start[part].shape[1:]
        inputs = rows if name == "gpt_oss" else cols  # its experts are stored as (in_features, out_features)
        assert basis.shape == (EXPERTS, inputs if method in LAYERWISE else min(rows, cols), RANK)
        gram = basis.mT @ basis
        torch.testing.assert_close(gram, torch.eye(RANK).expand_as(gram), rtol=0.0, atol=1e-5)
        assert not torch.allclose(basis[0], basis[1], atol=0.1)


@pytest.mark.parametrize("method", in_part(LAYERWISE, LAYERWISE[0]))
def test_fused_experts_keep_the_ordinary_path_with_one_warning(method, ours, tmp_path):
    """Attention is swapped, the experts go to the optimizer, with all of the low-rank keys but the side: `right`."""
    model = mixture("mixtral")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Run(method, tmp_path).train(model, max_steps=1)
    ours = [str(w.message) for w in caught if "hf_galore" in w.filename or "integrations" in w.filename]
    assert len(ours) == 1
    assert ours[0].startswith("4 of 12 target weights keep their full gradients")
    assert set(layers_of(trainer)) == {f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ATTENTION}
    (group,) = [group for group in trainer.optimizer.param_groups if group.get("rank")]
    assert {key: group[key] for key in ("rank", "update_proj_gap", "scale", "proj_type")} == {
        "rank": RANK,
        "update_proj_gap": 2,
        "scale": 1.0,
        "proj_type": "right",
    }


def test_the_subspace_method_is_that_of_the_experts_too(ours, tmp_path, monkeypatch):
    monkeypatch.setitem(subspace.SUBSPACES, "another", subspace.svd)
    with pytest.warns(UserWarning, match="keep their full gradients"):
        trainer = Run(LAYERWISE[0], tmp_path).train(mixture("mixtral"), max_steps=1, optim_args=", subspace=another")
    assert [group["subspace"] for group in trainer.optimizer.param_groups if group.get("rank")] == ["another"]


@pytest.mark.filterwarnings(UNSWAPPED)
@pytest.mark.parametrize("method", in_part(NAMES, *MAIN))
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
        assert in_groups(trainer).count("model.embed_tokens.weight") == 1
        assert ("model.embed_tokens.weight" in projected_names(trainer)) is projected, "the tied head was dropped"


def a_shared_layer_is_stepped_once(run):
    model = llama(use_cache=False)
    model.model.layers[1] = model.model.layers[0]
    trainer = run.train(model, max_steps=2)
    assert in_groups(trainer) == named(model)
    assert {int(state["step"]) for state in state_of(trainer).values()} == {2}


def frozen_parameters_are_in_no_group(run):
    model = llama()
    for param in (*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()):
        param.requires_grad_(False)
    start = weights(model)
    trainer = run.train(model)
    assert in_groups(trainer) == sorted(n for n, p in model.named_parameters() if p.requires_grad), "frozen too"
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


def whole_copies_are_projected(run):
    """modules_to_save holds trained copies, which are projected; the adapters beside them train at full rank."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(modules_to_save=["up_proj", "lm_head"], **settings))
    start = weights(model)
    keys = set(peft.get_peft_model_state_dict(model))
    trainer = run.train(model, save_strategy="steps", save_steps=2)
    copies = {name for name in start if "modules_to_save" in name}
    assert projected_names(trainer) == {name for name in copies if "up_proj" in name}
    trained = {name for name in start if "lora_" in name} | copies
    assert {name for name, value in weights(model).items() if not torch.equal(value, start[name])} == trained
    assert in_groups(trainer) == sorted(trained)
    assert set(load_file(run.folder / "checkpoint-2" / "adapter_model.safetensors")) == keys


def a_copied_head_trains(run):
    """PEFT's copy of the head is a head too: fused losses read its weight and call no module."""
    settings = {"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**settings))
    trainer = run.train(model, max_steps=1, optim_target_modules=["lm_head", "q_proj.lora_A"])
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    assert name in projected_names(trainer)
    assert name not in layers_of(trainer), "the head was swapped"


def weights_that_no_module_call_uses_train(run):
    """Mamba multiplies by dt_proj.weight and does not call dt_proj: it trains all the same, or a warning names it."""
    sizes = {"state_size": 4, "conv_kernel": 2, "time_step_rank": 8, "expand": 2, "use_mambapy": False}
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, use_cache=False, **sizes)
    model = transformers.MambaForCausalLM(config)
    start = weights(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(model)
    still = {name for name, value in weights(model).items() if torch.equal(value, start[name])}
    told = {name for name in still if any(name.removesuffix(".weight") in str(w.message) for w in caught)}
    assert still == told, "neither trained nor named"


def a_weight_of_two_modules_is_one_parameter(run):
    """Weight decay acts on it once in a step: (1 − lr·wd)^2 after two steps at a learning rate that moves nothing."""
    model = llama()
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight = first.weight
    start = weights(model)
    trainer = run.train(model, max_steps=2, learning_rate=1e-3, weight_decay=100.0, optim_args=", scale=0.0")
    assert in_groups(trainer) == named(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(weights(model)[name], start[name] * 0.9**2, rtol=1e-5, atol=0.0)
    assert second.weight is first.weight


ARCHITECTURES = [
    whole_copies_are_projected,
    a_copied_head_trains,
    weights_that_no_module_call_uses_train,
    a_weight_of_two_modules_is_one_parameter,
    experts_are_projected,
    gpt2_trains_projected,
    tied_embeddings_are_one_parameter,
    a_shared_layer_is_stepped_once,
    frozen_parameters_are_in_no_group,
    all_linear_spares_adapters,
    named_adapters_are_projected,
]


@pytest.mark.filterwarnings(UNSWAPPED, "ignore:only .* of the trainable parameters are projected:UserWarning")
@pytest.mark.parametrize("check", ARCHITECTURES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", in_part(NAMES, *MAIN))
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
