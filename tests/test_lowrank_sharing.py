"""Layers that are given the same input share one basis, that of their stacked gradients, and one x Q."""

import pytest
import torch
from lowrank_cases import (
    HEADS,
    Case,
    Heads,
    adamw,
    assert_equal_states,
    backward,
    on_engine,
    regression,
    saved,
    train,
    weights,
)
from transformers import LlamaConfig, LlamaForCausalLM

from hf_galore.lowrank_backward import enable
from hf_galore.lowrank_basis import LayerBasis

OPTIONS = {"share_inputs": True, "update_proj_gap": 3}


@pytest.fixture
def products(monkeypatch):
    """Counts the products x Q."""
    from hf_galore import lowrank_basis

    made, product = [], lowrank_basis._product
    monkeypatch.setattr(lowrank_basis, "_product", lambda x, basis: made.append(basis.shape) or product(x, basis))
    return made


def basis_of(model, name) -> LayerBasis:
    engine = model._hf_galore_lowrank_backward
    return engine.layers[model.get_submodule(name).lowrank_update].basis


def test_siblings_share_a_basis_and_others_do_not(products):
    model, _, engine = on_engine(HEADS, torch.float64, **OPTIONS)
    shared = basis_of(model, "q_proj")
    assert shared is basis_of(model, "k_proj") is basis_of(model, "v_proj")
    assert shared is not basis_of(model, "o_proj")
    assert engine.count == 2
    assert [layer.update.shape for layer in engine.layers.values()] == [(12, 4), (3, 4), (3, 4), (20, 4)]
    backward(HEADS, model, 0)
    assert len(products) == 2


def test_each_gradient_is_projected_with_the_common_basis():
    model, _, _ = on_engine(HEADS, torch.float64, **OPTIONS)
    plain = HEADS.model(torch.float64)
    backward(HEADS, model, 0)
    backward(HEADS, plain, 0)
    for name, module in plain.named_children():
        byhand = module.weight.grad @ basis_of(model, name).matrix
        torch.testing.assert_close(model.get_submodule(name).lowrank_update.grad, byhand, rtol=0, atol=1e-14)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_basis_is_that_of_the_stacked_gradients(micro_batches):
    """Z = [G_q; G_k; G_v]ᵀ U with one orthonormal U; the basis spans its range."""
    model, optimizer, engine = on_engine(HEADS, torch.float64, **OPTIONS)
    plain = HEADS.model(torch.float64)
    for step in range(4):  # refreshes in steps 0 and 3
        plain.zero_grad()
        plain.load_state_dict(model.state_dict())
        names = ["q_proj", "k_proj", "v_proj"]
        tests = [engine.layers[model.get_submodule(name).lowrank_update].test_matrix for name in names]
        before = basis_of(model, "q_proj").matrix
        train(HEADS, model, optimizer, [step], micro_batches=micro_batches)
        backward(HEADS, plain, step, micro_batches)
        after = basis_of(model, "q_proj").matrix
        if step % 3:
            assert after is before
            assert tests == [None] * 3
        else:
            test = torch.cat(tests)
            torch.testing.assert_close(test.mT @ test, torch.eye(4, dtype=test.dtype), rtol=0, atol=1e-12)
            stacked = torch.cat([plain.get_submodule(name).weight.grad for name in names])
            span = torch.linalg.qr(stacked.mT @ test)[0]
            assert torch.linalg.svdvals(span.mT @ after).min() > 1 - 1e-9


def test_another_input_is_projected_for_itself(products):
    """A sibling that is called with something else is right all the same."""
    other = torch.randn(4, 3, 20, dtype=torch.float64)
    case = Case(Heads, lambda model, x: (model(x, other) - x).square().mean())
    model, _, _ = on_engine(case, torch.float64, **OPTIONS)
    plain = case.model(torch.float64)
    backward(case, model, 0)
    backward(case, plain, 0)
    assert len(products) == 4
    for name, module in plain.named_children():
        byhand = module.weight.grad @ basis_of(model, name).matrix
        torch.testing.assert_close(model.get_submodule(name).lowrank_update.grad, byhand, rtol=0, atol=1e-14)


