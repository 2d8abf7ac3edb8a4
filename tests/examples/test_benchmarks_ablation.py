"""examples/benchmarks/subspace_ablation.py on a tiny model: all kinds of methods train, at the best rates."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("transformers", "peft", "tokenizers"):
    pytest.importorskip(package)
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import ablation_run  # noqa: E402
import result_file  # noqa: E402
import subspace_ablation as script  # noqa: E402

from hf_galore.lowrank_backward import enable  # noqa: E402

METHODS = ["AdamW", "randomized + rotate", "streaming + rotate", "LoRA", "ReLoRA"]
TUNED = [name for name in METHODS if name != "streaming + rotate"]
RATES = ["--lr_matrices", "1e-3", "1e-2", "--lr_rest", "1e-2"]
TINY = script.Study(script.llama(32, 64, 2, 1, 300, 16), steps=8, rank=8, gap=3, batch=8, methods=METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small text."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "texts").mkdir()
    for number in range(4):
        lines = [f"{number} and {line} are {number + line}; {line} squared is {line * line}.\n" for line in range(60)]
        (folder / "texts" / f"{number}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def call(folder):
    """Calls the script on the tiny study with the runs in this process; returns how many there were."""

    def call(*arguments: str, measure=ablation_run.measure) -> int:
        runs = []
        common = ["--study", "tiny", "--text", folder / "texts", "--folder", folder, "--results", folder / "runs.csv"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(script.STUDIES, "tiny", TINY)
            patch.setattr(script, "measure_in_child", lambda *case: runs.append(case) or measure(*case))
            patch.setattr(sys, "argv", ["subspace_ablation.py", *map(str, common), *arguments])
            script.main()
        return len(runs)

    return call


@pytest.fixture(scope="module")
def tuned(folder, call):
    """The lines of a grid for all methods that have one."""
    assert call("--grid", *RATES, "--methods", *TUNED) == 2 * len(TUNED)
    return result_file.read(folder / "runs.csv")


@pytest.fixture(scope="module")
def finished(folder, call, tuned):
    """The lines of all methods with two seeds; those of seed 0 are the grid's, where there is one."""
    assert call("--seeds", "0", "1") == len(TUNED) + 2
    return result_file.read(folder / "runs.csv")


def test_asks_for_a_grid_first(call, folder):
    first = "--study tiny --grid --methods AdamW 'randomized + rotate'"
    with pytest.raises(SystemExit, match=re.escape(first)):
        call("--methods", "AdamW", "streaming + rotate", "--results", str(folder / "none.csv"))


def test_lines(finished):
    assert {line["method"] for line in finished} == set(METHODS)
    for line in finished:
        assert 1 < float(line["perplexity"]) < 400
        assert (line["study"], line["steps"], line["tokens"], line["text"]) == ("tiny", "8", "1024", "texts")
    state = {line["method"]: float(line["state_mib"]) for line in finished}
    assert max(state, key=state.get) == "AdamW"


def test_runs_at_the_best_rates(tuned, finished):
    for name in METHODS:
        whose = "randomized + rotate" if name == "streaming + rotate" else name
        best = min((line for line in tuned if line["method"] == whose), key=lambda line: float(line["perplexity"]))
        (line,) = (line for line in finished if (line["method"], line["seed"]) == (name, "1"))
        assert [line[column] for column in ("lr_matrices", "lr_rest")] == [best["lr_matrices"], best["lr_rest"]]
        assert line["rates_from"] == whose


@pytest.mark.parametrize("arguments", [("--grid", *RATES, "--methods", *TUNED), ("--seeds", "0", "1")])
def test_runs_nothing_twice(call, finished, arguments):
    assert call(*arguments) == 0


def test_table(call, finished, capsys):
    call("--table")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[0] for row in rows} == set(METHODS)
    means = [float(row[3].split(" ± ")[0]) for row in rows]
    assert means == sorted(means)
    adamw = next(row for row in rows if row[0] == "AdamW")
    assert (adamw[4], adamw[5]) == ("2", "+0.0 %")


def test_a_failure_loses_no_other_run(call, finished, folder, capsys):
    def measure(study, method, run, *rest):
        if run.method == "AdamW":
            raise subprocess.CalledProcessError(1, "python", stderr="out of luck")
        return ablation_run.measure(study, method, run, *rest)

    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        call("--methods", "AdamW", "LoRA", "--seeds", "2", measure=measure)
    assert "out of luck" in capsys.readouterr().err
    last = result_file.read(folder / "runs.csv")[-1]
    assert (last["method"], last["seed"]) == ("LoRA", "2")


def test_a_process_of_its_own_finds_the_same(finished, folder):
    line = finished[0]
    run = script.run_of(line)
    result = script.measure_in_child(TINY, script.METHODS[run.method], run, folder / "tiny", folder / "texts")
    assert float(result["perplexity"]) == pytest.approx(float(line["perplexity"]), rel=1e-4)


@pytest.fixture
def adapted():
    """A model in float64 with adapters that have been trained, their optimizer, and an input."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    model = ablation_run.with_adapters(model, {"0.weight", "2.weight"}, rank=2)
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=0.1)
    x = torch.randn(7, 6, dtype=torch.float64)
    for _ in range(2):  # the first moves B from zero, the second A too
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model, optimizer, x


def adapters(model):
    return {name: param for name, param in model.named_parameters() if "lora_" in name}


def test_a_merge_puts_the_adapters_into_the_matrices(adapted):
    model, _, x = adapted
    before, kept = model(x), {name: param.clone() for name, param in adapters(model).items()}
    with model.disable_adapter():
        assert not torch.allclose(model(x), before, atol=1e-3)
    for layer in model.modules():
        if isinstance(layer, ablation_run.LoraLayer):
            ablation_run.merge(layer)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert all(torch.equal(param, kept[name]) for name, param in adapters(model).items())


@pytest.mark.parametrize("inputs", [False, True])
def test_a_basis_of_the_inputs(inputs):
    """The gradient has three directions, the input is largest in three others."""
    layer = torch.nn.Linear(16, 12, bias=False)
    engine = enable(torch.nn.Sequential(layer), ["0"], rank=3, update_proj_gap=1, refresh="streaming", scale=1.0)
    if inputs:
        ablation_run.use_inputs(engine.bases, seed=0)
    optimizer = torch.optim.SGD(engine.param_groups(layer), lr=0.01)
    engine.attach(optimizer)
    rows, directions = torch.linalg.qr(torch.randn(40, 16)).Q, torch.linalg.qr(torch.randn(16, 16)).Q
    x = rows * torch.tensor([30.0] * 3 + [0.1] * 13) @ directions.T
    for _ in range(4):
        layer(x).backward(rows[:, 3:6] @ torch.randn(3, 12))
        optimizer.step()
        optimizer.zero_grad()
    wanted = directions[:, :3] if inputs else directions[:, 3:6]
    cosines = torch.linalg.svdvals(engine.bases[0].matrix.T @ wanted)
    assert cosines.min() > 0.99


def test_a_restart_leaves_the_function_as_it_is(adapted):
    model, optimizer, x = adapted
    before, old = model(x), {name: param.clone() for name, param in adapters(model).items()}
    ablation_run.restart(model, optimizer)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    for name, param in adapters(model).items():
        assert not torch.equal(param, old[name])
        assert param.any() == ("lora_A" in name)
    assert not optimizer.state
