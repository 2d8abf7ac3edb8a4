"""While the projected backward trains, whoever walks the model's parameters finds those of the plain model."""

import copy

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel
from trainer_cases import LAYERWISE, Run, assert_same, build, logged, optimizer_of, tokens, weights
from transformers import GPT2Config, GPTNeoXConfig, OPTConfig

from hf_galore import GaLoreAdamW
from hf_galore.lowrank_backward import disable, enable, engine_of

CONFIGS = {"gpt2": GPT2Config, "gpt_neox": GPTNeoXConfig, "opt": OPTConfig}
each_family = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
BATCH = torch.stack([sample["input_ids"] for sample in tokens(2)])


def seen(model):
    """What those who walk a model or count its weights see."""
    named = [(name, id(param), tuple(param.shape)) for name, param in model.named_parameters()]
    return named, list(map(id, model.parameters())), model.num_parameters(), list(model.state_dict())


class Walks(transformers.TrainerCallback):
    """Keeps what callbacks see at each event."""

    def __init__(self):
        self.events = {}

    def _walk(self, event, model):
        self.events.setdefault(event, []).append(seen(model))

    def on_train_begin(self, *_, model, **kwargs):
        self._walk("train_begin", model)

    def on_step_begin(self, *_, model, **kwargs):
        self._walk("step_begin", model)

    def on_pre_optimizer_step(self, *_, model, **kwargs):
        self._walk("pre_optimizer_step", model)

    def on_step_end(self, *_, model, **kwargs):
        self._walk("step_end", model)

    def on_evaluate(self, *_, model, **kwargs):
        self._walk("evaluate", model)

    def on_save(self, *_, model, **kwargs):
        self._walk("save", model)


def callback(**methods):
    """A callback of functions of the model."""

    def method(function):
        return lambda self, *_, model, **kwargs: function(model)

    return type("Callback", (transformers.TrainerCallback,), {n: method(f) for n, f in methods.items()})()


@each_family
def test_callbacks_see_the_plain_model(config, ours, tmp_path):
    """Also in a second run of the Trainer; and what was frozen when it began is frozen when it ends."""
    model, walks = build(config), Walks()
    plain = seen(model)
    model.get_input_embeddings().weight.requires_grad_(False)
    trains = [param.requires_grad for param in model.parameters()]
    saving = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    trainer = Run(LAYERWISE[0], tmp_path).trainer(
        model, trainer={"callbacks": [walks], "eval_dataset": tokens(4)}, **saving
    )
    for run in (1, 2):
        trainer.train()
        assert {event: len(views) for event, views in walks.events.items()} == {
            "train_begin": run,
            "step_begin": 3 * run,
            "pre_optimizer_step": 3 * run,
            "step_end": 3 * run,
            "evaluate": 3 * run,
            "save": 2 * run,
        }
        assert [event for event, views in walks.events.items() if any(view != plain for view in views)] == []
        assert [param.requires_grad for param in model.parameters()] == trains
        assert seen(model) == plain


@each_family
def test_averages_of_weights(config, ours, tmp_path):
    """One made before training, one made in it, and one by hand, over a Trainer that averages after every step."""
    model, by_hand, later = build(config), {}, []
    average = AveragedModel(model)

    def step_end(model):
        average.update_parameters(model)
        if not later:
            later.append(AveragedModel(model))
        later[0].update_parameters(model)
        for name, param in model.named_parameters():
            by_hand.setdefault(name, []).append(param.detach().clone())

    Run(LAYERWISE[0], tmp_path).train(model, trainer={"callbacks": [callback(on_step_end=step_end)]})
    for averaged in (average, later[0]):
        assert int(averaged.n_averaged) == 3
        for name, param in averaged.module.named_parameters():
            torch.testing.assert_close(param, torch.stack(by_hand[name]).mean(0))
    plain = build(config)
    plain.load_state_dict(average.module.state_dict())
    disable(later[0].module)
    for averaged in (average.module, later[0].module):
        torch.testing.assert_close(averaged.eval()(BATCH).logits, plain.eval()(BATCH).logits)


