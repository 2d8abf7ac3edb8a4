"""transformers' own methods for adapters, where they ask for a newer peft: the error says what to do instead."""

import peft
import pytest
import transformers
from attention_cases import inputs_of, model_of, outputs
from transformers.integrations import peft as transformers_peft

import hf_galore


@pytest.mark.parametrize("config", ["BitLinearConfig", "AttentionBiasConfig", "RegisterTokensConfig", "LoraConfig"])
def test_the_error_names_what_to_install_and_what_to_call(config, monkeypatch, ours):
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "99.0")
    model = model_of("llama")
    made = getattr(peft if config == "LoraConfig" else hf_galore, config)()
    advice = r"pip install 'peft>=99\.0', or call peft\.get_peft_model\(model, config\)"
    with pytest.raises(ValueError, match=advice):
        model.add_adapter(made)
    adapted = peft.get_peft_model(model, made)
    assert outputs(adapted, **inputs_of("llama")).isfinite().all()


def test_a_folder_that_the_auto_classes_refuse_is_loaded_as_the_error_says(monkeypatch, ours, tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained = peft.get_peft_model(base, hf_galore.RegisterTokensConfig(std=1.0))
    expected = outputs(trained, **inputs_of("llama"))
    trained.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "99.0")
    with pytest.raises(ValueError, match=r"or call .* peft\.PeftModel\.from_pretrained\(model, folder\)"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert outputs(loaded, **inputs_of("llama")).equal(expected)
