"""examples/sft.py: from start to checkpoint, and on from there as a user runs it, in a child process, offline."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_scripts import EXAMPLES, call
from safetensors.torch import load_file

import hf_galore

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:.*a basis refresh found:UserWarning")
SCRIPT = EXAMPLES / "sft.py"
OPTIONS = ["--use_cpu", "--max_steps=6", "--save_steps=3", "--logging_steps=1", "--update_proj_gap=4"]


def child(*command, cwd) -> subprocess.CompletedProcess:
    """Run this Python with the command, in the folder `cwd`; its output folder is `cwd`/out."""
    env = {**os.environ, "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command), "--output_dir", "out"]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def losses(checkpoint: Path) -> list[float]:
    """The logged losses of all steps up to the checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


@pytest.fixture
def sft(tmp_path, monkeypatch):
    """The script, imported."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("sft", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the output of one run of the script."""
    folder = tmp_path_factory.mktemp("sft")
    return folder, call("sft", *OPTIONS, "--output_dir=out", cwd=folder)


def test_loss_falls_and_a_checkpoint_is_written(finished):
    folder, output = finished
    first, last = map(float, re.search(r"train loss: (\S+) at the start, (\S+) at the end", output).groups())
    assert last < first - 0.5
    assert re.search(r"question: What is .*\nanswer: .*\nexpected: ", output)
    assert len(losses(folder / "out" / "checkpoint-6")) == 6
    assert (folder / "out" / "model.safetensors").exists()
    assert (folder / "out" / "chat_template.jinja").exists()


def test_the_optimizer_is_ours(finished):
    state = torch.load(finished[0] / "out" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert any("basis" in tensors for tensors in state["state"].values())


def test_resumed_through_the_command_line_it_continues_the_run(finished, tmp_path):
    checkpoint = finished[0] / "out" / "checkpoint-3"
    child("-m", "hf_galore", "run", SCRIPT, *OPTIONS, "--resume_from_checkpoint", checkpoint, cwd=tmp_path)
    expected = losses(finished[0] / "out" / "checkpoint-6")
    # The same operations on the same numbers in one thread; the resumed run is in the middle of a subspace (4 steps).
    assert losses(tmp_path / "out" / "checkpoint-6") == pytest.approx(expected, rel=1e-6)


def test_the_layerwise_optimizer_trains_every_weight(tmp_path):
    """The loss falls, the optimizer's state is that of small parameters, and a checkpoint is that of a plain model.

    TRL's loss may read the head's weight without calling the head, which is therefore never swapped.
    """
    output = call("sft", *OPTIONS, "--optim=galore_adamw_layerwise", "--output_dir=out", cwd=tmp_path)
    first, last = map(float, re.search(r"train loss: (\S+) at the start, (\S+) at the end", output).groups())
    assert last < first - 0.5
    checkpoint = tmp_path / "out" / "checkpoint-6"
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    small = [state["exp_avg"].shape[1] for state in states if "basis" in state]
    assert small == [32] * 4 * 7
    start, end = (load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (3, 6))
    assert "lm_head.weight" in end
    assert not [name for name in end if "lowrank" in name]
    assert not [name for name, value in end.items() if torch.equal(value, start[name])]


def test_only_the_tokens_of_the_assistant_have_labels(sft, tmp_path, monkeypatch):
    texts = ["Be brief.", "1 + 1?", "2", "Sure?", "Yes, 2"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    long = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    chats = [{"messages": long}, {"messages": long[1:3]}]
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(map(json.dumps, chats)))
    monkeypatch.setattr(sys, "argv", ["sft.py", "--data", str(data), "--use_cpu", "--output_dir", str(tmp_path)])

    script, config = sft.parse_arguments()
    dataset = sft.load_chats(script.data)
    model, tokenizer = sft.make_tiny(dataset)
    tokenizer.chat_template = sft.CHAT_TEMPLATE
    trainer = sft.SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)

    batch = next(iter(trainer.get_train_dataloader()))
    inputs, labels = batch["input_ids"], batch["labels"]
    assert len(labels) == 2
    assert torch.equal(labels[labels != -100], inputs[labels != -100])
    learned = {tokenizer.decode(row[row != -100]) for row in labels}
    assert learned == {"2<|eos|>Yes, 2<|eos|>", "2<|eos|>"}


def test_questions_and_answers_become_messages(sft, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2", "source": "me"}')
    expected = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    assert sft.load_chats(str(data))[:] == {"messages": [expected]}


def test_other_data_is_refused(sft, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "1 + 1 = 2"}')
    with pytest.raises(SystemExit, match=r"--data .*needs `messages`, or `question` and `answer`; got \['text'\]"):
        sft.load_chats(str(data))


@pytest.mark.parametrize("name", ["nobody/nothing", "."])
def test_a_model_that_cannot_be_loaded_is_named(sft, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--use_cpu", "--model", name])
    monkeypatch.setattr(hf_galore, "register", lambda: None)
    with pytest.raises(SystemExit, match=f"--model {re.escape(name)}: no tokenizer in such a folder or on the hub"):
        sft.main()


def test_the_defaults_follow_the_model_and_the_optimizer(sft, monkeypatch):
    def parse(*options):
        monkeypatch.setattr(sys, "argv", ["sft.py", "--use_cpu", *options])
        return sft.parse_arguments()[1]

    tiny, real, adamw = parse(), parse("--model", "m"), parse("--optim", "adamw_torch", "--learning_rate", "1")
    assert tiny.optim_args == "rank=32, update_proj_gap=200, scale=1.0"
    assert real.optim_args == "rank=256, update_proj_gap=200, scale=4.0"
    assert (adamw.optim_args, adamw.learning_rate) == (None, 1.0)
    assert parse("--optim_args", "rank=1").optim_args == "rank=1"