def test_a_target_frozen_between_runs_stays_frozen(ours, tmp_path):
    """The optimizer has its small parameter, so that it trains on, as it would have in one run."""
    model = build(GPT2Config)
    trainer = Run(LAYERWISE[0], tmp_path).train(model)
    target = model.transformer.h[0].mlp.c_fc.weight
    target.requires_grad_(False)
    trainer.train()
    assert not target.requires_grad
    assert model.transformer.h[1].mlp.c_fc.weight.requires_grad


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["logged", "clipped"])
def test_the_norm_of_the_gradients_has_the_small_parameters(clip, ours, tmp_path):
    """The norm that the Trainer logs, clipping or not, is that of all gradients that the optimizer gets."""
    norms = []

    def of_all(model):
        grads = [p.grad for group in optimizer_of(trainer).param_groups for p in group["params"]]
        norms.append(float(torch.cat([grad.double().flatten() for grad in grads if grad is not None]).norm()))

    trainer = Run(LAYERWISE[0], tmp_path).trainer(
        build(GPTNeoXConfig), trainer={"callbacks": [callback(on_pre_optimizer_step=of_all)]}, max_grad_norm=clip
    )
    trainer.train()
    expected = [clip] * 3 if clip else norms
    assert norms == pytest.approx(expected, rel=1e-4)  # torch adds 1e-6 to the norm that it divides by
    if not clip:
        assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-5)


# Loops of one's own.


def in_accelerate(accelerator, **options):
    """A model with the projected backward and its optimizer, prepared, after a backward pass."""
    model = build(OPTConfig)
    plain = seen(model)
    engine = enable(model, rank=4, **options)
    assert seen(model) != plain
    optimizer = GaLoreAdamW(engine.param_groups(model), lr=1e-3)
    engine.attach(optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert seen(model) == plain
    accelerator.backward(prepared(input_ids=BATCH, labels=BATCH).loss)
    assert seen(model) == plain
    return prepared, optimizer, engine


def gradients(engine, model):
    return torch.cat([param.grad.flatten() for param in engine.parameters(model) if param.grad is not None])


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_clips_the_small_parameters(accelerator, ours):
    """By norm, given all parameters or those that train, and by value; but not given those of another model."""
    for chosen in (lambda _: True, lambda param: param.requires_grad):
        model, _, engine = in_accelerate(accelerator)
        norm = gradients(engine, model).norm()
        clipped = accelerator.clip_grad_norm_(filter(chosen, model.parameters()), 1e-3)
        torch.testing.assert_close(clipped, norm)
        assert gradients(engine, model).norm().item() == pytest.approx(1e-3, rel=1e-2)
    accelerator.clip_grad_norm_(nn.Linear(2, 2).parameters(), 1e-6)
    assert gradients(engine, model).norm().item() == pytest.approx(1e-3, rel=1e-2)
    accelerator.clip_grad_value_(model.parameters(), 1e-6)
    assert gradients(engine, model).abs().max() <= 1e-6


def test_a_subclass_of_accelerator_clips_in_its_own_way(ours):
    class Counting(Accelerator):
        calls = 0

        def clip_grad_norm_(self, parameters, *args, **kwargs):
            self.calls += 1
            return super().clip_grad_norm_(parameters, *args, **kwargs)

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Counting(cpu=True)
    model, _, engine = in_accelerate(accelerator)
    accelerator.clip_grad_norm_(model.parameters(), 1e-3)
    assert accelerator.calls == 1
    assert gradients(engine, model).norm().item() == pytest.approx(1e-3, rel=1e-2)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_zero_grad_of_a_wrapper_reaches_the_small_parameters(accelerator, ours):
    """As of DDP's or of a compiled model's, around a step that is never taken."""
    model, _, engine = in_accelerate(accelerator)

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    wrapper = accelerator.prepare(Wrapper(model))
    wrapper.zero_grad()
    assert [param for param in engine.parameters(model) if param.grad is not None] == []
    disable(model)
    assert "zero_grad" not in vars(wrapper)


def test_a_step_leaves_no_gradient(accelerator, ours):
    model, optimizer, engine = in_accelerate(accelerator)
    optimizer.step()
    model.zero_grad()
    assert [param for param in engine.parameters(model) if param.grad is not None] == []


def test_a_copy_made_in_training_trains_alone(accelerator, ours):
    """With updates pending in the one that it is a copy of."""
    model, optimizer, _ = in_accelerate(accelerator, fold_every=5)
    optimizer.step()
    twin = copy.deepcopy(model)
    before = weights(twin)
    assert_same(before, weights(model))
    engine = engine_of(twin)
    own = GaLoreAdamW(engine.param_groups(twin), lr=1e-3)
    engine.attach(own)
    twin(input_ids=BATCH, labels=BATCH).loss.backward()
    own.step()
    disable(twin)
    moved = {name for name, value in weights(twin).items() if not torch.equal(value, before[name])}
    assert {name for name in before if "proj.weight" in name or "fc" in name} <= moved
    assert_same(weights(model), before)
