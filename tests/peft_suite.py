"""Runs peft's own generic tests on BitLinear, offline: `python tests/peft_suite.py [options for pytest]`.

The tests are those of the source distribution of the installed peft, which pip fetches from PyPI and this script
unpacks into a temporary directory. They run as they are, but for this:

- They are parametrized with BitLinear (`cases`, `decoder_cases`) instead of peft's own methods, and with models made
  here from configurations (`MODELS`) instead of those of the hub. Tests of one method of peft are left out.
- Where a test tells parameters of an adapter by the prefix in their names, which those of layers in place have not, it
  asks the layers of the model (`is_adapters`).
- `merge_and_unload()` is asked for the weights that the layers compute with: weights="dequantized".
- Methods that have it are asked for an initialization that is not the identity; BitLinear never is, and has no such
  argument. What one of peft's methods does to the arguments of all of them, `check_beft_config`, is left out.
- `DESELECTED` are left out, and all but some of `PARTLY`, each for its reason.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch import nn

import hf_galore

FILES = ("test_custom_models.py", "test_decoder_models.py")

_SECOND = "adds a second adapter: whole weights are one to a model, and another is refused"
_PREFIX = "looks for the adapter's name in the names of parameters, which those of layers in place do not have"
_IDENTITY = "wants a fresh adapter to leave the model as it is: ternary weights are not the identity"
_MERGE = "activations in 8 bits are no part of a weight: without them (`weights alone`) the test runs"
DESELECTED = {
    "test_active_adapter": _SECOND,
    "test_adapter_dtype_autocast": _SECOND,
    "test_add_adapter_no_autocast_adapter_dtype": _SECOND,
    "test_delete_adapter": _SECOND,
    "test_delete_inactive_adapter": _SECOND,
    "test_delete_merged_adapter_only_rejects_the_merged_one": _SECOND,
    "test_load_model_low_cpu_mem_usage": _SECOND,
    "test_load_multiple_adapters": _SECOND,
    "test_merge_layers_multi": _SECOND,
    "test_save_pretrained_adapter_name_substring": _SECOND,
    "test_save_pretrained_selected_adapters": _SECOND,
    "test_save_pretrained_selected_adapters_pickle": _SECOND,
    "test_adapter_name": _PREFIX,
    "test_get_base_model_state_dict": "peft takes all that is on a layer for the adapter's; unload() gives the base",
    "test_delete_adapter_properly_cleans_up_after_itself": "keeps a container that a layer makes when it is asked",
    "test_disable_adapters": _IDENTITY,
    "test_disable_adapters_with_merging": _IDENTITY,
    "test_prompt_learning_with_gradient_checkpointing": "of prompt learning",
}
PARTLY = {  # those with this in their names run
    "test_merge_layers": ("weights alone", _MERGE),
    "test_merge_layers_nan": ("weights alone", _MERGE),
    "test_safe_merge": ("weights alone", _MERGE),
    "test_training_decoders_layer_indexing": ("names", "layers_to_transform goes with a list of names, as for LoRA"),
}


def cases() -> list[tuple]:
    """(name, model, config class, its arguments) of the tests of custom models."""
    from hf_galore.integrations.peft import BitLinearConfig

    arguments = {
        "MLP name": ("MLP", {"target_modules": "lin0"}),
        "MLP names": ("MLP", {"target_modules": ["lin0", "lin1"]}),
        "MLP regex": ("MLP", {"target_modules": "lin[01]"}),
        "MLP all-linear": ("MLP", {}),
        "MLP modules_to_save": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        "MLP weights alone": ("MLP", {"target_modules": ["lin0"], "quantize_activations": False}),
        "MLP_LayerNorm": ("MLP_LayerNorm", {"target_modules": ["lin0", "lin1"]}),
        "MLP2": ("MLP2", {"target_modules": ["lin0"]}),
        "EmbConv1D": ("EmbConv1D", {"target_modules": ["lin0"]}),
    }
    return [(name, model, BitLinearConfig, kwargs) for name, (model, kwargs) in arguments.items()]


def decoder_cases() -> list[tuple]:
    """(config class, its arguments) of the tests of decoders."""
    from hf_galore.integrations.peft import BitLinearConfig

    arguments = {
        "all-linear": {},
        "names": {"target_modules": ["q_proj", "v_proj"]},
        "weights alone": {"quantize_activations": False},
    }
    return [
        pytest.param(BitLinearConfig, {"task_type": "CAUSAL_LM", **kwargs}, id=name)
        for name, kwargs in arguments.items()
    ]


SIZES = {
    "initializer_range": 0.2,
    "vocab_size": 1024,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
MODELS = {
    "tiny-OPT": transformers.OPTConfig(**SIZES, ffn_dim=32, max_position_embeddings=64, word_embed_proj_dim=16),
    "tiny-GPTJ": transformers.GPTJConfig(
        vocab_size=1024, n_embd=16, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=2, eos_token_id=2
    ),
    "tiny-Llama": transformers.LlamaConfig(**SIZES, intermediate_size=32),
    "tiny-Qwen2": transformers.Qwen2Config(**SIZES, intermediate_size=32, num_key_value_heads=2),
    "tiny-Gemma3": transformers.Gemma3TextConfig(
        **SIZES, intermediate_size=32, num_key_value_heads=2, head_dim=8, bos_token_id=2
    ),
}


def main() -> int:
    """Fetches, unpacks, runs; the exit status of pytest."""
    name = f"peft=={version('peft')}"
    with tempfile.TemporaryDirectory() as folder:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*fetch, "--no-binary", ":all:", "--dest", folder, name], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (tests,) = Path(folder).glob("*/tests")
        adapt(tests)
        plugin = Plugin(Path(folder))
        options = ["-c", "/dev/null", "--rootdir", str(tests.parent), "-q", "--tb=short", "-p", "no:cacheprovider"]
        status = pytest.main([*options, *sys.argv[1:], *(str(tests / file) for file in FILES)], [plugin])
    plugin.summarize(name)
    return int(status)


def adapt(tests: Path) -> None:
    """Makes the folder of tests a package, whose tests ask the model which parameters are an adapter's."""
    (tests / "__init__.py").touch()
    for file in (*FILES, "testing_common.py"):
        text = (tests / file).read_text()
        text = re.sub(r"model\.prefix in (n|name)\b", r"is_adapters(model, \1)", text)
        text = text.replace("set_init_weights_false(config_cls, config_kwargs)", "config_kwargs")
        text = re.sub(r"^ +check_beft_config\(.*\)\n", "", text, flags=re.M)
        text = re.sub(r"\.merge_and_unload\((?=[s)])", ".merge_and_unload(weights='dequantized', ", text)
        text = re.sub(r"^import pytest\n", f"import pytest\nfrom {__name__} import is_adapters\n", text, flags=re.M)
        (tests / file).write_text(text)


