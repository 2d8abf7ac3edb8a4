"""What is wrong in the arguments is said in words that help, before any data is read or any weight moves."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from parts import in_part
from trainer_cases import LAYERWISE, METHODS, NAMES, Run, assert_same, llama, weights


class Untouched(torch.utils.data.Dataset):
    """Data that no failing run may come as far as reading."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        raise AssertionError("training has begun")


GAP_KEYS = "rank, update_proj_gap, scale, proj_type"
BAD_OPTIM_ARGS = {
    "rnk=8": [r"unknown key 'rnk'", GAP_KEYS],
    "rank=8, betas=0.9": [r"unknown key 'betas'", GAP_KEYS],
    "rank": [r"'rank' is not of the form key=value", GAP_KEYS],
    "rank=": [r"'rank=' is not of the form key=value"],
    "=8": [r"'=8' is not of the form key=value"],
    "rank=8=9": [r"'rank=8=9' is not of the form key=value"],
    "rank=8,": [r"'' is not of the form key=value"],
    "rank=abc": [r"rank='abc' is not an integer"],
    "rank=8.5": [r"rank='8.5' is not an integer"],
    "rank=0": [r"rank: 0 - should be >= 1"],
    "rank=-1": [r"rank: -1 - should be >= 1"],
    "rank=8, update_proj_gap=0": [r"update_proj_gap: 0 - should be >= 1"],
    "rank=8, scale=high": [r"scale='high' is not a number"],
    "rank=8, scale=-1": [r"scale: -1"],
    "rank=8, scale=nan": [r"scale: nan"],
    "rank=8, proj_type=diagonal": [r"proj_type='diagonal' is not one of .*right, left"],
    "rank=8, subspace=qr": [r"subspace='qr' is not one of"],
    "rank=8, moments=turn": [r"moments='turn' is not one of keep, align, rotate, reset"],
    "rank=8, source=activations": [r"source='activations' is not one of gradient, moment"],
    "rank=8, basis_dtype=int2": [r"basis_dtype='int2' is not one of float32, bfloat16, int8, int4"],
    "rank=8, stagger=perhaps": [r"stagger='perhaps' is not true or false"],
    "rank=8, lazy=2": [r"lazy='2' is not true or false"],
    "rank=8, subspace=late_random": [r"late_random.*random_from"],
    "rank=8, random_from=10": [r"late_random.*random_from"],
    "rank=8, subspace=random, moments=align": [r"moments='align'.*rotate, reset or keep"],
    "rank=8, statistics=maybe": [r"statistics='maybe' is not true or false"],
    "rank=8, state_dtype=int8": [r"state_dtype='int8' is not", "float32", "bfloat16"],
    "rank=8, stochastic_rounding=maybe": [r"stochastic_rounding='maybe' is not true or false"],
}
LAYERWISE_KEYS = {"refresh": "exact", "fold_every": "2", "share_inputs": "true"}
BAD_LAYERWISE_ARGS = {
    "rnk=8": [rf"unknown key 'rnk'.*{GAP_KEYS}.*{', '.join(LAYERWISE_KEYS)}"],
    "rank": [r"'rank' is not of the form key=value", ", ".join(LAYERWISE_KEYS)],
    "rank=8, refresh=never": [r"refresh='never' is not one of exact, streaming"],
    "rank=8, refresh=exact, source=moment": [r"source='moment' needs refresh='streaming'"],
    "rank=8, fold_every=often": [r"fold_every='often' is not an integer"],
    "rank=8, fold_every=0": [r"fold_every: 0 - should be >= 1"],
    "rank=8, proj_type=full": [r"proj_type='full' is not one of right, left, std"],
}
BAD_TARGETS = {
    "none": (None, ValueError, ["needs optim_target_modules", "'all-linear'"]),
    "empty list": ([], ValueError, [r"names no modules", "'all-linear'"]),
    "empty name": ([""], ValueError, [r"names no modules", "'all-linear'"]),
    "unknown name": (["k_prj"], ValueError, [r"'k_prj' matches no module", "near matches: .*k_proj"]),
    "one of two unknown": (["q_proj", "wq"], ValueError, [r"'wq' matches no module"]),
    "only norms": (["layernorm"], ValueError, [r"matches only modules without a matrix", "input_layernorm"]),
    "no regular expression": ("(q_proj", ValueError, [r"'\(q_proj' is no valid regular expression"]),
    "a number": (7, TypeError, [r"must be 'all-linear'"]),
}


