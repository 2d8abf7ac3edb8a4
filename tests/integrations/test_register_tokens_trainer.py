"""Register tokens under the Trainer: at full rank, without decay, on both engines, and resumed."""

import pytest
import torch
from trainer_cases import (
    Run,
    assert_same,
    in_groups,
    llama,
    logged,
    names_of,
    projected_names,
    state_of,
    weights,
)

import hf_galore

pytestmark = pytest.mark.usefixtures("ours")

NAME = "model.bias_tokens.tokens"
OPTIMIZERS = ("adamw_torch", "galore_adamw", "galore_adamw_layerwise", "galore_adamw_8bit", "galore_adafactor")


def with_tokens(dtype=torch.float32):
    """A tiny model with three tokens, for which a matrix of one vector would not be enough."""
    return hf_galore.add_register_tokens(llama(dtype), 3)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_tokens_are_trained_at_full_rank_and_not_decayed(optim, tmp_path):
    model = with_tokens()
    before = weights(model)
    arguments = {"optim_target_modules": None} if optim == "adamw_torch" else {}
    trainer = Run(optim, tmp_path).trainer(model, weight_decay=0.1, **arguments)
    trainer.create_optimizer()
    names = names_of(trainer)
    decayed = {names[p] for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert NAME in in_groups(trainer)
    assert NAME not in decayed | projected_names(trainer)
    trainer.train()
    assert not torch.equal(weights(model)[NAME], before[NAME])
    sizes = [value.numel() for value in state_of(trainer)[NAME].values() if torch.is_tensor(value)]
    assert max(sizes) <= before[NAME].numel()


def test_both_engines_train_them_alike(tmp_path):
    """The projected backward is the same mathematics: right-side projection in both, in float64."""
    results = []
    for optim, exact in (("galore_adamw", ""), ("galore_adamw_layerwise", ", refresh=exact")):
        model = with_tokens(torch.float64)
        trainer = Run(optim, tmp_path / optim).train(model, optim_args=f", proj_type=right, subspace=svd{exact}")
        results.append((weights(model), logged(trainer, "loss")))
    (one, losses), (other, same_losses) = results
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-8)
    assert losses == pytest.approx(same_losses, rel=1e-5)


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_layerwise"])
def test_a_run_goes_on_from_its_checkpoint(optim, tmp_path):
    """The tokens are in the model's own checkpoint, and so is their state."""
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = Run(optim, tmp_path).train(with_tokens(), **arguments)
    resumed = Run(optim, tmp_path / "resumed").trainer(with_tokens(), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "loss")[-2:] == logged(whole, "loss")[-2:]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    found = [
        weights(Run("galore_adamw", tmp_path).train(with_tokens(), activation_checkpointing=on).model)
        for on in (False, True)
    ]
    assert_same(*found)
