"""After everything has been used and undone, libraries, torch and models are what they were before."""

import gc
import sys
from weakref import WeakSet

import pytest
import torch
import transformers
from activation_cases import delimiters, inputs, make, plant
from peft import PeftType, get_peft_model
from torch.nn.modules import module as torch_modules
from torch.optim import optimizer as torch_optimizers
from trainer_cases import NAMES, Run, build, optimizer_of, tokens
from transformers import GPT2Config, GPTNeoXConfig, Qwen3Config
from transformers.training_args import OptimizerNames

import hf_galore
from hf_galore.integrations.accelerate import unwrap_launch_command, wrap_launch_command
from hf_galore.nn import bitlinear

LIBRARIES = ("transformers", "accelerate", "peft", "trl", "bitsandbytes", "deepspeed", "torch")
BATCH = torch.stack([sample["input_ids"] for sample in tokens(2)])


def qwen():
    return build(Qwen3Config, num_key_value_heads=2, head_dim=16, intermediate_size=64)


FAMILIES = [lambda: build(GPT2Config), lambda: build(GPTNeoXConfig), qwen]


def attributes():
    """(module or class, name) → what is there, in all that has been imported of the libraries."""
    seen = {}
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] in LIBRARIES:
            for name, value in list(vars(module).items()):
                seen[path, name] = value
                if isinstance(value, type) and value.__module__ == path:
                    seen |= {(f"{path}.{name}", key): item for key, item in vars(value).items()}
    return seen


def is_ours(thing):
    home = getattr(thing, "__module__", None) or getattr(type(thing), "__module__", "")
    return isinstance(home, str) and home.partition(".")[0] == "hf_galore"


def ours_in(seen):
    """Where there is something of ours: as an attribute, or in a list, dict or set that is one."""
    found = []
    for where, value in seen.items():
        kinds = {dict: lambda d: [*d.keys(), *d.values()], list: list, set: list, tuple: list}
        inside = kinds[type(value)](value) if type(value) in kinds else []
        if any(map(is_ours, [value, *inside])):
            found.append(where)
    return found


def hooks_of_the_process():
    """Hooks on every optimizer and module, finders of modules, and the members of two enumerations."""
    hooks = {**vars(torch_modules), **vars(torch_optimizers)}
    hooks = {
        name: dict(value) for name, value in hooks.items() if name.startswith("_global_") and hasattr(value, "items")
    }
    enumerations = [list(enum.__members__) + sorted(vars(enum)) for enum in (OptimizerNames, PeftType)]
    return hooks, list(sys.meta_path), enumerations


def inside(model):
    """All that torch and others keep on a model's modules, but for the values of weights."""
    found = {}
    for path, module in model.named_modules():
        kept = {name: value for name, value in vars(module).items() if value or not name.startswith("_")}
        kinds = {name: type(value) for name, value in kept.items()}
        sizes = {name: len(value) for name, value in kept.items() if isinstance(value, dict)}
        params = [
            (name, param.dtype, param.requires_grad, param.grad is None, len(param._post_accumulate_grad_hooks or ()))
            for name, param in module._parameters.items()
            if param is not None
        ]
        found[path] = type(module), kinds, sizes, params
    return found


@pytest.fixture
def before(monkeypatch):
    """What there is without us, and without BitLinear layers of other tests, which are counted for afterwards."""
    others = list(bitlinear._steps.layers)
    monkeypatch.setattr(bitlinear._steps, "layers", WeakSet())
    hf_galore.unregister()
    yield attributes(), hooks_of_the_process()
    hf_galore.unregister()
    monkeypatch.undo()
    for layer in others:
        bitlinear._steps.count_for(layer)


def train(name, folder, model):
    """After a run with AdamW, since the Trainer itself leaves something on a model."""
    model.get_input_embeddings().weight.requires_grad_(False)
    Run("adamw_torch", folder).train(model, optim_args=None, optim_target_modules=None, max_steps=1)
    start = inside(model)
    trainer = Run(name, folder).train(model, max_steps=2)
    assert {key for key in inside(model) if inside(model)[key] != start[key]} == set()
    inner = optimizer_of(trainer)
    step = vars(inner).get("step", type(inner).step)
    assert not is_ours(step) or step is type(inner).step
    return trainer


def restored(model, do, undo):
    """Does something to a model and undoes it."""
    start = inside(model)
    do(model)
    assert inside(model) != start
    undo(model)
    assert {key for key in inside(model) if inside(model)[key] != start[key]} == set()


def ternary(model):
    hf_galore.replace_linear(model, ["mlp"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    optimizer.step()
    model.zero_grad()


def adapted(model):
    config = hf_galore.BitLinearConfig(target_modules=["gate_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def watched(name):
    """A report, and an intervention."""
    model = plant(make(name))
    start = inside(model)
    report = hf_galore.massive_activations(model, [inputs(name)], delimiters=delimiters(name))
    with hf_galore.intervene(model, report, "zero"):
        assert inside(model) != start
        model(**inputs(name))
    assert inside(model) == start


def generated(model):
    start = inside(model)
    cache = hf_galore.SinkCache(model, n_sink=1, window=4)
    model.generate(BATCH, past_key_values=cache, max_new_tokens=2, do_sample=False)
    del cache
    gc.collect()
    assert {key for key in inside(model) if inside(model)[key] != start[key]} == set()


def test_nothing_of_ours_is_left(before, tmp_path):
    """Not in the libraries that are patched, nor in torch's process-wide hooks, nor on models; see also `inside`."""
    libraries, process = before
    hf_galore.register()
    wrap_launch_command()
    patched = attributes()
    for number, name in enumerate(NAMES):
        train(name, tmp_path, FAMILIES[number % len(FAMILIES)]())
    llama_like = qwen().eval()
    restored(llama_like, ternary, hf_galore.restore_linear)
    restored(llama_like, hf_galore.add_attention_bias, hf_galore.remove_attention_bias)
    restored(llama_like, lambda m: hf_galore.add_register_tokens(m, 2), hf_galore.remove_register_tokens)
    watched("llama")
    generated(llama_like)
    wrapped = adapted(llama_like)
    wrapped.unload()
    del wrapped, llama_like
    gc.collect()
    unwrap_launch_command()
    hf_galore.unregister()
    after = attributes()
    changed = {key for key, value in libraries.items() if patched.get(key) is not value}
    assert len(changed) > 10  # it has seen what register() does
    assert {key for key in changed if after.get(key) is not libraries[key]} == set()
    assert ours_in(after) == []
    assert hooks_of_the_process() == process


def test_bitlinear_counts_steps_only_while_there_is_one(before):
    """Also after its copy is all that is left."""
    hooks = torch_optimizers._global_optimizer_post_hooks
    model = build(transformers.OPTConfig)
    hf_galore.replace_linear(model, ["fc1"])
    assert len(hooks) == 1
    twin = transformers.OPTForCausalLM(model.config)
    hf_galore.replace_linear(twin, ["fc1"])
    hf_galore.restore_linear(model)
    hf_galore.unregister()
    assert len(hooks) == 1
    del twin
    gc.collect()
    hf_galore.unregister()
    assert len(hooks) == 0
