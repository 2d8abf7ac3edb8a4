"""The same run through the Trainer with hf_galore, with galore-torch and with the literal paper, in float64.

GPT-NeoX computes in the dtype of its weights throughout (Llama's norms go through float32, where a difference of 1e-16
can become one of 1e-8). 30 steps, 5 refreshes, learning-rate schedule and clipping on.
"""

from functools import partial

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments

import hf_galore
from hf_galore import subspace
from hf_galore.param_groups import galore_param_groups
from references import GaLoreAdamW as LiteralAdamW
from references import ReferenceOptimizer

KEYS = {"rank": 4, "update_proj_gap": 7, "scale": 0.25}
PAPER = {"subspace": "svd", "moments": "keep"}  # which galore-torch does not know and does


def run(tmp_path, proj_type, reference=None, changes=None, tied=False, **optim_args):
    """The model's trained parameters as one vector."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        use_cache=False,
    )
    model = GPTNeoXForCausalLM(config).double()
    if tied:
        one, other = (layer.mlp.dense_h_to_4h for layer in model.gpt_neox.layers)
        other.weight = one.weight
    data = [{"input_ids": (ids := torch.randint(0, 32, (12,))), "labels": ids} for _ in range(64)]
    keys = {**KEYS, "proj_type": proj_type}
    settings = {
        "optim": "galore_adamw",
        "optim_target_modules": ["attention", "mlp"],
        "optim_args": ",".join(f"{key}={value}" for key, value in {**keys, **PAPER, **optim_args}.items()),
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-6,
        "max_steps": 30,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(tmp_path, **settings | (changes or {}))
    chosen = None
    if reference is not None:
        groups = galore_param_groups(model, ["attention", "mlp"], **keys)
        chosen = (ReferenceOptimizer, {"params": groups, "rule": reference, "lr": 1e-2})
    Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=chosen).train()
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("proj_type", subspace.PROJ_TYPES)
def test_equals_the_paper(tmp_path, proj_type):
    paper = run(tmp_path, proj_type, partial(LiteralAdamW, eps=1e-6))
    assert relative(run(tmp_path, proj_type), paper) <= 1e-12


@pytest.mark.usefixtures("incumbent")
@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated")
@pytest.mark.parametrize("proj_type", subspace.PROJ_TYPES)
def test_equals_galore_torch(tmp_path, proj_type, monkeypatch):
    """galore-torch takes its SVD in float32 also for float64 gradients; so does ours here."""

    def svd_in_float32(grad, rank, side, previous, seed):
        basis, values = subspace.svd(grad.float(), rank, side, previous, seed)
        return basis.to(grad.dtype), values

    monkeypatch.setitem(subspace.SUBSPACES, "svd_in_float32", svd_in_float32)
    theirs = run(tmp_path, proj_type)
    hf_galore.register()
    try:
        assert relative(run(tmp_path, proj_type, subspace="svd_in_float32"), theirs) <= 1e-12
    finally:
        hf_galore.unregister()


# Clipping is off, because the norm of the small gradients is another one.
PLAIN = {"weight_decay": 0.1, "max_grad_norm": 0.0}
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
LAYERWISE = {"optim": "galore_adamw_layerwise"}


@pytest.mark.usefixtures("ours")
@pytest.mark.filterwarnings("ignore:.*holds the full gradients of all layers")
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("accumulation", [{}, ACCUMULATED], ids=["", "accumulation"])
def test_projected_backward_equals_the_optimizer(tmp_path, accumulation, tied):
    """refresh=exact is GaLore on the right side, also where two modules share a weight."""
    expected = run(tmp_path, "right", changes=PLAIN | accumulation, tied=tied)
    layerwise = run(tmp_path, "right", changes=PLAIN | accumulation | LAYERWISE, tied=tied, refresh="exact")
    assert relative(layerwise, expected) <= 1e-12
