"""TRL's own training script and command, unchanged, with the GaLore optimizer on their command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from parts import slow

pytest.importorskip("trl")

OPTIONS = [
    *("--optim", "galore_adamw"),
    *("--optim_target_modules", "all-linear"),
    *("--optim_args", "rank=4, update_proj_gap=2, scale=1.0"),
    *("--learning_rate", "1e-2"),
    *("--max_steps", "3"),
    *("--logging_steps", "1"),
    *("--use_cpu", "true"),
    *("--bf16", "false"),
]
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' }}{% generation %}{{ message.content + eos_token }}"
    "{% endgeneration %}{% endfor %}"
)


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny model (model/) and chats (data/train.jsonl)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<|eos|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", chat_template=TEMPLATE)
    fast.save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), **shape)).save_pretrained(tmp_path / "model")

    chat = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join([json.dumps(chat)] * 24))
    return tmp_path


@pytest.mark.parametrize(
    "command", [slow(["-m", "trl.scripts.sft"], id="module"), pytest.param(["trl", "sft"], id="command")]
)
def test_sft(command, folder):
    paths = ["--model_name_or_path", "model", "--dataset_name", "data", "--output_dir", "out"]
    result = subprocess.run(
        [sys.executable, "-m", "hf_galore", "run", *command, *paths, *OPTIONS],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    checkpoint = folder / "out" / "checkpoint-3"
    logs = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert losses[-1] < losses[0] - 0.5
    # Only hf_galore's state has a basis; galore-torch's is a Python object, which weights_only refuses.
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    assert sum("basis" in state for state in states) == 7
