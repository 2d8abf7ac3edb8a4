"""What the projected backward refuses, what it leaves to the optimizer, and its parameter groups."""

import warnings

import pytest
import torch
from lowrank_cases import (
    CASES,
    GAP,
    RANK,
    STACK,
    Case,
    adamw,
    gpt2,
    inside,
    neox,
    on_engine,
    regression,
    relative,
    train,
    weights,
)
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from hf_galore.lowrank_backward import enable

# What is refused, and what stays with the optimizer.


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"refresh": "never"}, ValueError, "refresh='never' is not one of exact, streaming"),
        ({"moments": "turn"}, ValueError, "moments='turn' is not one of keep, align, rotate, reset"),
        ({"proj_type": "full"}, ValueError, "proj_type='full' is not one of right, left, std"),
        ({"subspace": "qr"}, ValueError, r"subspace='qr' is not one of .*\bsvd\b"),
        ({"rank": 0}, ValueError, "rank"),
        ({"rank": 2.0}, TypeError, "rank"),
        ({"update_proj_gap": 0}, ValueError, "update_proj_gap"),
        ({"fold_every": 0}, ValueError, "fold_every"),
        ({"fold_every": "2"}, TypeError, "fold_every"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"seed": -1}, ValueError, "seed"),
        ({"target_modules": "nothing"}, ValueError, "'nothing' matches no module"),
    ],
    ids=str,
)
def test_malformed_options_are_refused_and_change_nothing(options, error, match):
    model = STACK.model()
    before = [inside(module) for module in model.modules()]
    with pytest.raises(error, match=match):
        enable(model, **options)
    assert [inside(module) for module in model.modules()] == before


@pytest.mark.parametrize("left_out", ["all", "one"])
def test_an_optimizer_without_the_small_parameters_is_refused(left_out):
    model = STACK.model()
    engine = enable(model, rank=RANK)
    small = list(engine.layers)
    params = [model.wide.bias, *(small[1:] if left_out == "one" else [])]
    with pytest.raises(ValueError, match="does not have the small parameters"):
        engine.attach(adamw(params))


class Doubling(nn.Linear):
    """Not what nn.Linear does."""

    def forward(self, x):
        return 2 * super().forward(x)


class Conv1D(nn.Module):
    """By its name and weight one of transformers' Conv1D."""

    def __init__(self, n, m):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m) / n), nn.Parameter(torch.zeros(m))

    def forward(self, x):
        return x @ self.weight + self.bias


class DoublingConv1D(Conv1D):
    """Not what Conv1D does."""

    def forward(self, x):
        return 2 * super().forward(x)


class Among(nn.Module):
    """A layer under test, then a plain one."""

    def __init__(self, layer):
        super().__init__()
        self.odd, self.plain = layer, nn.Linear(20, 20)

    def forward(self, x):
        return self.plain(torch.tanh(self.odd(x)))


class SelfAttention(nn.Module):
    """torch's attention reads the weight of its out_proj and never calls that module."""

    def __init__(self):
        super().__init__()
        self.attention, self.plain = nn.MultiheadAttention(20, 2, batch_first=True), nn.Linear(20, 20)

    def forward(self, x):
        return self.plain(self.attention(x, x, x, need_weights=False)[0])


class EmbeddingAsHead(nn.Module):
    """A linear layer whose weight is an embedding's as well."""

    def __init__(self):
        super().__init__()
        self.table, self.plain, self.head = nn.Embedding(32, 20), nn.Linear(20, 20), nn.Linear(20, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.plain(self.table(torch.arange(x.shape[-2])) + x))


def patched_on_the_instance():
    layer = nn.Linear(20, 20)
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    return layer


def mixtral():
    config = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32}
    return AutoModelForCausalLM.from_config(
        MixtralConfig(**config, num_hidden_layers=1, intermediate_size=24, num_local_experts=3)
    )


def any_loss(model, x):
    return model(x).square().mean()


