"""The BitNet examples: from nothing to text that plain transformers, in another process, writes."""

import importlib
import re

import pytest
from example_scripts import EXAMPLES, call


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # of TRL, which a teacher asks for logits
@pytest.mark.filterwarnings("ignore:.*a basis refresh found:UserWarning")  # the sums are few
def test_sft_ends_with_an_answer_of_plain_transformers(tmp_path):
    pytest.importorskip("trl")
    options = ["--use_cpu", "--max_steps=6", "--logging_steps=2", "--optim=galore_adamw_layerwise", "--teacher=0.1"]
    output = call("bitnet_sft", *options, "--output_dir=out", cwd=tmp_path)
    first, last = map(float, re.search(r"train loss: (\S+) at the start, (\S+) at the end", output).groups())
    assert last < first
    assert "28 ternary layers" in output
    assert "codes equal" in output
    assert "'ternary/flipped'" in output
    assert re.search(r"question: What is .*\nanswer: .*\n?expected: ", output, re.DOTALL)
    assert (tmp_path / "out" / "bitnet" / "model.safetensors").exists()


def test_pretraining_compares_and_writes(tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text("def f(x):\n    return x\n" * 400)
    options = ["--config=tiny", "--optim", "galore_adamw", "--text", str(text), "--output_dir=out"]
    monkeypatch.syspath_prepend(EXAMPLES)
    train = importlib.import_module("pretrain").train
    output = call("bitnet_pretrain", *options, cwd=tmp_path, train_in_child=train)
    for kind in ("full precision", "ternary"):
        assert re.search(rf"\| galore_adamw, {kind} +\| \d+\.\d\d", output)
    assert "14 ternary layers" in output
    assert "plain transformers, from out/galore_adamw_bitnet:\ndef" in output
    assert (tmp_path / "out" / "galore_adamw_bitnet" / "config.json").exists()
