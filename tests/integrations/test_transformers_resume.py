"""A run that is cut and resumed from its checkpoint is, bit for bit, the run that was not cut."""

import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from parts import in_part
from safetensors.torch import load_file
from trainer_cases import (
    LAYERWISE,
    METHODS,
    NAMES,
    Run,
    assert_same,
    build,
    llama,
    logged,
    registered,
    tokens,
    weights,
)

from hf_galore.low_rank_options import LOW_RANK_DEFAULTS
from hf_galore.subspace import SUBSPACES

STEPS, GAP = 6, 3
# Bases are refreshed in the first and the fourth step. The checkpoint after step ...
CUTS = {"just before a refresh": 3, "just after a refresh": 4, "between refreshes": 2}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# With moments that decay, a schedule and clipping, there is more to lose.
SETTINGS = {
    "optim_args": f", update_proj_gap={GAP}",
    "max_steps": STEPS,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "weight_decay": 0.1,
    "save_strategy": "steps",
    "save_steps": 1,
}


def state_bits(trainer):
    """The optimizer's state as one flat dictionary, with its groups' hyper-parameters beside it."""
    state_dict = trainer.optimizer.state_dict()
    tensors = {f"{i}.{key}": value for i, state in state_dict["state"].items() for key, value in state.items()}
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    return tensors, state_dict["param_groups"]


def assert_resumes(run, model, cut, whole=None, **changes):
    """Resumes a fresh Trainer on a fresh model at the cut; `whole` is the run that was not cut, or it is run now."""
    whole = whole or run.train(model(), **SETTINGS | changes)
    checkpoint = Path(whole.args.output_dir) / f"checkpoint-{cut}"
    resumed = run.trainer(model(), **SETTINGS | changes | {"save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(resumed.model), weights(whole.model))
    (tensors, groups), (expected, expected_groups) = state_bits(resumed), state_bits(whole)
    assert_same(tensors, expected)
    assert groups == expected_groups
    assert len(logged(resumed, "loss")) == STEPS
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(resumed, key)[cut:] == logged(whole, key)[cut:]


VARIANTS = ["", ", refresh=exact", ", stagger=true, state_dtype=bfloat16"]
FAST = [
    *((m, "float32", "") for m in METHODS),
    (LAYERWISE[0], "float32", ""),
    (LAYERWISE[0], "bfloat16", ", refresh=exact"),
    (LAYERWISE[1], "bfloat16", ", stagger=true, state_dtype=bfloat16"),
    (METHODS[0], "bfloat16", ", subspace=random"),
]
MAIN = (METHODS[0], LAYERWISE[0])
KINDS = [(m, p, "") for m in METHODS for p in PRECISIONS]
KINDS += [(m, p, variant) for m in LAYERWISE for p in PRECISIONS for variant in VARIANTS]
OTHER_SUBSPACES = [name for name in SUBSPACES if name != LOW_RANK_DEFAULTS["subspace"]]
KINDS += [(METHODS[0], "bfloat16", f", subspace={name}") for name in OTHER_SUBSPACES]


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, id="-".join(kind), marks=() if kind in FAST else pytest.mark.slow) for kind in KINDS],
)
def whole(request, tmp_path_factory):
    """A run, its dtype, its optim_args and its Trainer after the whole of it, with a checkpoint after each step."""
    method, precision, variant = request.param
    run, dtype = Run(method, tmp_path_factory.mktemp("whole")), PRECISIONS[precision]
    changes = {"optim_args": SETTINGS["optim_args"] + variant}
    with registered():
        return run, dtype, changes, run.train(llama(dtype), **SETTINGS | changes)


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_resuming_changes_nothing(whole, cut, ours):
    run, dtype, changes, trainer = whole
    assert_resumes(run, lambda: llama(dtype, seed=1), cut, trainer, **changes)


