"""TRL's trainers besides SFT (`tests/examples/test_sft.py`): preferences, rewards, and generation amid training."""

import pytest
import torch
from trainer_cases import assert_same, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl_cases import GALORE, SAVED, TRAINERS, save_model, trl_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_layerwise"])
@pytest.mark.parametrize("name", TRAINERS)
def test_trains_every_weight_and_resumes_to_the_bit(name, optim, folder, ours, tmp_path):
    def trained(resume=None):
        torch.manual_seed(0)  # a head of rewards is not in the file
        kind, more = (
            (AutoModelForSequenceClassification, {"num_labels": 1}) if name == "Reward" else (AutoModelForCausalLM, {})
        )
        trainer = trl_trainer(name, kind.from_pretrained(folder, **more), folder, tmp_path, optim=optim, **GALORE)
        start = weights(trainer.model)
        trainer.train(resume_from_checkpoint=resume)
        return start, weights(trainer.model)

    start, final = trained()
    assert final.keys() == start.keys()
    assert [key for key, value in final.items() if torch.equal(value, start[key])] == []
    assert_same(trained(str(tmp_path / f"checkpoint-{SAVED}"))[1], final)


def test_a_reference_that_follows_the_policy(folder, ours, tmp_path):
    """TR-DPO with α = 1: after every step the reference is the policy."""
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    settings = GALORE | {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    optim = "galore_adamw_layerwise"
    trainer = trl_trainer("DPO", model, folder, tmp_path, {"ref_model": reference}, optim=optim, **settings)
    start = weights(trainer.model)
    trainer.train()
    assert_same(weights(trainer.ref_model), weights(trainer.model))
    assert [name for name, value in weights(trainer.model).items() if torch.equal(value, start[name])] == []
