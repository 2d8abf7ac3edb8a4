"""A tiny model with a tokenizer, and TRL's trainers of it: shared by the tests of TRL's trainers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WORDS = ["<pad>", "<s>", "</s>", "what", "is", "plus", "?", *map(str, range(40))]
STEPS, SAVED = 4, 2
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": len(WORDS),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def question(number: int) -> str:
    return f"what is {number} plus {number} ?"


PAIRS = [{"prompt": question(n), "chosen": f" {2 * n}", "rejected": f" {2 * n + 1}"} for n in range(16)]
VERDICTS = [{"prompt": question(n), "completion": f" {2 * n}", "label": n % 2 == 0} for n in range(16)]
PROMPTS = [{"prompt": question(n)} for n in range(16)]


def is_even(completions: list[str], **_: Any) -> list[float]:
    """A reward."""
    return [float(words.strip()[-1:] in set("02468")) for words in completions]


GALORE = {"optim_target_modules": "all-linear", "optim_args": "rank=4, update_proj_gap=2, scale=1.0"}
GENERATION = {"num_generations": 4, "max_completion_length": 6}
# What makes each trainer: its data, arguments of its configuration, and its own.
TRAINERS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "DPO": (PAIRS, {}, {}),
    "KTO": (VERDICTS, {}, {}),
    "Reward": (PAIRS, {}, {}),
    "GRPO": (PROMPTS, GENERATION | {"beta": 0.1, "num_iterations": 2}, {"reward_funcs": is_even}),
    "RLOO": (PROMPTS, GENERATION, {"reward_funcs": is_even}),
}


def save_model(path: Path, config: PreTrainedConfig | None = None) -> Path:
    """Puts a tiny model and its tokenizer into the folder, from which trainers load their reference models."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config or LlamaConfig(**SHAPE)).save_pretrained(path)
    return path


def trl_trainer(
    name: str, model: Any, folder: Path, output_dir: Path, own: dict[str, Any] | None = None, **settings: Any
) -> Any:
    """The trainer of this name of the model, with the tokenizer in the folder: `STEPS` steps, saved every `SAVED`."""
    data, of_trainer, arguments = TRAINERS[name]
    config = getattr(trl, f"{name}Config")(
        output_dir=str(output_dir),
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_steps=SAVED,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **of_trainer | settings,
    )
    return getattr(trl, f"{name}Trainer")(
        model,
        args=config,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        **arguments | (own or {}),
    )
