"""`register()` and `unregister()`: what they change in transformers, that it is undone exactly, and that galore-torch
is not needed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from trainer_cases import METHODS, NAMES, Run, assert_same, llama, projected_names, weights
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

import hf_galore

UPSTREAM_NAMES = [name.value for name in OptimizerNames if name.value.startswith("galore")]
GUARDS = ["transformers.utils", "transformers.utils.import_utils", "transformers.trainer_optimizer"]
TESTING = "transformers.testing_utils"
TRAINER_METHODS = {"__init__", "train", "create_optimizer"} | {
    f"_load_{what}" for what in ("from_checkpoint", "best_model", "optimizer_and_scheduler")
}


@pytest.fixture(autouse=True)
def _unregistered():
    """Each test starts and ends with transformers as it is without us."""
    hf_galore.unregister()
    yield
    hf_galore.unregister()


def snapshot():
    """Everything in transformers that could be replaced: (where, name) → the object itself."""
    seen = {("registry", str(name)): handler for name, handler in trainer_optimizer._OPTIMIZER_HANDLERS.items()}
    for path, module in list(sys.modules.items()):
        if path == "transformers" or path.startswith("transformers."):
            for name, value in list(vars(module).items()):
                seen[path, name] = value
                if isinstance(value, type) and value.__module__ == path:
                    seen |= {(f"{path}.{name}", key): item for key, item in vars(value).items()}
    return seen


def changes(before, after):
    """Where the two snapshots differ: names that came, went, or hold another object."""
    return {key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)}


def handlers():
    return [trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(name)] for name in UPSTREAM_NAMES]


def test_every_upstream_name_is_ours_while_registered(ours):
    assert sorted(UPSTREAM_NAMES) == sorted(NAMES)
    assert [handler.__module__ for handler in handlers()] == ["hf_galore.integrations.transformers"] * 6
    hf_galore.unregister()
    assert [handler.__module__ for handler in handlers()] == ["transformers.trainer_optimizer"] * 6


@pytest.mark.parametrize("times", [1, 3])
def test_unregister_restores_transformers_exactly(times):
    """However often register() was called, one unregister() gives back every object, and a second one does nothing."""
    before = snapshot()
    for _ in range(times):
        hf_galore.register()
    changed = changes(before, snapshot())
    assert {name for where, name in changed if where == "registry"} == {str(OptimizerNames(n)) for n in UPSTREAM_NAMES}
    assert {name for where, name in changed if where == "transformers.trainer.Trainer"} == TRAINER_METHODS
    for _ in range(times):
        hf_galore.unregister()
        assert changes(before, snapshot()) == set()


def test_register_twice_changes_nothing_more(ours):
    once = snapshot()
    hf_galore.register()
    assert changes(once, snapshot()) == set()


def test_register_works_again_after_unregister():
    hf_galore.register()
    first = snapshot()
    hf_galore.unregister()
    hf_galore.register()
    assert changes(first, snapshot()) == set()


@pytest.mark.parametrize("method", ["galore_adamw", "galore_adamw_layerwise"])
def test_a_run_in_between_is_undone_too(method, tmp_path):
    """Training imports more of transformers; what was there before is as it was, and nothing of ours is left."""
    before = snapshot()
    hf_galore.register()
    Run(method, tmp_path).train(llama(), max_steps=1)
    hf_galore.unregister()
    after = snapshot()
    assert {key for key in before if before[key] is not after.get(key)} == set()
    assert_nothing_of_ours(after)


def assert_nothing_of_ours(seen):
    left = [key for key, value in seen.items() if str(getattr(value, "__module__", "")).startswith("hf_galore")]
    assert left == []


def test_is_galore_torch_available_wherever_it_is_asked():
    """True in every module that has the question, `testing_utils` included, while registered; then as it was."""
    importlib.import_module(TESTING)
    modules = [sys.modules[path] for path in (*GUARDS, TESTING)]
    before = [module.is_galore_torch_available for module in modules]
    hf_galore.register()
    assert [module.is_galore_torch_available() for module in modules] == [True] * len(modules)
    hf_galore.unregister()
    assert [module.is_galore_torch_available for module in modules] == before


def test_a_module_imported_while_registered_is_restored_too(monkeypatch):
    """`from .utils import is_galore_torch_available` in between copies our answer; it is not left there."""
    monkeypatch.delitem(sys.modules, TESTING, raising=False)
    hf_galore.register()
    late = importlib.import_module(TESTING)
    assert late.is_galore_torch_available() is True
    hf_galore.unregister()
    assert late.is_galore_torch_available is transformers.utils.is_galore_torch_available
    assert_nothing_of_ours(snapshot())


CLASSES = {
    "galore_adamw": (hf_galore.GaLoreAdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "galore_adamw_8bit": (hf_galore.GaLoreAdamW8bit, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "galore_adafactor": (hf_galore.GaLoreAdafactor, {"scale_parameter": False, "relative_step": False}),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_public_door_needs_no_registration(method, tmp_path):
    """Trainer(optimizer_cls_and_kwargs=…) with galore_param_groups is the same run as the registered name."""
    model = llama()
    optimizer, kwargs = CLASSES[method]
    groups = hf_galore.galore_param_groups(model, "all-linear", rank=8, update_proj_gap=2, scale=1.0)
    door = {"optimizer_cls_and_kwargs": (optimizer, {"params": groups, "lr": 1e-3, "seed": 42, **kwargs})}
    trainer = Run("adamw_torch", tmp_path).train(model, optim_args=None, trainer=door)
    assert type(trainer.optimizer.optimizer) is optimizer
    assert len(projected_names(trainer)) == 14
    named = llama()
    hf_galore.register()
    Run(method, tmp_path).train(named)
    assert_same(weights(model), weights(named))


def test_the_public_door_takes_the_trainers_own_groups(tmp_path):
    """Without `params` the groups are the Trainer's, which have no rank: plain AdamW, and it trains."""
    model = llama()
    start = weights(model)
    door = {"optimizer_cls_and_kwargs": (hf_galore.GaLoreAdamW, {"lr": 1e-3})}
    trainer = Run("adamw_torch", tmp_path).train(model, optim_args=None, trainer=door, weight_decay=0.1)
    assert projected_names(trainer) == set()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert not [name for name, value in weights(model).items() if torch.equal(value, start[name])]


