"""The model under the projected backward: to everyone else it is the unpatched model, and it becomes that again."""

import copy

import pytest
import torch
from lowrank_cases import (
    CASES,
    EXACT,
    RANK,
    STACK,
    Case,
    adamw,
    assert_same,
    gpt2,
    inside,
    neox,
    on_engine,
    relative,
    saved,
    train,
    weights,
)

from hf_galore.lowrank_backward import disable, enable, lowrank_backward

# What the model looks like from outside.


def twins(case, **options):
    """(plain model with the optimizer path, model on the engine), both with the same start."""
    return case.model(), on_engine(case, **options)


@pytest.mark.parametrize("fold_every", [1, 3])
@pytest.mark.parametrize("name", ["linear", "used twice", "gpt-neox", "gpt2"])
class TestStateDict:
    def test_is_the_unpatched_models_at_every_step(self, name, fold_every):
        """Keys, order, dtypes, shapes; and the values are the weights that the model computes with."""
        case = CASES[name]
        plain, (model, optimizer, _) = twins(case, fold_every=fold_every, update_proj_gap=4)
        expected = [(key, value.dtype, value.shape) for key, value in plain.state_dict().items()]
        for step in range(6):
            train(case, model, optimizer, [step])
            with torch.no_grad():
                loss = case.loss(model, case.batch(90))
            state = model.state_dict()
            assert [(key, value.dtype, value.shape) for key, value in state.items()] == expected
            plain.load_state_dict(state)
            with torch.no_grad():
                # Before the fold the update was a term of its own: other roundings, of float32.
                torch.testing.assert_close(case.loss(plain, case.batch(90)), loss, rtol=1e-5, atol=0)
                assert torch.equal(case.loss(plain, case.batch(90)), case.loss(model, case.batch(90)))

    def test_taking_it_in_mid_gap_loses_no_update(self, name, fold_every):
        case, runs = CASES[name], []
        for look in (False, True):
            model, optimizer, _ = on_engine(case, torch.float64, fold_every=fold_every)
            for step in range(8):
                train(case, model, optimizer, [step])
                if look:
                    model.state_dict()
            runs.append(weights(model))
        assert relative(runs[1], runs[0]) <= EXACT

    def test_round_trip(self, name, fold_every):
        case = CASES[name]
        model, optimizer, _ = on_engine(case, fold_every=fold_every)
        train(case, model, optimizer, range(2))
        other, _, _ = on_engine(case, seed=1)
        assert other.load_state_dict(saved(model.state_dict()), strict=True) == ([], [])
        assert_same(weights(other), weights(model))

    def test_loading_replaces_the_weights_whole(self, name, fold_every):
        """Also in mid-gap: what was pending belongs to the weights that are replaced."""
        case = CASES[name]
        model, optimizer, _ = on_engine(case, fold_every=fold_every)
        kept = weights(model)
        train(case, model, optimizer, range(2))
        model.load_state_dict(kept)
        assert_same(weights(model), kept)

    def test_wrong_keys_are_still_refused(self, name, fold_every):
        model, _, _ = on_engine(CASES[name], fold_every=fold_every)
        state = weights(model)
        state["extra"] = state.pop(next(iter(state)))
        with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key"):
            model.load_state_dict(state)


@pytest.mark.parametrize("name", ["gpt-neox", "gpt2"])
@pytest.mark.parametrize("fold_every", [1, 3])
def test_save_pretrained_and_generate_are_those_of_a_plain_model(name, fold_every, tmp_path):
    case = CASES[name]
    plain, (model, optimizer, _) = twins(case, fold_every=fold_every)
    train(case, model, optimizer, range(2))
    model.eval()
    prompt = torch.tensor([[1, 2, 3]])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    early = model.generate(prompt, **settings)  # with updates pending, if fold_every allows
    model.save_pretrained(tmp_path / "mine")
    plain.load_state_dict(model.state_dict())
    plain.eval()
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(early, plain.generate(prompt, **settings))
    assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))
    files = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert "model.safetensors" in files
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == files


@pytest.mark.parametrize("make", [STACK.model, neox, gpt2], ids=["linear", "gpt-neox", "gpt2"])
def test_modules_keep_their_names_classes_and_repr(make):
    model = make()
    before, text = [(name, type(module)) for name, module in model.named_modules()], repr(model)
    enable(model, rank=RANK)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert repr(model) == text


def test_layers_take_their_input_by_keyword():
    model, _, _ = on_engine(STACK)
    x = torch.randn(3, 20)
    assert torch.equal(model.wide(input=x), model.wide(x))


@pytest.mark.parametrize("fold_every", [1, 3])
def test_a_deep_copy_stands_alone(fold_every):
    """As one makes it for an average of weights, or for a reference model: training the one leaves the other."""
    model, optimizer, _ = on_engine(STACK, fold_every=fold_every)
    train(STACK, model, optimizer, range(2))
    twin = copy.deepcopy(model)
    x = STACK.batch(90)
    before, answer = weights(model), model(x).detach()
    torch.testing.assert_close(twin(x), answer)
    assert_same(weights(twin), before)
    with torch.no_grad():
        for param in twin.parameters():
            param.zero_()
    assert not twin(x).any()
    assert_same(weights(model), before)
    train(STACK, model, optimizer, range(2, 4))
    assert not twin(x).any()


# Swapping out.


