"""Equality with the literal papers and with galore-torch 1.0 over 30 steps and 5 basis refreshes.

float64: 1e-12 relative. float32: at most K times the literal reference's own float32 error against float64, on the
same bases. Ours rounds about as often as the reference in each step (it fuses the back-projection with the
write-back and multiplies by the learning rate earlier), so the expected ratio is 1; K = 4 leaves room for luck, not
for a mistake.
"""

import itertools
import types
from functools import partial

import galore_torch
import pytest
import torch
from galore_torch import galore_projector
from parts import in_part

import hf_galore
from hf_galore import subspace
from references import GaLoreAdafactor as LiteralAdafactor
from references import GaLoreAdamW as LiteralAdamW
from references import ReferenceOptimizer

K = 4
STEPS, GAP, RANK = 30, 7, 4
SHAPES = {"tall": (24, 12), "wide": (12, 24), "square": (16, 16)}

# rule: (class name in both packages, its keyword arguments, the literal rule with the same ones)
NO_RELATIVE = {"scale_parameter": False, "relative_step": False}
RULES = {
    "adamw": ("GaLoreAdamW", {"lr": 1e-2}, LiteralAdamW),
    "adamw-betas": (
        "GaLoreAdamW",
        {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-3},
        partial(LiteralAdamW, betas=(0.8, 0.95), eps=1e-3),
    ),
    "adafactor": ("GaLoreAdafactor", {"lr": 1e-2, **NO_RELATIVE}, LiteralAdafactor),
    "adafactor-beta1": (
        "GaLoreAdafactor",
        {"lr": 1e-2, "beta1": 0.9, **NO_RELATIVE},
        partial(LiteralAdafactor, beta1=0.9),
    ),
}


def svd_in_float32(grad, rank, side, previous, seed):
    """The basis as galore-torch takes it: from the gradient rounded to float32, also for float64 gradients."""
    basis, values = subspace.svd(grad.float(), rank, side, previous, seed)
    return basis.to(grad.dtype), values


@pytest.fixture(autouse=True)
def _float32_basis(monkeypatch):
    monkeypatch.setitem(subspace.SUBSPACES, "svd_in_float32", svd_in_float32)


def train(make_optimizer, shape, dtype, group, lean=0.5):
    """The weights after STEPS steps on a matrix in a group with rank and a vector in one without.

    The gradients lean on the weights (a noisy quadratic), so that a wrong step changes all later ones; with lean=0
    they and their singular vectors are the same float32 numbers in every run.
    """
    torch.manual_seed(0)
    matrix, vector = (torch.nn.Parameter(torch.randn(size).to(dtype)) for size in (shape, (7,)))
    optimizer = make_optimizer([{"params": [matrix], **group}, {"params": [vector]}])
    for _ in range(STEPS):
        for param in (matrix, vector):
            param.grad = (lean * param.detach().float() + torch.randn(param.shape)).to(dtype)
        optimizer.step()
    return torch.cat([matrix.detach().flatten(), vector.detach()])


def group(proj_type, **more):
    paper = {"subspace": "svd", "moments": "keep"}
    return {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": proj_type, **paper, **more}


def ours(rule, **more):
    name, kwargs, _ = RULES[rule]
    return lambda groups: getattr(hf_galore, name)(groups, **kwargs, **more)


def theirs(rule):
    name, kwargs, _ = RULES[rule]
    return lambda groups: getattr(galore_torch, name)(groups, **kwargs)


def literal(rule, svd_dtype=None, **more):
    _, kwargs, cls = RULES[rule]
    return lambda groups: ReferenceOptimizer(groups, partial(cls, **more), svd_dtype, lr=kwargs["lr"])


@pytest.fixture
def shape(request):
    return SHAPES[request.param]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated")
@pytest.mark.parametrize(
    ("shape", "proj_type"),
    in_part(
        itertools.product(SHAPES, subspace.PROJ_TYPES),
        *(("tall", "std"), ("wide", "std"), ("tall", "reverse_std"), ("wide", "right"), ("tall", "left")),
        ("square", "full"),
    ),
    indirect=["shape"],
)
@pytest.mark.parametrize("rule", RULES)
class TestParity:
    def test_float64_equals_the_paper(self, rule, proj_type, shape):
        mine = train(ours(rule), shape, torch.float64, group(proj_type))
        assert relative(mine, train(literal(rule), shape, torch.float64, group(proj_type))) <= 1e-12

    def test_float64_equals_the_paper_with_weight_decay(self, rule, proj_type, shape):
        mine = train(ours(rule, weight_decay=0.1), shape, torch.float64, group(proj_type))
        paper = train(literal(rule, weight_decay=0.1), shape, torch.float64, group(proj_type))
        assert relative(mine, paper) <= 1e-12

    def test_float64_equals_galore_torch(self, rule, proj_type, shape):
        """Unmodified galore-torch takes its SVD in float32 whatever the gradient's dtype; so does ours here."""
        mine = train(ours(rule), shape, torch.float64, group(proj_type, subspace="svd_in_float32"))
        assert relative(mine, train(theirs(rule), shape, torch.float64, group(proj_type))) <= 1e-12

    def test_float64_equals_galore_torch_with_its_svd_in_float64(self, rule, proj_type, shape, monkeypatch):
        """Our default. galore-torch's one comparison with `torch.float` is lifted to float64; the rest is its own."""
        lifted = types.SimpleNamespace(float=torch.float64, matmul=torch.matmul, linalg=torch.linalg, diag=torch.diag)
        monkeypatch.setattr(galore_projector, "torch", lifted)
        mine = train(ours(rule), shape, torch.float64, group(proj_type))
        assert relative(mine, train(theirs(rule), shape, torch.float64, group(proj_type))) <= 1e-12

    def test_float32_rounds_no_worse_than_the_paper_does(self, rule, proj_type, shape):
        keys = group(proj_type)
        exact = train(literal(rule, torch.float32), shape, torch.float64, keys, lean=0)
        own_error = relative(train(literal(rule), shape, torch.float32, keys, lean=0), exact)
        mine = train(ours(rule), shape, torch.float32, keys, lean=0)
        assert own_error < 1e-5  # on equal bases: the bounds below mean something
        assert relative(mine, exact) <= K * own_error
        assert relative(mine, train(theirs(rule), shape, torch.float32, keys, lean=0)) <= K * own_error