# In a process of its own, where galore-torch is not installed at all.

WITHOUT_GALORE_TORCH = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
from test_transformers_register import changes, snapshot
from trainer_cases import METHODS, NAMES, Run, llama, logged, weights, distance
from pathlib import Path
import transformers

facts = {"galore_torch": importlib.util.find_spec("galore_torch") is not None}
for name in [name for name in sys.modules if name.partition(".")[0] == "hf_galore"]:
    del sys.modules[name]
before = snapshot()
import hf_galore
import hf_galore.integrations
import hf_galore.integrations.transformers
facts["changed by importing"] = sorted(map(str, changes(before, snapshot())))
facts["available"] = [transformers.utils.is_galore_torch_available()]
try:
    Run(METHODS[0], Path(sys.argv[2])).train(llama(), max_steps=1)
except ImportError as error:
    facts["without"] = str(error)
hf_galore.register()
facts["available"].append(transformers.utils.is_galore_torch_available())
for method in NAMES:
    model = llama()
    start = weights(model)
    losses = logged(Run(method, Path(sys.argv[2])).train(model, max_steps=2), "loss")
    facts[method] = [len(losses), distance(weights(model), start)]
hf_galore.unregister()
facts["available"].append(transformers.utils.is_galore_torch_available())
print("FACTS", json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What a process found whose site-packages are ours but for galore-torch."""
    site, output = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("output")
    own, inherited = [], []
    for entry in map(Path, filter(None, sys.path)):
        if entry.name in ("site-packages", "dist-packages") and entry.is_dir():
            own += [item for item in entry.iterdir() if not item.name.startswith("galore_torch")]
        elif not str(entry).startswith(sys.base_prefix):
            inherited.append(str(entry))
    for item in own:
        if not (site / item.name).exists():
            (site / item.name).symlink_to(item)
    process = subprocess.run(
        [sys.executable, "-S", "-c", WITHOUT_GALORE_TORCH, str(Path(__file__).parent), str(output)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*inherited, str(site)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(next(line for line in process.stdout.splitlines() if line.startswith("FACTS "))[6:])


def test_galore_torch_is_really_absent_there(facts):
    assert facts["galore_torch"] is False
    assert "You need to install `galore_torch`" in facts["without"]


def test_importing_changes_nothing(facts):
    assert facts["changed by importing"] == []


def test_available_only_while_registered(facts):
    assert facts["available"] == [False, True, False]


@pytest.mark.parametrize("method", NAMES)
def test_trains_without_galore_torch(facts, method):
    steps, moved = facts[method]
    assert steps == 2
    assert moved > 0