def is_adapters(model: nn.Module, name: str) -> bool:
    """Whether the parameter is one of a layer of an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return any(name.startswith(path + ".") for path in layers)


class Plugin:
    """Parametrizes, deselects and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.deselected: Counter[str] = Counter()

    def pytest_sessionstart(self) -> None:
        """Registers the method, makes the models, and stands in for diffusers, which one class is imported from."""
        hf_galore.register()
        if "diffusers" not in sys.modules:
            sys.modules["diffusers"] = ModuleType("diffusers")
            sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        for name, config in MODELS.items():
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(self.folder / name)

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Puts our values in the place of peft's."""
        values = {
            "test_name,model_id,config_cls,config_kwargs": cases(),
            "config_cls,config_kwargs": decoder_cases(),
            "model_id": [str(self.folder / name) for name in MODELS],
        }
        marks = metafunc.definition.own_markers
        for position, mark in enumerate(marks):
            if mark.name == "parametrize" and isinstance(mark.args[0], str):
                names = mark.args[0].replace(" ", "")
                if names in values:
                    marks[position] = pytest.mark.parametrize(names, values[names]).mark

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        """Leaves out what is not parametrized by method, and what there is a reason for."""
        ours = {"test_custom_models": "test_name", "test_decoder_models": "config_cls"}
        chosen, others = [], []
        for item in items:
            module = item.module.__name__.rpartition(".")[2]
            arguments = getattr(item, "callspec", None)
            kwargs = {} if arguments is None else arguments.params
            if ours[module] not in kwargs or not {"config_cls", "config_kwargs"} <= set(kwargs):
                others.append(item)
            elif item.originalname in DESELECTED or PARTLY.get(item.originalname, [""])[0] not in item.name:
                self.deselected[item.originalname] += 1
                others.append(item)
            else:
                chosen.append(item)
        items[:] = chosen
        config.hook.pytest_deselected(items=others)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts outcomes."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1

    def summarize(self, name: str) -> None:
        """Prints what came of it."""
        outcomes = ", ".join(f"{self.counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        print(f"\n{name}: {outcomes}, {sum(self.deselected.values())} deselected:")
        reasons = DESELECTED | {test: reason for test, (_, reason) in PARTLY.items()}
        for test, count in sorted(self.deselected.items()):
            print(f"{count:5} {test}: {reasons[test]}")


if __name__ == "__main__":
    sys.exit(main())