def test_the_state_is_tensors_that_load_safely(whole):
    """weights_only=True loads it, in the dtypes in which it was kept: float32, and bytes for 8-bit moments.

    On the optimizer path a random basis is a seed.
    """
    _, dtype, changes, trainer = whole
    saved = torch.load(Path(trainer.args.output_dir) / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    tensors, _ = state_bits(trainer)
    assert_same({f"{i}.{key}": value for i, state in saved["state"].items() for key, value in state.items()}, tensors)
    kinds = {value.dtype for name, value in tensors.items()}
    expected = {torch.float32} | ({torch.uint8} if "8bit" in trainer.args.optim else set())
    expected |= {torch.int64} if "subspace=random" in changes["optim_args"].split(", ") else set()
    assert kinds - expected == ({torch.bfloat16} if "state_dtype" in changes["optim_args"] else set())
    assert kinds >= expected
    assert {param.dtype for param in trainer.model.parameters()} == {dtype}


OPTIONS = [
    ", subspace=randomized, moments=align, basis_dtype=int4, stagger=true",
    ", subspace=late_random, random_from=3, moments=rotate, equal_state=true",
    ", moments=reset, lazy=true, basis_dtype=int8",
    ", source=moment, moments=rotate, lazy=true, stagger=true, basis_dtype=bfloat16",
]


METHODS_WITH_OPTIONS = ("galore_adamw", "galore_adamw_8bit", "galore_adamw_layerwise")


@pytest.mark.parametrize(
    ("method", "options"),
    in_part(itertools.product(METHODS_WITH_OPTIONS, OPTIONS), *zip(METHODS_WITH_OPTIONS * 2, OPTIONS, strict=False)),
)
def test_resuming_with_options(method, options, ours, tmp_path):
    """Each option has something in the checkpoint, or a say in when and how the next refresh is done."""
    changes = {"optim_args": f", update_proj_gap={GAP}{options}"}
    assert_resumes(Run(method, tmp_path), lambda: llama(torch.bfloat16, seed=1), cut=2, **changes)


UNFOLDED = {"optim_args": f", update_proj_gap={GAP}, fold_every=4", "save_steps": 3}


@pytest.mark.parametrize("method", in_part(LAYERWISE, LAYERWISE[0]))
def test_resuming_between_folds(method, ours, tmp_path):
    """What is not folded yet is folded into the checkpoint, and the run that went on did the same."""
    assert_resumes(Run(method, tmp_path), lambda: llama(torch.bfloat16), cut=3, **UNFOLDED)


@pytest.mark.parametrize("method", in_part(NAMES, *MAIN))
def test_checkpoints_have_the_keys_of_any_run(method, ours, tmp_path):
    """Files, and names, shapes and dtypes of the tensors in model.safetensors, are those that adamw_torch leaves."""
    contents = []
    for optim, changes in (("adamw_torch", {"optim_args": None}), (method, {})):
        Run(optim, tmp_path / optim).train(llama(torch.bfloat16), **SETTINGS | changes)
        folder = tmp_path / optim / f"checkpoint-{GAP}"
        saved = load_file(folder / "model.safetensors")
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        contents.append((files, [(name, value.shape, value.dtype) for name, value in saved.items()]))
    assert contents[1] == contents[0]
    assert [name for name, *_ in contents[1][1]] == sorted(llama().state_dict())


@pytest.mark.parametrize("method", in_part(NAMES, *MAIN))
def test_resuming_with_dropout(method, ours, tmp_path):
    """GPT-2 drops a tenth of everything: the generator's state is in the checkpoint, and no refresh draws from it."""
    assert_resumes(Run(method, tmp_path), lambda: build(transformers.GPT2Config).train(), cut=4)


@pytest.mark.filterwarnings("ignore:.* keep their full gradients:UserWarning")
@pytest.mark.parametrize("method", in_part(NAMES, *MAIN))
def test_resuming_a_mixture_with_a_bfloat16_state(method, ours, tmp_path):
    """Fused experts with a basis each, and moments and bases that are rounded stochastically.

    (gpt-oss, because the Trainer of transformers 5.23 loses the experts of Mixtral and Qwen3 with any optimizer: it
    saves them under their names on the Hub, and does not find them there when it resumes.)
    """
    sizes = {"num_local_experts": 4, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 16}
    sizes["num_experts_per_tok"] = 2
    assert_resumes(
        Run(method, tmp_path),
        lambda: build(transformers.GptOssConfig, torch.bfloat16, **sizes),
        cut=4,
        optim_args=f", update_proj_gap={GAP}, state_dtype=bfloat16",
    )


INCUMBENTS = ["galore_adamw", "galore_adafactor"]  # its 8-bit class needs CUDA


@pytest.mark.filterwarnings("ignore::FutureWarning:galore_torch")
@pytest.mark.slow
@pytest.mark.parametrize("method", INCUMBENTS)
def test_galore_torch_cannot_resume(method, incumbent, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match="GaLoreProjector"):
        assert_resumes(Run(method, tmp_path), llama, cut=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:galore_torch")
def test_galore_torch_loses_the_state_layer_by_layer(incumbent, tmp_path):
    """Its layerwise run goes on, with moments and bases that start from nothing."""
    with pytest.raises(AssertionError, match="differ"):
        assert_resumes(Run("galore_adamw_layerwise", tmp_path), llama, cut=3)


@pytest.mark.filterwarnings("ignore::FutureWarning:galore_torch")
@pytest.mark.parametrize("method", in_part(INCUMBENTS, "galore_adamw"))
def test_a_checkpoint_of_galore_torch_is_refused_with_advice(method, incumbent, tmp_path):
    """Its projector objects are not unpickled; the advice, to start from the checkpoint's weights, works."""
    run = Run(method, tmp_path)
    written = run.train(llama(), **SETTINGS)
    checkpoint = tmp_path / "checkpoint-3"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 3
    with registered():
        resumed = run.trainer(llama(seed=1), **SETTINGS | {"save_strategy": "no"})
        with pytest.raises(ValueError, match=r"written by galore-torch.*without resume_from_checkpoint") as caught:
            resumed.train(resume_from_checkpoint=str(checkpoint))
        assert str(checkpoint) in str(caught.value)
        model = type(written.model).from_pretrained(checkpoint)
        assert logged(run.train(model, tokens()[12:], max_steps=1), "loss") == pytest.approx(
            [logged(written, "loss")[3]], rel=1e-6
        )


def test_a_damaged_checkpoint_is_not_blamed_on_galore_torch(ours, tmp_path):
    """Another object that cannot be loaded safely still gives torch's own error."""
    run = Run("galore_adamw", tmp_path)
    run.train(llama(), **SETTINGS | {"save_steps": 3})
    torch.save(
        {"state": {0: {"basis": Path("elsewhere")}}, "param_groups": []}, tmp_path / "checkpoint-3/optimizer.pt"
    )
    with pytest.raises(pickle.UnpicklingError, match="pathlib"):
        run.trainer(llama(), **SETTINGS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
