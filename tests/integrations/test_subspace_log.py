"""Statistics of refreshes in the Trainer's log, and the picture that the command line draws of them."""

import json

import pytest
from trainer_cases import LAYERWISE, NAMES, Run, assert_same, llama, logged, weights

from hf_galore.cli import main

STEPS, GAP = 5, 2
MATRICES = [f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
MEASURES = {"captured_energy", "overlap", "stable_rank", "seconds"}
EXACT = [(name, ", refresh=exact") for name in LAYERWISE]
SETTINGS = {"max_steps": STEPS, "optim_target_modules": ["q_proj", "up_proj"]}


def statistics_in(trainer):
    """{parameter: {measure: {step: value}}}"""
    found = {}
    for log in trainer.state.log_history:
        for key, value in log.items():
            if key.startswith("subspace/"):
                name, _, measure = key.removeprefix("subspace/").rpartition("/")
                found.setdefault(name, {}).setdefault(measure, {})[log["step"]] = value
    return found


def run(optim, folder, variant=""):
    return Run(optim, folder).train(llama(), **SETTINGS, optim_args=f", statistics=true{variant}")


@pytest.mark.parametrize(("method", "variant"), [*((name, "") for name in NAMES), *EXACT])
def test_every_refresh_of_every_matrix_is_logged(method, variant, ours, tmp_path):
    """Under the parameter's name, in the steps 1, 3, 5, with what the engine can know."""
    trainer = run(method, tmp_path, variant)
    found = statistics_in(trainer)
    assert sorted(found) == sorted(MATRICES)
    streaming = method.endswith("_layerwise") and not variant
    for measures in found.values():
        assert set(measures) == MEASURES - ({"stable_rank"} if streaming else set())
        for measure, values in measures.items():
            first = measure == "overlap" and not method.endswith("_layerwise")  # nothing is before the first basis
            assert list(values) == [3, 5] if first else [1, 3, 5]
        assert all(0 < value <= 1.01 for value in measures["captured_energy"].values())
        assert all(0 <= value <= 1 for value in measures["overlap"].values())
        assert all(value >= 1 for value in measures.get("stable_rank", {1: 1}).values())
    assert len(logged(trainer, "loss")) == STEPS


@pytest.mark.parametrize("method", NAMES)
def test_watching_changes_nothing(method, ours, tmp_path):
    watched = run(method, tmp_path)
    alone = Run(method, tmp_path).train(llama(), **SETTINGS)
    assert not statistics_in(alone)
    assert_same(weights(watched.model), weights(alone.model))


def test_a_second_train_logs_each_refresh_once(ours, tmp_path):
    trainer = Run("galore_adamw", tmp_path).trainer(llama(), **SETTINGS, optim_args=", statistics=true")
    trainer.train()
    trainer.train()
    assert len(trainer.callback_handler.callbacks) == len(set(map(id, trainer.callback_handler.callbacks)))
    assert sum(type(callback).__name__ == "SubspaceLog" for callback in trainer.callback_handler.callbacks) == 1


def test_a_malformed_value_is_a_clear_error(ours, tmp_path):
    with pytest.raises(ValueError, match="statistics='maybe' is not true or false"):
        Run("galore_adamw", tmp_path).train(llama(), optim_args=", statistics=maybe")


# The picture.


@pytest.fixture
def finished(tmp_path, ours):
    trainer = run("galore_adamw", tmp_path)
    trainer.save_state()
    return tmp_path


def test_plot(finished, capsys):
    main(["plot-subspace", str(finished)])
    assert (finished / "subspace.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| q_proj", "| up_proj"]
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    found = [key for entry in history for key in entry if key.startswith("subspace/")]
    assert len(found) == len(MATRICES) * (4 * 3 - 1)


def test_plot_takes_the_latest_checkpoint(finished, tmp_path, capsys):
    late = tmp_path / "checkpoint-9"
    late.mkdir()
    key = "subspace/model.layers.0.mlp.down_proj.weight/overlap"
    (late / "trainer_state.json").write_text(json.dumps({"global_step": 9, "log_history": [{"step": 9, key: 0.25}]}))
    main(["plot-subspace", str(tmp_path), "--out", str(tmp_path / "one.png")])
    assert "| down_proj | - | 0.25 → 0.25 | - |" in capsys.readouterr().out
    assert (tmp_path / "one.png").exists()


@pytest.mark.parametrize(("history", "message"), [(None, "no trainer_state.json"), ([], "no statistics of bases")])
def test_nothing_to_plot_is_a_clear_error(history, message, tmp_path):
    if history is not None:
        (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": history}))
    with pytest.raises(SystemExit, match=message):
        main(["plot-subspace", str(tmp_path)])
