"""The BitNet examples as a user runs them: from nothing to text that plain transformers writes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(script, *arguments, cwd) -> str:
    env = {**os.environ, "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_sft_ends_with_an_answer_of_plain_transformers(tmp_path):
    pytest.importorskip("trl")
    options = ["--use_cpu", "--max_steps=6", "--logging_steps=2", "--optim=galore_adamw_layerwise", "--teacher=0.1"]
    output = run("bitnet_sft.py", *options, "--output_dir=out", cwd=tmp_path)
    first, last = map(float, re.search(r"train loss: (\S+) at the start, (\S+) at the end", output).groups())
    assert last < first
    assert "28 ternary layers" in output
    assert "codes equal" in output
    assert "'ternary/flipped'" in output
    assert re.search(r"question: What is .*\nanswer: .*\n?expected: ", output, re.DOTALL)
    assert (tmp_path / "out" / "bitnet" / "model.safetensors").exists()


def test_pretraining_compares_and_writes(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text("def f(x):\n    return x\n" * 400)
    options = ["--config=tiny", "--optim", "galore_adamw", "--text", str(text), "--output_dir=out"]
    output = run("bitnet_pretrain.py", *options, cwd=tmp_path)
    for kind in ("full precision", "ternary"):
        assert re.search(rf"\| galore_adamw, {kind} +\| \d+\.\d\d", output)
    assert "14 ternary layers" in output
    assert "plain transformers, from out/galore_adamw_bitnet:\ndef" in output
    assert (tmp_path / "out" / "galore_adamw_bitnet" / "config.json").exists()
