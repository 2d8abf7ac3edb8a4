"""TRL's trainers besides SFT (`tests/examples/test_sft.py`): preferences, rewards, and generation amid training."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_cases import assert_same, weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WORDS = ["<pad>", "<s>", "</s>", "what", "is", "plus", "?", *map(str, range(40))]
STEPS, SAVED = 4, 2


def question(number):
    return f"what is {number} plus {number} ?"


PAIRS = [{"prompt": question(n), "chosen": f" {2 * n}", "rejected": f" {2 * n + 1}"} for n in range(16)]
VERDICTS = [{"prompt": question(n), "completion": f" {2 * n}", "label": n % 2 == 0} for n in range(16)]
PROMPTS = [{"prompt": question(n)} for n in range(16)]


def is_even(completions, **_):
    """A reward."""
    return [float(words.strip()[-1:] in set("02468")) for words in completions]


GENERATION = {"num_generations": 4, "max_completion_length": 6}
# What makes each trainer: its data, arguments of its configuration, and its own.
TRAINERS = {
    "DPO": (PAIRS, {}, {}),
    "KTO": (VERDICTS, {}, {}),
    "Reward": (PAIRS, {}, {}),
    "GRPO": (PROMPTS, GENERATION | {"beta": 0.1, "num_iterations": 2}, {"reward_funcs": is_even}),
    "RLOO": (PROMPTS, GENERATION, {"reward_funcs": is_even}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, from which trainers load their reference models."""
    path = tmp_path_factory.mktemp("model")
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(**shape, **ids)).save_pretrained(path)
    return path


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_layerwise"])
@pytest.mark.parametrize("name", TRAINERS)
def test_trains_every_weight_and_resumes_to_the_bit(name, optim, folder, ours, tmp_path):
    data, settings, own = TRAINERS[name]
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path),
        optim=optim,
        optim_target_modules="all-linear",
        optim_args="rank=4, update_proj_gap=2, scale=1.0",
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_steps=SAVED,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )

    def trained(resume=None):
        torch.manual_seed(0)  # a head of rewards is not in the file
        kind, more = (
            (AutoModelForSequenceClassification, {"num_labels": 1}) if name == "Reward" else (AutoModelForCausalLM, {})
        )
        model = kind.from_pretrained(folder, **more)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        trainer = getattr(trl, f"{name}Trainer")(
            model, args=arguments, train_dataset=datasets.Dataset.from_list(data), processing_class=tokenizer, **own
        )
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
