"""transformers' own methods for adapters, where they ask for a newer peft: the error says what to do instead."""

import peft
import pytest
from attention_cases import inputs_of, model_of, outputs
from transformers.integrations import peft as transformers_peft

import hf_galore


@pytest.mark.parametrize("config", ["BitLinearConfig", "AttentionBiasConfig", "RegisterTokensConfig", "LoraConfig"])
def test_the_error_names_what_to_install_and_what_to_call(config, monkeypatch, ours):
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "99.0")
    model = model_of("llama")
    made = getattr(peft if config == "LoraConfig" else hf_galore, config)()
    advice = r"pip install 'peft>=99\.0', or make the model with peft\.get_peft_model\(model, config\)"
    with pytest.raises(ValueError, match=advice):
        model.add_adapter(made)
    adapted = peft.get_peft_model(model, made)
    assert outputs(adapted, **inputs_of("llama")).isfinite().all()


def test_an_adapter_of_a_folder_is_switched_off_as_the_error_says(monkeypatch, ours, tmp_path):
    peft.get_peft_model(model_of("llama"), hf_galore.RegisterTokensConfig(std=1.0)).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "99.0")
    model = model_of("llama")
    model.load_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"or peft\.PeftModel\.from_pretrained\(model, folder\)"):
        model.disable_adapters()
    loaded = peft.PeftModel.from_pretrained(model_of("llama"), tmp_path)
    with loaded.disable_adapter():
        assert outputs(loaded, **inputs_of("llama")).equal(outputs(model_of("llama"), **inputs_of("llama")))
