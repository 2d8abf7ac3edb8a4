"""The benchmarks of the attention bias on tiny models: every case runs, and the files have its figures."""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_galore

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Lets the benchmarks be imported, and leaves no trace."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS.parent)
    yield
    torch.set_num_threads(threads)
    hf_galore.unregister()


def test_steps(tmp_path, monkeypatch):
    import attention_bias_step

    results = tmp_path / "results.csv"
    options = ["--shape", "tiny", "--tokens", "16", "--rounds", "1", "--decoded", "2", "--threads", "1", "--results"]
    monkeypatch.setattr(sys, "argv", ["attention_bias_step.py", *options, str(results)])
    for _ in range(2):  # the second time all rows are there
        attention_bias_step.main()
    rows = list(csv.DictReader(results.open()))
    cases = [(row["implementation"], row["phase"]) for row in rows]
    assert cases == [(one, phase) for one in ("sdpa", "eager") for phase in ("training", "decoding")]
    for row in rows:
        assert float(row["noop / plain"]) == pytest.approx(float(row["noop ms"]) / float(row["plain ms"]), abs=0.02)


def test_pretraining(monkeypatch):
    import attention_bias_pretraining as benchmark
    from corpus import Blocks

    shape = {"vocab_size": 64, "max_position_embeddings": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    study = benchmark.STUDY._replace(model=shape, steps=4, rank=4, gap=2, batch=2)
    rows = np.random.default_rng(0).integers(0, 64, (24, 16))
    monkeypatch.setattr(benchmark, "load", lambda *_: (Blocks(rows[:16]), Blocks(rows[16:])))
    monkeypatch.setattr(sys, "argv", ["attention_bias_pretraining.py", "--run", "…"])
    options = argparse.Namespace(folder=None, text=None)
    found = {variant: benchmark.measure(study, variant, 0, options) for variant in benchmark.VARIANTS}
    more = {variant: one["parameters"] - found["plain"]["parameters"] for variant, one in found.items()}
    assert more == {"plain": 0, "sink token": 16, "attention bias": 2 * 2 * 16, "off by one": 0}
    for variant, one in found.items():
        assert 0.0 < float(one["int8 by token"]) <= float(one["int8 by tensor"]) < 0.02, variant
        assert 1.0 < float(one["perplexity"]) < 128.0, variant
    text = {"text": "t", "n": 1}
    table = benchmark.tables([{"variant": variant, **text, **map_to_text(one)} for variant, one in found.items()])
    assert all(f"| {variant} | 1 |" in table for variant in benchmark.VARIANTS)


def map_to_text(row: dict) -> dict[str, str]:
    """A row as the CSV has it."""
    return {name: str(value) for name, value in row.items()}
