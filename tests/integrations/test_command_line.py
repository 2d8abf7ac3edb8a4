"""Target modules on command lines and in files of training scripts, in the forms in which people write lists."""

import json

import pytest
import yaml
from trainer_cases import LAYERWISE, METHODS, Run, llama, projected_names
from transformers import HfArgumentParser, TrainingArguments

WANTED = ["q_proj", "v_proj"]
FORMS = {
    "several": ["q_proj", "v_proj"],
    "commas": ["q_proj,v_proj"],
    "JSON": ['["q_proj", "v_proj"]'],
    "a shell without quotes": ["[q_proj,", "v_proj]"],
}
FILES = {"list": WANTED, "commas": "q_proj, v_proj", "JSON": '["q_proj", "v_proj"]'}
LETTERS = {f"model.layers.{layer}.self_attn.{name}.weight" for layer in (0, 1) for name in WANTED}


def parsers():
    trl = pytest.importorskip("trl")
    return HfArgumentParser(TrainingArguments), trl.TrlParser((trl.SFTConfig,))


def projected(arguments, folder, method=METHODS[0]):
    trainer = Run(method, folder).trainer(
        llama(intermediate_size=16), optim_target_modules=arguments.optim_target_modules
    )
    trainer.create_optimizer()
    return projected_names(trainer)


@pytest.mark.parametrize("method", [METHODS[0], LAYERWISE[0]])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_on_a_command_line(form, method, ours, tmp_path):
    for parser in parsers():
        for name in ("--optim_target_modules", "--optim-target-modules"):
            line = ["--output_dir", str(tmp_path), name, *form, "--use_cpu", "true", "--bf16", "false"]
            (arguments,) = parser.parse_args_into_dataclasses(line, look_for_args_file=False)
            assert arguments.use_cpu
    assert projected(arguments, tmp_path, method) == LETTERS


@pytest.mark.parametrize("value", FILES.values(), ids=FILES)
def test_in_a_file(value, ours, tmp_path):
    settings = {"output_dir": str(tmp_path), "optim_target_modules": value, "bf16": False, "use_cpu": True}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    plain, trl = parsers()
    read = [
        *plain.parse_yaml_file(str(tmp_path / "settings.yaml")),
        *plain.parse_json_file(str(tmp_path / "settings.json")),
        *trl.parse_args_and_config(["--config", str(tmp_path / "settings.yaml")]),
    ]
    assert [arguments.optim_target_modules for arguments in read] == [value] * 3
    assert projected(read[-1], tmp_path) == LETTERS


def test_one_value_stays_a_string(ours, tmp_path):
    """Other optimizers of transformers mean another thing by a list of one."""
    for parser in parsers():
        line = ["--output_dir", str(tmp_path), "--bf16", "false"]
        assert parser.parse_args_into_dataclasses(line, look_for_args_file=False)[0].optim_target_modules is None
        line += ["--optim_target_modules", "all-linear"]
        (arguments,) = parser.parse_args_into_dataclasses(line, look_for_args_file=False)
        assert arguments.optim_target_modules == "all-linear"