EXPERT_WEIGHTS = {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
TARGETS = ["odd", "plain"]
UNSWAPPED = {
    "own forward": (Case(lambda: Among(Doubling(20, 20)), regression), TARGETS, {"odd.weight"}),
    "own forward, Conv1D": (Case(lambda: Among(DoublingConv1D(20, 20)), regression), TARGETS, {"odd.weight"}),
    "forward of the instance": (Case(lambda: Among(patched_on_the_instance()), regression), TARGETS, {"odd.weight"}),
    "output head": (CASES["gpt-neox"], ["lm_head", "dense"], {"lm_head.weight"}),
    "fused experts": (Case(mixtral, CASES["gpt2"].loss), "all-linear", EXPERT_WEIGHTS),
    "weight of an embedding": (Case(EmbeddingAsHead, any_loss), ["head", "plain"], {"table.weight"}),
    "read past its module": (Case(SelfAttention, regression), "all-linear", {"attention.out_proj.weight"}),
}


@pytest.mark.parametrize(("case", "targets", "expected"), UNSWAPPED.values(), ids=UNSWAPPED)
def test_what_cannot_be_swapped_is_projected_by_the_optimizer(case, targets, expected):
    """With a warning that names one; and everything trains."""
    model = case.model()
    with pytest.warns(UserWarning, match=f"{len(expected)} of .*such as '{min(expected)}'"):
        engine = enable(model, targets, rank=RANK, update_proj_gap=GAP)
    groups = engine.param_groups(model, subspace="svd")
    names = {param: name for name, param in model.named_parameters()}
    projected = [group for group in groups if "rank" in group]
    assert {names[param] for group in projected for param in group["params"]} == expected
    for group in projected:
        assert (group["rank"], group["update_proj_gap"], group["proj_type"]) == (RANK, GAP, "right")
        assert (group["scale"], group["subspace"]) == (0.25, "svd")
    optimizer = adamw(groups)
    engine.attach(optimizer)
    start = weights(model)
    train(case, model, optimizer, range(3))
    assert [name for name, value in weights(model).items() if torch.equal(value, start[name])] == []


def test_nothing_to_swap_is_an_error():
    model = nn.Sequential(Doubling(20, 20))
    with pytest.raises(ValueError, match="none of the 1 targets can be swapped"):
        enable(model, rank=RANK)


# Parameter groups.


def decaying(groups):
    return {param: group["weight_decay"] for group in groups for param in group["params"]}


@pytest.mark.parametrize("make", [STACK.model, neox, gpt2, mixtral, CASES["tied"].model])
class TestParamGroups:
    def engine(self, make):
        model = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return model, enable(model, rank=RANK)

    def test_every_trainable_parameter_once(self, make):
        model, engine = self.engine(make)
        grouped = [id(param) for group in engine.param_groups(model) for param in group["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(param) for param in model.parameters() if param.requires_grad}
        assert all("weight_decay" not in group for group in engine.param_groups(model))

    def test_matrices_decay_by_default(self, make):
        model, engine = self.engine(make)
        for param, decay in decaying(engine.param_groups(model, weight_decay=0.1)).items():
            assert decay == (0.1 if param.dim() >= 2 else 0.0)

    def test_a_small_parameter_decays_as_its_weight_is_told_to(self, make):
        plain = dict(make().named_parameters())
        matrices = sorted(name for name, param in plain.items() if param.dim() >= 2)
        chosen = set(matrices[::2]) | {name for name in plain if name.endswith("bias")}
        model, engine = self.engine(make)
        groups = engine.param_groups(model, weight_decay=0.1, decay_parameters=chosen)
        decays = decaying(groups)
        for name, param in model.named_parameters():
            if param in decays:
                weight = name.replace("lowrank_update", "weight")
                assert decays[param] == (0.1 if weight in chosen else 0.0), name


def test_a_rank_above_the_matrix_is_clamped():
    with pytest.warns(UserWarning, match="rank=1000 is larger than a matrix"):
        model, optimizer, engine = on_engine(STACK, rank=1000)
    assert {layer.basis.matrix.shape[-1] for layer in engine.layers.values()} == {12}
    start = weights(model)
    train(STACK, model, optimizer, range(3))
    assert relative(weights(model), start) > 1e-4


def test_unpatched_layers_do_not_notice():
    """Only the targets are touched."""
    model = STACK.model()
    before = inside(model.square)
    enable(model, ["wide"], rank=RANK)
    assert inside(model.square) == before
