"""The sweep itself: rows that must be ok, what counts as a refusal and what fails, and files that it goes on from."""

import subprocess
import sys
from pathlib import Path

import pytest
import sweep
import sweep_models
from sweep_checks import CHECKS, Failure, Subject, refusing

import hf_galore
from hf_galore.nn.convert import restore_linear

# class → checks that are refused with these words; all others are ok
ROWS = {
    "LlamaForCausalLM": {},
    "MixtralForCausalLM": {"bitlinear": "experts", "peft": "experts"},
    "BertForMaskedLM": {"registers": "attend to later ones", "sinks": "learned positions"},
    "T5ForConditionalGeneration": {
        "bias": "how many heads",
        "registers": "neither a decoder",
        "sinks": "",
        "activations": "several lists of blocks",
    },
    "ViTForImageClassification": {"sinks": ""},
    "CLIPModel": {"registers": "neither a decoder", "sinks": "", "activations": "several lists of blocks"},
}


@pytest.fixture(autouse=True)
def _registered():
    hf_galore.register()
    yield
    hf_galore.unregister()


@pytest.fixture(scope="module")
def subject():
    subjects = {}

    def make(name):
        if name not in subjects:
            model = sweep_models.build(name)
            subjects[name] = Subject(model, sweep_models.inputs_of(model))
        return subjects[name]

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_rows(name, subject):
    for check in CHECKS:
        cell = sweep.cell(check, subject(name))
        if check in ROWS[name]:
            assert cell.startswith(sweep.REFUSED), (check, cell)
            assert ROWS[name][check] in cell, check
        else:
            assert cell == sweep.OK, (check, cell)


@pytest.mark.parametrize(
    ("what", "starts"),
    [
        (lambda: restore_linear(None), "FAILS: AttributeError"),
        (lambda: hf_galore.LambdaWarmup(weight_steps=-1), "refused: "),
        (lambda: int("a"), "n/a: ValueError"),
    ],
    ids=["crash", "refusal", "another's"],
)
def test_only_our_own_errors_before_the_run_are_refusals(what, starts, monkeypatch):
    def check(_):
        with refusing():
            what()

    monkeypatch.setitem(CHECKS, "bias", check)
    assert sweep.cell("bias", None).startswith(starts)


def test_what_differs_or_is_raised_later_fails(monkeypatch):
    def differs(_):
        raise Failure("differs")

    for check in (differs, lambda _: hf_galore.LambdaWarmup(weight_steps=-1)):
        monkeypatch.setitem(CHECKS, "bias", check)
        row = {"class": "A", "bias": sweep.cell("bias", None)}
        assert sweep.fails(row) == ["bias"]


def test_a_class_without_a_tiny_model_says_why():
    with pytest.raises(sweep_models.NotBuilt, match="does not export"):
        sweep_models.build("NoModel")


def test_the_script_goes_on_from_its_file(tmp_path):
    script, file = Path(sweep.__file__), tmp_path / "sweep.csv"
    command = [sys.executable, script, "--checks", "activations", "--out", file, "--only"]
    for only in ("LlamaForCausalLM", "ViTForImageClassification"):
        subprocess.run([*command, only], check=True, capture_output=True)
    rows = sweep.read(file)
    assert [row["activations"] for row in rows.values()] == ["ok", "ok"]
    again = subprocess.run([*command, *rows], check=True, capture_output=True, text=True)
    assert "2 built, 0 not, 0 fail, in 0 s" in again.stdout
