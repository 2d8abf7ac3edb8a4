"""Text without an end: `python -m hf_galore stream`, examples/streaming.py and its benchmarks, at a tiny size."""

import csv
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import hf_galore
from hf_galore.cli import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LINE = r"\[(?P<tokens>[\d,]+) tokens \| [\d,.]+ tokens/s \| cache (?P<cache>[\d,.]+) MiB \| (process|GPU) [\d,]+ MiB\]"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in this process, in a folder of the test, and returns what it printed (out, err)."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)

    def run_script(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr()

    yield run_script
    torch.set_num_threads(threads)
    hf_galore.unregister()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama with a tokenizer of bytes, whose first token after the prompt, if greedy, is that of an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(folder)
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
    with torch.no_grad():
        model.generation_config.eos_token_id = int(
            model(fast("One", return_tensors="pt").input_ids).logits[0, -1].argmax()
        )
    model.save_pretrained(folder)
    return folder


def test_stream(saved, capsys):
    options = ["--prompt", "One", "--n-sink", "2", "--window", "10", "--max-new-tokens", "90", "--every", "30"]

    def printed(*more):
        main(["stream", str(saved), *options, *more])
        return capsys.readouterr()

    first = printed()
    assert first.out.startswith("One")
    assert len(first.out) > 30
    figures = [match.groupdict() for match in re.finditer(LINE, first.err)]
    assert [line["tokens"] for line in figures] == ["30", "60", "90"]
    assert printed().out == first.out
    greedy = printed("--temperature", "0")
    assert greedy.out != first.out
    assert "[90 tokens" in greedy.err


def test_example(saved, run):
    options = ["--tokens", 40, "--every", 20, "--window", 12]
    for extra in ([], ["--model", saved, "--cache", "dynamic"]):
        result = run(EXAMPLES / "streaming.py", *options, *extra)
        figures = [match.groupdict() for match in re.finditer(LINE, result.err)]
        assert [line["tokens"] for line in figures] == ["20", "40"]
        if not extra:
            assert figures[0]["cache"] == figures[1]["cache"] != "0.00"


def test_latency_benchmark(tmp_path, run):
    options = ["--shape", "tiny", "--windows", 8, 16, "--rounds", 2, "--results", "out"]
    script = EXAMPLES / "benchmarks" / "sink_cache.py"
    run(script, *options)
    run(script, *options)  # nothing is measured twice
    with (tmp_path / "out" / "sink_cache.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["window"] for row in rows] == ["8", "16"]
    for row in rows:
        assert all(float(row[f"{kind} ms"]) > 0 for kind in ("SinkCache", "DynamicCache", "recomputation"))
        assert row["device"]
        assert row["command"].startswith("python ")
    run(script, "--shape", "tiny", "--windows", 8, "--endless", 40, "--results", "out")
    with (tmp_path / "out" / "sink_cache_memory.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["tokens"]) for row in rows] == list(range(2, 41, 2))
    assert len({row["cache_bytes"] for row in rows}) == 1


def test_perplexity_benchmark(tmp_path, run):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text("def f(x):\n    return x\n" * 400)
    script = EXAMPLES / "benchmarks" / "sink_perplexity.py"
    options = ["--config", "tiny", "--text", "text", "--runs", "runs", "--results", "out", "--tokens", 200]
    run(script, *options, "--dense_tokens", 100, "--stride", 50, "--sinks", 0, 4)
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
    anew, sinks = rows["recomputation"], rows["4 + 28"]
    assert anew["at_recomputed"] == anew["perplexity"]
    assert float(sinks["at_recomputed"]) == pytest.approx(float(anew["perplexity"]), rel=0.05)  # of the same four
    assert (tmp_path / "out" / "sink_perplexity.png").stat().st_size > 1000
    result = run(script, *options, "--table")
    assert "| 4 + 28 | 0 | 199 |" in result.out