def test_an_input_that_is_changed_in_place_is_projected_again(products):
    model, _, _ = on_engine(HEADS, torch.float64, **OPTIONS)
    x = torch.randn(2, 20, dtype=torch.float64)
    model.q_proj(x)
    x.mul_(2)
    model.k_proj(x).sum().backward()
    byhand = x.sum(0) @ basis_of(model, "k_proj").matrix
    torch.testing.assert_close(model.k_proj.lowrank_update.grad, byhand.expand(3, 4), rtol=0, atol=1e-14)
    assert len(products) == 2


def test_nothing_of_the_input_is_held_after_the_last_sibling():
    model, _, _ = on_engine(HEADS, **OPTIONS)
    model(torch.randn(2, 20))
    assert basis_of(model, "q_proj")._shared is None


def test_resume_is_bit_exact():
    straight, optimizer, _ = on_engine(HEADS, **OPTIONS)
    train(HEADS, straight, optimizer, range(8))
    for stop in (2, 3, 4):
        first, optimizer, _ = on_engine(HEADS, **OPTIONS)
        train(HEADS, first, optimizer, range(stop))
        model, resumed, _ = on_engine(HEADS, **OPTIONS)
        model.load_state_dict(saved(first.state_dict()))
        resumed.load_state_dict(saved(optimizer.state_dict()))
        assert_equal_states(resumed.state_dict(), optimizer.state_dict())
        train(HEADS, model, resumed, range(stop, 8))
        for name, value in weights(straight).items():
            assert torch.equal(value, weights(model)[name]), name


@pytest.mark.parametrize("options", [{}, {"fold_every": 2}, {"stagger": True}, {"state_dtype": torch.bfloat16}])
def test_it_trains(options):
    model, optimizer, _ = on_engine(HEADS, make=adamw, weight_decay=0.0, **{**OPTIONS, **options})
    first = regression(model, HEADS.batch(0, 64)).item()
    train(HEADS, model, optimizer, range(60))
    assert regression(model, HEADS.batch(0, 64)).item() < 0.97 * first


def test_a_llama_shares_five_of_seven():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2
    )
    engine = enable(LlamaForCausalLM(config), rank=4, share_inputs=True)
    assert [len(basis.layers) for basis in engine.bases] == [3, 1, 2, 1] * 2


def test_names_can_be_given():
    model = HEADS.model()
    enable(model, rank=2, share_inputs=[["k_proj", "v_proj"]])
    assert basis_of(model, "k_proj") is basis_of(model, "v_proj") is not basis_of(model, "q_proj")


@pytest.mark.parametrize("options", [{"refresh": "exact"}, {"proj_type": "left"}, {"proj_type": "std"}])
def test_it_refuses_what_it_cannot_share(options):
    with pytest.raises(ValueError, match="share_inputs needs refresh='streaming' and proj_type='right'"):
        enable(HEADS.model(), rank=2, share_inputs=True, **options)


def test_siblings_with_one_weight_train_together():
    class Tied(Heads):
        def __init__(self):
            super().__init__()
            self.v_proj.weight = self.k_proj.weight

    case = Case(Tied, regression)
    model, _, engine = on_engine(case, torch.float64, **OPTIONS)
    assert model.v_proj.lowrank_update is model.k_proj.lowrank_update
    plain = case.model(torch.float64)
    backward(case, model, 0)
    backward(case, plain, 0)
    byhand = plain.k_proj.weight.grad @ basis_of(model, "k_proj").matrix
    torch.testing.assert_close(model.k_proj.lowrank_update.grad, byhand, rtol=0, atol=1e-14)
    engine.uninstall()
    assert model.v_proj.weight is model.k_proj.weight
