"""TRL's trainers besides SFT (`tests/examples/test_sft.py`): preferences, rewards, and generation amid training."""

import pytest
import torch
from trainer_cases import assert_same, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl_cases import PAIRS, SAVED, TRAINERS, datasets, save_model, trl, trl_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_layerwise"])
@pytest.mark.parametrize("name", TRAINERS)
def test_trains_every_weight_and_resumes_to_the_bit(name, optim, folder, ours, tmp_path):
    galore = {"optim_target_modules": "all-linear", "optim_args": "rank=4, update_proj_gap=2, scale=1.0"}

    def trained(resume=None):
        torch.manual_seed(0)  # a head of rewards is not in the file
        kind, more = (
            (AutoModelForSequenceClassification, {"num_labels": 1}) if name == "Reward" else (AutoModelForCausalLM, {})
        )
        trainer = trl_trainer(name, kind.from_pretrained(folder, **more), folder, tmp_path, optim=optim, **galore)
        start = weights(trainer.model)
        trainer.train(resume_from_checkpoint=resume)
        return start, weights(trainer.model)

    start, final = trained()
    assert final.keys() == start.keys()
    assert [key for key, value in final.items() if torch.equal(value, start[key])] == []
    assert_same(trained(str(tmp_path / f"checkpoint-{SAVED}"))[1], final)


def test_a_reference_that_follows_the_policy(folder, ours, tmp_path):
    """TR-DPO with α = 1: after every step the reference is the policy."""
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path),
        optim="galore_adamw_layerwise",
        optim_target_modules="all-linear",
        optim_args="rank=4, update_proj_gap=2, scale=1.0",
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        max_steps=2,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
    )
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        ref_model=AutoModelForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )
    start = weights(trainer.model)
    trainer.train()
    assert_same(weights(trainer.ref_model), weights(trainer.model))
    assert [name for name, value in weights(trainer.model).items() if torch.equal(value, start[name])] == []
