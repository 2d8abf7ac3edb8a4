"""Text without an end: `python -m hf_galore stream`, examples/streaming.py and its benchmarks, at a tiny size."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LINE = r"\[(?P<tokens>[\d,]+) tokens \| [\d,.]+ tokens/s \| cache (?P<cache>[\d,.]+) MiB \| (process|GPU) [\d,]+ MiB\]"


def run(*command, cwd) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    result = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama with a tokenizer of bytes, whose favourite token ends the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0]).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[0] = 0  # a tie with the most probable token of every second step
    model.save_pretrained(folder)
    return folder


def test_stream(saved, tmp_path):
    options = ["--prompt", "One", "--n-sink", 2, "--window", 10, "--max-new-tokens", 90, "--every", 30]
    result = run("-m", "hf_galore", "stream", saved, *options, cwd=tmp_path)
    assert result.stdout.startswith("One")
    assert len(result.stdout) > 30
    figures = [match.groupdict() for match in re.finditer(LINE, result.stderr)]
    assert [line["tokens"] for line in figures] == ["30", "60", "90"]
    again = run("-m", "hf_galore", "stream", saved, *options, cwd=tmp_path)
    assert again.stdout == result.stdout
    greedy = run("-m", "hf_galore", "stream", saved, *options, "--temperature", 0, cwd=tmp_path)
    assert greedy.stdout != result.stdout


def test_example(saved, tmp_path):
    options = ["--tokens", 40, "--every", 20, "--window", 12]
    for extra in ([], ["--model", saved, "--cache", "dynamic"]):
        result = run(EXAMPLES / "streaming.py", *options, *extra, cwd=tmp_path)
        figures = [match.groupdict() for match in re.finditer(LINE, result.stderr)]
        assert [line["tokens"] for line in figures] == ["20", "40"]
        if not extra:
            assert figures[0]["cache"] == figures[1]["cache"] != "0.00"


def test_latency_benchmark(tmp_path):
    options = ["--shape", "tiny", "--windows", 8, 16, "--rounds", 2, "--results", "out"]
    script = EXAMPLES / "benchmarks" / "sink_cache.py"
    run(script, *options, cwd=tmp_path)
    run(script, *options, cwd=tmp_path)  # nothing is measured twice
    with (tmp_path / "out" / "sink_cache.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["window"] for row in rows] == ["8", "16"]
    for row in rows:
        assert all(float(row[f"{kind} ms"]) > 0 for kind in ("SinkCache", "DynamicCache", "recomputation"))
        assert row["device"]
        assert row["command"].startswith("python ")
    run(script, "--shape", "tiny", "--windows", 8, "--endless", 40, "--results", "out", cwd=tmp_path)
    with (tmp_path / "out" / "sink_cache_memory.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["tokens"]) for row in rows] == list(range(2, 41, 2))
    assert len({row["cache_bytes"] for row in rows}) == 1


def test_perplexity_benchmark(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text("def f(x):\n    return x\n" * 400)
    script = EXAMPLES / "benchmarks" / "sink_perplexity.py"
    options = ["--config", "tiny", "--text", "text", "--runs", "runs", "--results", "out", "--tokens", 200]
    run(script, *options, "--dense_tokens", 100, "--stride", 50, "--sinks", 0, 4, cwd=tmp_path)
    with (tmp_path / "out" / "sink_perplexity.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert {name: int(row["tokens"]) for name, row in rows.items()} == {
        "0 + 32": 199,
        "4 + 28": 199,
        "recomputation": 4,
        "dense": 99,
    }
    # Within the context all see the same.
    assert rows["0 + 32"]["within_context"] == rows["4 + 28"]["within_context"] == rows["dense"]["within_context"]
    assert (tmp_path / "out" / "sink_perplexity.png").stat().st_size > 1000
    result = run(script, *options, "--table", cwd=tmp_path)
    assert "| 4 + 28 | 0 | 199 |" in result.stdout
