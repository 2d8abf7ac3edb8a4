"""Rows of the projected backward's tests: small models with a loss, the two engines on them, and training loops."""

import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, galore_param_groups, replace_linear
from hf_galore.lowrank_backward import enable

RANK, GAP = 4, 7
EXACT = 1e-12  # float64: some 10⁴ roundings of 1e-16 on the way
LANGUAGE = {"vocab_size": 32, "max_position_embeddings": 16}


class Stack(nn.Module):
    """Wide, square and tall linear layers; a trained, a frozen and no bias."""

    def __init__(self):
        super().__init__()
        self.wide, self.square, self.tall = nn.Linear(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.square.bias.requires_grad_(False)

    def forward(self, x):
        return self.tall(torch.tanh(self.square(torch.tanh(self.wide(x)))))


class Twice(nn.Module):
    """One module that is used twice in every forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(20, 20)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


class Tied(nn.Module):
    """Two modules with one weight, and a bias each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class InPlace(nn.Module):
    """Changes in place what its layers give."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20, bias=False)

    def forward(self, x):
        y = self.first(x)
        y += x
        y = self.second(y.tanh_())
        y += x
        return y


class Experts(nn.Module):
    """Layers of which a forward uses those that it is told to."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(20, 20) for _ in range(3))

    def forward(self, x, used=(0, 1, 2)):
        return sum(torch.tanh(self.experts[i](x)) for i in used)


class Heads(nn.Module):
    """Three heads on one input, of which two have fewer rows than the rank, and a layer after them."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(20, 12), nn.Linear(20, 3), nn.Linear(20, 3)
        self.o_proj = nn.Linear(12, 20)

    def forward(self, x, other=None):
        gates = self.k_proj(x).sum(-1, keepdim=True) * self.v_proj(x if other is None else other).sum(-1, keepdim=True)
        return self.o_proj(torch.tanh(self.q_proj(x) * gates))


def neox():
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **LANGUAGE,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            num_hidden_layers=1,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
    )


def falcon():
    """Its layers are FalconLinear's."""
    shape = {"hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    return FalconForCausalLM(FalconConfig(**LANGUAGE, **shape, hidden_dropout=0.0, attention_dropout=0.0))


def gpt2():
    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_head=2, n_layer=1, n_inner=24, **none)
    )


def regression(model, x):
    return (model(x) - torch.flip(x, [-1])).square().mean()


def language(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


class Case(NamedTuple):
    """A model and its loss on a batch (rows, …)."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]

    def model(self, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        return self.build().to(dtype)

    def batch(self, step, rows=4, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1000 + step)
        if self.loss is language:
            return torch.randint(0, 32, (rows, 8), generator=generator)
        return torch.randn(rows, 3, 20, generator=generator).to(dtype)


CASES = {
    "linear": Case(Stack, regression),
    "used twice": Case(Twice, regression),
    "tied": Case(Tied, regression),
    "changed in place": Case(InPlace, regression),
    "gpt-neox": Case(neox, language),
    "falcon": Case(falcon, language),
    "gpt2": Case(gpt2, language),
    "ternary": Case(lambda: replace_linear(Stack()), regression),
    "ternary, changed in place": Case(lambda: replace_linear(InPlace()), regression),
    "ternary, normed": Case(lambda: replace_linear(Stack(), use_rms_norm=True), regression),
}
STACK = CASES["linear"]
HEADS = Case(Heads, regression)  # with layers that may share a basis


each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_side = pytest.mark.parametrize("proj_type", ["right", "left"])
each_refresh = pytest.mark.parametrize("how", ["exact", "streaming"])


def dtype_of(model):
    return next(model.parameters()).dtype


def backward(case, model, step, micro_batches=1, rows=4, scaler=None, context=nullcontext):
    """The gradients of one step's batch, in `micro_batches` equal parts."""
    for part in case.batch(step, rows, dtype_of(model)).chunk(micro_batches):
        with context():
            loss = case.loss(model, part) / micro_batches
        (loss if scaler is None else scaler.scale(loss)).backward()


def train(case, model, optimizer, steps, **options):
    """Takes the steps numbered `steps`."""
    for step in steps:
        optimizer.zero_grad()
        backward(case, model, step, **options)
        optimizer.step()


def adamw(groups, **options):
    return GaLoreAdamW(groups, **{"lr": 1e-2, **options})


def adafactor(**options):
    return lambda groups: GaLoreAdafactor(
        groups, **{"lr": 1e-2, "scale_parameter": False, "relative_step": False, **options}
    )


def adamw8bit(groups):
    return GaLoreAdamW8bit(groups, lr=1e-2, min_8bit_size=0)


def torch_adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2)


