"""examples/pretrain.py on a tiny model and a few text files; it goes on as a person runs it, in its own process."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from example_scripts import EXAMPLES, call

for package in ("transformers", "tokenizers", "matplotlib"):
    pytest.importorskip(package)
SCRIPT = EXAMPLES / "pretrain.py"
OPTIONS = ["--config", "tiny", "--max_steps", "4", "--text", "texts", "--save_steps", "2", "--output_dir", "out"]
METHODS = ["adamw_torch_fused", "galore_adamw", "galore_adamw_layerwise"]


def run_script(*arguments: str, cwd: Path) -> str:
    """The script's standard output."""
    command = [sys.executable, str(SCRIPT), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the standard output of one comparison, with checkpoints after 2 and 4 of 4 steps."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "texts").mkdir()
    for number in range(5):
        lines = [f"{number} and {line} are {number + line}; {line} squared is {line * line}.\n" for line in range(300)]
        (folder / "texts" / f"{number}.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        train = importlib.import_module("pretrain").train
    return folder, call("pretrain", *OPTIONS, cwd=folder, train_in_child=train)


@pytest.fixture(scope="module")
def results(finished):
    folder, _ = finished
    return {name: json.loads((folder / "out" / f"{name}.json").read_text()) for name in METHODS}


def test_prints_a_table_of_all_methods(finished):
    folder, output = finished
    table = (folder / "out" / "table.md").read_text()
    assert table in output
    assert [line.split()[1] for line in table.splitlines()[2:]] == METHODS
    assert "nan" not in table


def test_draws_the_losses(finished):
    folder, output = finished
    plot = folder / re.search(r"losses: +(\S+)", output)[1]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", METHODS)
def test_figures_are_finite(results, name):
    result = results[name]
    steps, losses = zip(*result["loss_curve"], strict=True)
    figures = [result[key] for key in ("perplexity", "tokens_per_second", "state_bytes", "peak_bytes")]
    assert steps == (1, 2, 3, 4)
    assert all(math.isfinite(figure) and figure > 0 for figure in (*figures, *losses))
    assert result["perplexity"] < 512  # that of guessing among the vocabulary
    assert (result["refresh_seconds"] > 0) == name.startswith("galore")


def test_methods_start_alike_and_galore_keeps_less(results):
    adamw, *others = results.values()
    for galore in others:
        assert galore["loss_curve"][0] == adamw["loss_curve"][0]
        assert galore["state_bytes"] < adamw["state_bytes"]


def test_resume_continues_from_the_last_checkpoint(finished, results):
    folder, _ = finished
    (folder / "out" / "galore_adamw.json").unlink()
    shutil.rmtree(folder / "out" / "galore_adamw" / "checkpoint-4")
    run_script(*OPTIONS, "--optim", "galore_adamw", "--resume", cwd=folder)
    resumed = json.loads((folder / "out" / "galore_adamw.json").read_text())
    assert resumed["steps"] == 2
    assert resumed["loss_curve"] == results["galore_adamw"]["loss_curve"]
    assert resumed["perplexity"] == results["galore_adamw"]["perplexity"]


@pytest.mark.slow
def test_processes_of_their_own_find_the_same(finished, results):
    folder, _ = finished
    run_script(*OPTIONS, "--optim", *METHODS[1:], "--output_dir", "children", cwd=folder)
    for name in METHODS[1:]:
        found = json.loads((folder / "children" / f"{name}.json").read_text())
        assert found["loss_curve"] == results[name]["loss_curve"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config 2m", "argument --config: invalid choice: '2m'"),
        ("--optim adam", "argument --optim: invalid choice: 'adam'"),
        ("--text nowhere.txt", "argument --text: no such file or folder: nowhere.txt"),
        ("--rank 0", "argument --rank: invalid positive int value: '0'"),
        ("--rank 400", "argument --rank: 400 is above the model's hidden_size, 320"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import pretrain

    with pytest.raises(SystemExit):
        pretrain.parse(arguments.split())
    assert message in capsys.readouterr().err
