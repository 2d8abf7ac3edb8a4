"""Where a library has not what a feature rests on: one warning, that feature refused by name, and all others work."""

import subprocess
import sys
import warnings

import accelerate.accelerator
import peft.tuners.tuners_utils
import pytest
import torch
import transformers
from attention_cases import biases, inputs_of, model_of, outputs
from trainer_cases import Run, llama
from transformers import modeling_flash_attention_utils, trainer_optimizer

import hf_galore
from hf_galore.integrations import requirements
from hf_galore.versions import OLDEST


@pytest.fixture(autouse=True)
def _unregistered():
    """Each test starts and ends with all libraries as they are, and public names not yet looked up."""
    hf_galore.unregister()
    for name in hf_galore._HOME_OF.keys() - {"register", "unregister"}:
        vars(hf_galore).pop(name, None)
    yield
    hf_galore.unregister()


def registered_with(warning):
    with pytest.warns(UserWarning, match="off with the installed versions") as caught:
        hf_galore.register()
    assert len(caught) == 1
    assert warning in str(caught[0].message)


def test_nothing_is_off_here():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_galore.register()


def test_without_the_trainers_registry_the_optimizers_are_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.delattr(trainer_optimizer, "_OPTIMIZER_HANDLERS")
    registered_with("optim='galore_…' in transformers' Trainer (transformers ")
    trainer = Run("galore_adamw", tmp_path).trainer(llama(), max_steps=1)
    with pytest.raises(ImportError, match=r"is off: transformers .* has no .*trainer_optimizer\._OPTIMIZER_HANDLERS"):
        trainer.create_optimizer()
    model = hf_galore.add_attention_bias(model_of("llama"))
    assert biases(model)
    assert hf_galore.BitLinearConfig().target_modules == "all-linear"
    before = vars(transformers.Trainer)["create_optimizer"]
    hf_galore.unregister()
    assert vars(transformers.Trainer)["create_optimizer"] is not before


def test_without_what_the_kernels_call_the_attention_bias_alone_is_refused(monkeypatch):
    monkeypatch.delattr(modeling_flash_attention_utils, "_is_packed_sequence")
    registered_with("add_attention_bias (transformers ")
    for name in ("add_attention_bias", "remove_attention_bias", "AttentionBiasConfig"):
        with pytest.raises(
            ImportError, match=r"(add_attention_bias|AttentionBiasConfig) is off: .*\._is_packed_sequence"
        ):
            getattr(hf_galore, name)
    model = hf_galore.add_register_tokens(model_of("llama"))
    assert outputs(model, **inputs_of("llama")).isfinite().all()


def test_without_a_method_of_peft_the_adapters_of_bitlinear_alone_are_refused(monkeypatch):
    monkeypatch.delattr(peft.tuners.tuners_utils.BaseTuner, "_get_adapter_state_dict")
    registered_with("BitLinearConfig (peft ")
    with pytest.raises(ImportError, match=r"BitLinearConfig is off: peft .*\._get_adapter_state_dict\(model\)"):
        _ = hf_galore.BitLinearConfig
    adapted = peft.get_peft_model(model_of("llama"), hf_galore.RegisterTokensConfig())
    assert outputs(adapted, **inputs_of("llama")).isfinite().all()


def test_a_function_with_other_arguments_counts_as_missing(monkeypatch):
    """fsdp2_prepare_model is replaced by a function of ours, which is called as accelerate calls its own."""
    monkeypatch.setattr(accelerate.accelerator, "fsdp2_prepare_model", lambda model: model)
    registered_with("FSDP2 (accelerate ")
    with pytest.raises(ImportError, match=r"FSDP2 is off: .*fsdp2_prepare_model\(accelerator, model\)"):
        requirements.require(requirements.FSDP2)


def test_without_what_torch_tells_a_backward_pass_the_other_engine_trains(monkeypatch, tmp_path):
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    registered_with("the projected backward (optim='galore_…_layerwise') (torch ")
    with pytest.raises(ImportError, match=r"is off: torch .*_C\._current_graph_task_id"):
        Run("galore_adamw_layerwise", tmp_path).train(llama(), max_steps=1)
    Run("galore_adamw", tmp_path).train(llama(), max_steps=1)


# Versions.

OLD = """
import importlib.metadata as metadata, sys
package, real = sys.argv[1], metadata.version
metadata.version = lambda name: "0.9.1" if name == package else real(name)
import hf_galore
hf_galore.register()
"""


@pytest.mark.parametrize("package", ["transformers", "accelerate", "peft", "trl", "torch"])
def test_an_older_version_is_refused_in_one_line(package):
    """Before anything of it is imported, so that no other error comes first."""
    process = subprocess.run([sys.executable, "-c", OLD, package], capture_output=True, text=True)
    last = process.stderr.splitlines()[-1]
    assert last == (
        f"ImportError: hf_galore needs {package} {OLDEST[package]} or newer, and 0.9.1 is installed: "
        f"pip install '{package}>={OLDEST[package]}'"
    )
