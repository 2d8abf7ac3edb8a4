"""The explicit attention bias under the Trainer: at full rank, without decay, and as an adapter."""

import pytest
import torch
from attention_cases import biases
from trainer_cases import (
    Run,
    assert_same,
    in_groups,
    llama,
    logged,
    names_of,
    optimizer_of,
    projected_names,
    state_of,
    weights,
)

import hf_galore

pytestmark = pytest.mark.usefixtures("ours")

OPTIMIZERS = {
    "adamw_torch": "random",
    "galore_adamw": "noop",
    "galore_adamw_layerwise": "random",
    "galore_adamw_8bit": "noop",
    "galore_adafactor": "random",
}


def biased(implementation="sdpa", **options):
    """A tiny model with three columns, for which a matrix of one vector would not be enough."""
    model = llama()
    model.set_attn_implementation(implementation)
    return hf_galore.add_attention_bias(model, **{"n": 3, "start": "random", **options})


def columns(model):
    """The names of the columns' parameters."""
    return {name for name, _ in model.named_parameters() if ".kv_bias." in name}


@pytest.mark.parametrize(("optim", "start"), OPTIMIZERS.items())
def test_columns_are_trained_at_full_rank_and_not_decayed(optim, start, tmp_path):
    model = biased(start=start)
    before = weights(model)
    arguments = {"optim_target_modules": None} if optim == "adamw_torch" else {}
    trainer = Run(optim, tmp_path).trainer(model, weight_decay=0.1, **arguments)
    trainer.create_optimizer()
    names = names_of(trainer)
    decayed = {names[p] for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert columns(model) <= set(in_groups(trainer))
    assert not columns(model) & decayed
    assert not columns(model) & projected_names(trainer)
    trainer.train()
    after = weights(model)
    state = state_of(trainer)
    for name in columns(model):
        assert not torch.equal(after[name], before[name])
        assert all(value.numel() <= before[name].numel() for value in state[name].values() if torch.is_tensor(value))


def test_without_a_gradient_nothing_moves_them(tmp_path):
    """Decay at a rate of one half would be seen: k', v' whose gate is closed and stays so have no other cause."""
    model = biased(start="noop")
    for module in biases(model).values():
        module.kv_bias.gate.requires_grad_(False)
    before = weights(model)
    Run("galore_adamw", tmp_path).train(model, weight_decay=0.5, learning_rate=0.1)
    after = weights(model)
    assert_same({n: after[n] for n in columns(model)}, {n: before[n] for n in columns(model)})


def test_both_engines_train_them_alike(tmp_path):
    """The projected backward is the same mathematics: right-side projection in both, in float64."""
    results = []
    for optim, exact in (("galore_adamw", ""), ("galore_adamw_layerwise", ", refresh=exact")):
        model = biased("sdpa", start="random").double()
        trainer = Run(optim, tmp_path / optim).train(model, optim_args=f", proj_type=right, subspace=svd{exact}")
        results.append((weights(model), logged(trainer, "loss")))
    (one, losses), (other, same_losses) = results
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-8)
    assert losses == pytest.approx(same_losses, rel=1e-5)


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_layerwise"])
def test_a_run_goes_on_from_its_checkpoint(optim, tmp_path):
    """The columns are in the model's own checkpoint, under their names, and so is their state."""
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = Run(optim, tmp_path).train(biased(start="noop"), **arguments)
    resumed = Run(optim, tmp_path / "resumed").trainer(biased(start="noop"), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "loss")[-2:] == logged(whole, "loss")[-2:]


def test_an_adapter_trains_alone(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), hf_galore.AttentionBiasConfig(n=3, start="random"))
    before = weights(model)
    trainer = Run("adamw_torch", tmp_path).train(model, weight_decay=0.5, optim_target_modules=None)
    after = weights(model)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == columns(model) == {name for name, param in model.named_parameters() if param.requires_grad}
    names = {param: name for name, param in model.named_parameters()}
    for group in optimizer_of(trainer).param_groups:
        assert group["weight_decay"] == 0.0 or not [names[param] for param in group["params"]]


def test_in_plain_torch_groups_they_do_not_decay_either():
    model = biased()
    groups = hf_galore.galore_param_groups(model, rank=4, weight_decay=0.1)
    names = {param: name for name, param in model.named_parameters()}
    for group in groups:
        inside = {names[param] for param in group["params"]} & columns(model)
        assert not inside or (group["weight_decay"] == 0.0 and "rank" not in group)


def test_ternary_layers_train_beside_them(tmp_path):
    model = hf_galore.replace_linear(biased(start="noop"))
    before = weights(model)
    Run("galore_adamw", tmp_path).train(model)
    after = weights(model)
    assert all(not torch.equal(after[name], before[name]) for name in columns(model))