def assert_refused(run, error, patterns, **changes):
    """train() raises the error with all patterns in its text, with no data read and the model as it was."""
    model = llama()
    start = weights(model)
    with pytest.raises(error) as caught:
        run.train(model, Untouched(), **changes)
    missing = [pattern for pattern in patterns if not re.search(pattern, str(caught.value))]
    assert not missing, f"{missing} not in: {caught.value}"
    assert_same(weights(model), start)
    assert all(param.requires_grad for param in model.parameters())


class Refusals(Run):
    """A `Run` whose optim_args are exactly those given."""

    def arguments(self, optim_args="", **changes):
        arguments = super().arguments(**changes)
        arguments.optim_args = optim_args
        return arguments


MAIN = (METHODS[0], LAYERWISE[0])


@pytest.mark.parametrize(
    ("method", "text"),
    [*((MAIN[0], text) for text in BAD_OPTIM_ARGS), *((name, "rnk=8") for name in NAMES if name != MAIN[0])],
)
def test_optim_args(method, text, ours, tmp_path):
    assert_refused(Refusals(method, tmp_path), ValueError, BAD_OPTIM_ARGS[text], optim_args=text)


@pytest.mark.parametrize(
    ("method", "text"),
    [*((MAIN[1], text) for text in BAD_LAYERWISE_ARGS), *((name, "rnk=8") for name in LAYERWISE if name != MAIN[1])],
)
def test_optim_args_of_the_projected_backward(method, text, ours, tmp_path):
    assert_refused(Refusals(method, tmp_path), ValueError, BAD_LAYERWISE_ARGS[text], optim_args=text)


@pytest.mark.parametrize("method", ["galore_adafactor", "galore_adafactor_layerwise"])
def test_adafactor_has_no_average_of_gradients(method, ours, tmp_path):
    message = "source='moment': GaLoreAdafactor keeps no average of the gradients; use source='gradient'"
    assert_refused(Run(method, tmp_path), ValueError, [message], optim_args=", source=moment")


@pytest.mark.parametrize(
    ("method", "key"), [*((MAIN[0], key) for key in LAYERWISE_KEYS), *((name, "refresh") for name in METHODS[1:])]
)
def test_keys_of_the_projected_backward_are_refused_elsewhere(method, key, ours, tmp_path):
    text = f"rank=8, {key}={LAYERWISE_KEYS[key]}"
    assert_refused(Refusals(method, tmp_path), ValueError, [f"unknown key '{key}'"], optim_args=text)


@pytest.mark.parametrize(
    ("method", "case"),
    [*((method, case) for method in MAIN for case in BAD_TARGETS), *((n, "none") for n in NAMES if n not in MAIN)],
)
def test_optim_target_modules(method, case, ours, tmp_path):
    targets, error, patterns = BAD_TARGETS[case]
    assert_refused(Run(method, tmp_path), error, patterns, optim_target_modules=targets)


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj"], r".*\.q_proj", [r"model\.layers\.\d+\.self_attn\.q_proj"]])
@pytest.mark.parametrize("method", in_part(NAMES, *MAIN))
def test_a_small_share_is_a_warning_with_the_figure(method, targets, ours, tmp_path):
    """A part of a name and a regular expression mean the same, alone or in a list; the share is of what trains."""
    model = llama()
    names = [name for name, _ in model.named_parameters() if name.endswith("q_proj.weight")]
    share = sum(model.get_parameter(n).numel() for n in names) / sum(param.numel() for param in model.parameters())
    assert 0.01 < share < 0.05
    with pytest.warns(UserWarning, match=f"only {share:.1%} of the trainable parameters are projected"):
        Run(method, tmp_path).train(model, max_steps=1, optim_target_modules=targets)


@pytest.mark.parametrize(
    ("engine", "works"),
    [("FSDP", "FSDP1.*use FSDP2: fsdp_config="), ("MEGATRON_LM", "Megatron-LM.*FSDP2, DeepSpeed, DDP or a single")],
)
@pytest.mark.parametrize("method", in_part(NAMES, *MAIN))
def test_engines_that_shard_matrices_are_refused(method, engine, works, ours, tmp_path, monkeypatch):
    """accelerate's state says, as it would, that the engine runs. (With real FSDP2: test_ddp_and_fsdp2.py.)"""
    trainer = Run(method, tmp_path).trainer(llama(), Untouched())
    for state in (PartialState, AcceleratorState):
        monkeypatch.setitem(state._shared_state, "distributed_type", DistributedType[engine])
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", SimpleNamespace(fsdp_version=1))
    for start in (trainer.create_optimizer, trainer.train):
        with pytest.raises(ValueError, match=rf"'{method}' does not run under {works}"):
            start()
    assert trainer.optimizer is None