@pytest.mark.parametrize("make", [STACK.model, neox, gpt2], ids=["linear", "gpt-neox", "gpt2"])
@pytest.mark.parametrize("fold_every", [1, 3])
class TestDisable:
    def test_restores_the_model(self, make, fold_every):
        model = make()
        before = [inside(module) for module in model.modules()]
        hooks = [key for key in vars(model) if "hook" in key]
        enable(model, rank=RANK, fold_every=fold_every)
        assert [inside(module) for module in model.modules()] != before
        disable(model)
        assert [inside(module) for module in model.modules()] == before
        assert not any(getattr(module, name, None) for module in model.modules() for name in hooks)

    def test_keeps_the_trained_weights(self, make, fold_every):
        case = Case(lambda: model, STACK.loss if make == STACK.model else CASES["gpt-neox"].loss)
        model = make()
        start = weights(model)
        engine = enable(model, rank=RANK, fold_every=fold_every)
        optimizer = adamw(engine.param_groups(model))
        engine.attach(optimizer)
        train(case, model, optimizer, range(2))
        pending = engine.layers[next(iter(engine.layers))].pending
        assert pending is (fold_every == 3)
        with torch.no_grad():
            loss = case.loss(model, case.batch(90))
        disable(model)
        with torch.no_grad():
            torch.testing.assert_close(case.loss(model, case.batch(90)), loss, rtol=1e-5, atol=0)
        assert relative(weights(model), start) > 1e-4
        case.loss(model, case.batch(90)).backward()
        assert all(param.grad is not None for param in model.parameters() if param.requires_grad)

    def test_after_an_exception(self, make, fold_every):
        case = Case(lambda: model, STACK.loss if make == STACK.model else CASES["gpt-neox"].loss)
        model = make()
        before = [inside(module) for module in model.modules()]
        seen = []

        def interrupted():
            with lowrank_backward(model, rank=RANK, fold_every=fold_every) as engine:
                optimizer = adamw(engine.param_groups(model))
                engine.attach(optimizer)
                train(case, model, optimizer, range(2))
                with torch.no_grad():
                    seen.append(case.loss(model, case.batch(90)))
                case.loss(model, case.batch(3)).backward()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert [inside(module) for module in model.modules()] == before
        with torch.no_grad():
            torch.testing.assert_close(case.loss(model, case.batch(90)), seen[0], rtol=1e-5, atol=0)

    def test_twice_and_on_a_plain_model(self, make, fold_every):
        model = make()
        disable(model)
        enable(model, rank=RANK, fold_every=fold_every)
        before = weights(model)
        disable(model)
        disable(model)
        assert_same(weights(model), before)


def test_the_context_manager_ends_without_an_exception():
    model = STACK.model()
    with lowrank_backward(model, rank=RANK):
        assert not model.wide.weight.requires_grad
    assert model.wide.weight.requires_grad


def test_enabling_again_starts_anew_from_the_trained_weights():
    model, optimizer, engine = on_engine(STACK, fold_every=3)
    train(STACK, model, optimizer, range(2))
    x = STACK.batch(90)
    y = model(x).detach()
    again = enable(model, rank=2)
    assert again is not engine
    assert {name for name, _ in model.wide.named_parameters()} == {"weight", "bias", "lowrank_update"}
    torch.testing.assert_close(model(x), y)
    assert model.wide.lowrank_update.shape == (12, 2)
    optimizer = adamw(again.param_groups(model))
    again.attach(optimizer)
    start = weights(model)
    train(STACK, model, optimizer, range(2))
    assert relative(weights(model), start) > 1e-4


def test_out_and_in_again_goes_on_where_it_was():
    runs = []
    for interrupt in (False, True):
        model, optimizer, engine = on_engine(STACK, update_proj_gap=3)
        for step in range(8):
            train(STACK, model, optimizer, [step])
            if interrupt:
                optimizer.zero_grad()
                engine.uninstall()
                engine.install()
        runs.append(weights(model))
    assert_same(runs[1], runs[0])


def test_two_models_side_by_side():
    alone = []
    for seed in (0, 1):
        model, optimizer, _ = on_engine(STACK, seed=seed)
        train(STACK, model, optimizer, range(6))
        alone.append(weights(model))
    both = [on_engine(STACK, seed=seed) for seed in (0, 1)]
    for step in range(6):
        for model, optimizer, _ in both:
            train(STACK, model, optimizer, [step])
    disable(both[0][0])
    for (model, _, _), expected in zip(both, alone, strict=True):
        assert_same(weights(model), expected)
    assert not both[1][0].wide.weight.requires_grad


def test_between_steps_the_small_parameters_hold_no_memory():
    """B is zero from one step to the next, so one element stands for it; to torch it looks as ever."""
    model = STACK.model()
    assert all(layer.update.is_contiguous() for layer in enable(model, rank=RANK).layers.values())  # nobody steps it
    model, optimizer, engine = on_engine(STACK)

    def check():
        for layer in engine.layers.values():
            assert layer.update.untyped_storage().nbytes() == layer.update.element_size()
            assert layer.update.shape == layer.side.project(layer.weight.stored, layer.basis.matrix).shape
            assert not layer.update.any()
            assert layer.update.requires_grad
            assert layer.update.is_leaf

    check()
    train(STACK, model, optimizer, range(3))
    check()
    assert sum(param.numel() for param in copy.deepcopy(model).parameters() if param.requires_grad) > 0
    model.state_dict()
    check()
    _, optimizer, engine = on_engine(STACK, fold_every=2)
    assert all(layer.update.is_contiguous() for layer in engine.layers.values())  # pending between folds