def on_optimizer_path(case, dtype=torch.float64, make=adamw, proj_type="right", weight_decay=0.1, **low_rank):
    """(model, optimizer) that projects in step()."""
    model = case.model(dtype)
    low_rank = {"rank": RANK, "update_proj_gap": GAP, **low_rank}
    groups = galore_param_groups(model, "all-linear", proj_type=proj_type, weight_decay=weight_decay, **low_rank)
    return model, make(groups)


def on_engine(case, dtype=torch.float32, make=adamw, weight_decay=0.1, seed=0, micro_batches=1, **options):
    """(model, optimizer, engine) with the projected backward, for steps of that many backward passes.

    All layers refresh in the same steps unless `stagger` says otherwise.
    """
    model = case.model(dtype, seed)
    given = {"rank": RANK, "update_proj_gap": GAP, "gradient_accumulation_steps": micro_batches, "stagger": False}
    options = given | options
    holds_all = options.get("refresh") == "exact" and micro_batches > 1 and not options.get("stagger")
    with pytest.warns(UserWarning, match="holds the full gradients") if holds_all else nullcontext():
        engine = enable(model, "all-linear", **options)
    optimizer = make(engine.param_groups(model, weight_decay=weight_decay))
    engine.attach(optimizer)
    return model, optimizer, engine


def weights(model):
    """A copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def relative(left: dict[str, Any], right: dict[str, Any]) -> float:
    """The relative distance of two state dicts with the same keys."""
    assert list(left) == list(right)
    one, other = (torch.cat([value.double().flatten() for value in side.values()]) for side in (left, right))
    return float((one - other).norm() / other.norm())


def layer_of(engine, module):
    (layer,) = [layer for layer in engine.layers.values() if layer.module is module]
    return layer


def bases(engine):
    return [layer.basis.matrix.clone() for layer in engine.layers.values()]


def full_gradients(case, model, steps, micro_batches=1):
    """Weight names → G (m, n), from autograd on a plain copy with this model's weights; summed over `steps`."""
    plain = case.model(dtype_of(model))
    plain.load_state_dict(model.state_dict())
    for step in steps:
        backward(case, plain, step, micro_batches)
    return {name: param.grad for name, param in plain.named_parameters()}


def stacked(engine, model, full):
    """By basis, the gradient of its layers, one over the other."""
    names = {module: name for name, module in model.named_modules()}
    return {
        basis: torch.cat([full[f"{names[layer.module]}.weight"] for layer in basis.layers]) for basis in engine.bases
    }


def saved(obj):
    """After torch.save and torch.load(weights_only=True)."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(left, right):
    """Equal bit for bit, dtypes and order of keys included."""
    assert list(left) == list(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=lambda text, name=name: name + text)


def assert_equal_states(left, right):
    """Equal optimizer states, bit for bit, dtypes included."""
    assert left["state"].keys() == right["state"].keys()
    for index, state in left["state"].items():
        assert state.keys() == right["state"][index].keys()
        for name, value in state.items():
            one, other = torch.as_tensor(value), torch.as_tensor(right["state"][index][name])
            assert one.dtype == other.dtype, (index, name)
            assert torch.equal(one, other), (index, name)


def inside(module):
    """Everything that torch keeps on the module, but for the values of tensors."""
    names = {key for key, value in vars(module).items() if not (key.startswith("_") and not value)}
    params = [
        (name, id(param), param.requires_grad) for name, param in module._parameters.items() if param is not None
    ]
    return names, params
