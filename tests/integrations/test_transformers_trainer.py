"""What the Trainer promises of any optimizer, for every GaLore name; and where galore-torch breaks the promise.

A behaviour is a function of a `Run`. It is run with hf_galore behind the name. Where galore-torch is known to fail,
the same function is run with it too and must fail there, so that such a behaviour cannot pass by checking nothing.
"""

import copy
import itertools
import math
import re
import warnings

import pytest
import torch
import transformers
from trainer_cases import (
    LAYERWISE,
    METHODS,
    NAMES,
    RANK,
    Run,
    StepRecorder,
    assert_same,
    distance,
    hooks_on,
    layers_of,
    llama,
    logged,
    optimizer_of,
    state_of,
    tokens,
    weights,
)
from transformers import Trainer

from hf_galore.lowrank_backward import lowrank_backward

SAME_BATCH = tokens(samples=4) * 16
EPS = torch.finfo(torch.float32).eps


# The arguments of the Trainer reach the step.


def weight_decay_is_decoupled(run):
    """One step with decay differs from one without by −lr·wd·W, and by nothing at all in norms and biases.

    Both steps round W and a sum of RANK products a few times, each time by at most EPS/2 of |W| + lr·RANK. That bounds
    every partial sum: the normalised update has entries of about 1 (Adafactor: root mean square 1) before lr.
    """
    lr, decay = 1e-2, 0.5
    initial = weights(llama())
    plain, decayed = (
        weights(run.train(llama(), max_steps=1, learning_rate=lr, weight_decay=value).model) for value in (0.0, decay)
    )
    for name, start in initial.items():
        if start.dim() < 2:
            assert torch.equal(plain[name], decayed[name]), f"{name} was decayed"
        else:
            error = (decayed[name].double() - plain[name].double() + lr * decay * start.double()).abs()
            assert (error <= (RANK + 4) * EPS * (start.abs() + lr * RANK)).all(), f"{name}: no decay of lr·wd·W"


def adam_arguments_reach_the_step(run):
    """adam_beta1, adam_beta2 and adam_epsilon are in every group, and each of them changes the weights."""
    given = {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3}
    usual = weights(run.train(llama(), max_steps=2).model)
    for key, value in given.items():
        trainer = run.train(llama(), max_steps=2, **{key: value})
        for group in trainer.optimizer.param_groups:
            beta1, beta2 = group["betas"]
            used = {"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": group["eps"]}
            assert used[key] == value, f"{key} is ignored"
        assert distance(weights(trainer.model), usual) > 0


def schedule_is_followed(run):
    """Warm-up from zero, then linear to zero: the logged rates are the schedule's, and each step moves by its share.

    The batch is the same in every step and the rate so small that no weight moves by more than 1e-4, so at equal rates
    the steps of two runs are equal to first order. 0.01 is far below the differences of the shares, and above what
    second order (weights of 0.02 that differ by less than 1e-4) and rounding (EPS · 1 against 1e-5, in norms) leave.
    """
    steps, lr = 5, 1e-5
    moved, rates = {}, {}
    for kind in ("constant", "linear"):
        model = llama()
        recorder = StepRecorder(model)
        trainer = run.train(
            model,
            SAME_BATCH,
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type=kind,
            warmup_steps=1 if kind == "linear" else 0,
            optim_args=", update_proj_gap=100",
            trainer={"callbacks": [recorder]},
        )
        moved[kind], rates[kind] = recorder.moved(), logged(trainer, "learning_rate")
    share = [0.0, 1.0, 0.75, 0.5, 0.25]
    assert rates["linear"] == pytest.approx([lr * s for s in share])
    assert moved["linear"][0] == 0.0, "a step at rate zero moved the weights"
    # Step k of the linear run has Adam's memory of k gradients, as step k of the constant run has.
    assert [a / b for a, b in zip(moved["linear"], moved["constant"], strict=True)] == pytest.approx(share, abs=0.01)


def gradients_are_clipped(run):
    """grad_norm is logged as it is before clipping, and the optimizer gets gradients of norm max_grad_norm.

    In the projected backward the gradient of a target is R = G Q, with G by hand from a model without it.

    The first moments of a norm's weights after one step are its gradients. 1e-4 is room for a norm of 10^5 float32
    squares and clip_grad_norm_'s 1e-6; the factor to be seen is 10.
    """
    by_hand = llama()
    batch = {key: torch.stack([row[key] for row in tokens()[:4]]) for key in ("input_ids", "labels")}
    by_hand(**batch).loss.backward()
    grads = {name: param.grad.double() for name, param in by_hand.named_parameters()}
    trained = run.trainer(model := llama())
    if trained.args.optim in LAYERWISE:
        with lowrank_backward(model, rank=RANK, seed=trained.args.seed) as engine:  # the bases of the first step
            names = {module: f"{name}.weight" for name, module in model.named_modules()}
            grads |= {
                (n := names[layer.module]): grads[n] @ layer.basis.matrix.double() for layer in engine.layers.values()
            }
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))

    trainer = run.train(llama(), max_steps=1, max_grad_norm=norm / 10)
    assert logged(trainer, "grad_norm") == pytest.approx([norm], rel=1e-4), "grad_norm is not that of the gradients"
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        state = state_of(trainer)[name]
        seen = state["exp_avg"] / (1 - 0.9) if "exp_avg" in state else state["exp_avg_sq"].sqrt()
        clipped = grads[name] / 10 if "exp_avg" in state else grads[name].abs() / 10
        torch.testing.assert_close(seen.double(), clipped, rtol=1e-4, atol=1e-6 * norm)


def accumulation_equals_a_larger_batch(run):
    """Four micro-batches of two give the weights that one batch of eight gives.

    In float64 the gradients of the two differ by the order of one sum, some 1e-16; Adam divides by |g| + eps, so by at
    most lr·1e-16/1e-8 = 1e-11 a step. (The 8-bit optimizer keeps float64 moments for float64 weights, so no code
    boundary can turn the last bit into a step of the code.)
    """
    one, many = (
        weights(
            run.train(
                llama(torch.float64), per_device_train_batch_size=8 // count, gradient_accumulation_steps=count
            ).model
        )
        for count in (1, 4)
    )
    for name, expected in one.items():
        torch.testing.assert_close(many[name], expected, rtol=0.0, atol=1e-10)


# Memory savers and precisions.


def _checkpointing(run, use_reentrant):
    """Recomputed activations are the same bits, so the weights are; also where one layer is used twice."""
    results = []
    for options in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}):
        model = llama(use_cache=False)
        model.model.layers[1] = model.model.layers[0]
        trainer = run.train(model, gradient_checkpointing=bool(options), **options)
        results.append(weights(trainer.model))
    assert_same(results[1], results[0])


def checkpointing_reentrant(run):
    _checkpointing(run, use_reentrant=True)


def checkpointing_non_reentrant(run):
    _checkpointing(run, use_reentrant=False)


def autocast_keeps_float32_weights(run):
    """bf16=True computes in bfloat16 (another loss, by less than its 2^-8) and keeps weights and states in float32."""
    model = llama()
    exact = logged(run.train(llama(), SAME_BATCH, max_steps=1), "loss")[0]
    trainer = run.train(model, SAME_BATCH, max_steps=6, bf16=True)
    losses = logged(trainer, "loss")
    assert losses[0] != exact
    assert losses[0] == pytest.approx(exact, rel=2**-8)
    assert losses == sorted(losses, reverse=True)
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    kinds = {value.dtype for state in state_of(trainer).values() for value in state.values()}
    assert kinds <= {torch.float32, torch.uint8}


def bfloat16_weights_follow_float32(run):
    """Steps far below bfloat16's spacing add up: ten of them move bfloat16 weights as far as float32 ones.

    At lr·scale = 2.5e-5 and weights of 0.02 (spacing 1.2e-4) rounding to nearest moves next to nothing. Stochastic
    rounding is right in the mean; over 10^5 weights its noise in this projection is below 1 %. The rest is bfloat16's
    gradients, whose subspaces and signs differ a little: a fifth of the way is left for it. (Rounding to nearest gets
    a third of the way, through the many weights that are close to zero.)
    """
    ways = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = llama(dtype)
        start = weights(model)
        run.train(model, SAME_BATCH, max_steps=10, learning_rate=1e-4, optim_args=", scale=0.25")
        assert {param.dtype for param in model.parameters()} == {dtype}
        matrices = [name for name in start if "layers" in name and start[name].dim() == 2]
        ways[dtype] = torch.cat([(weights(model)[n].double() - start[n].double()).flatten() for n in matrices])
    exact, rounded = ways[torch.float32], ways[torch.bfloat16]
    assert 0.8 < float(exact @ rounded / (exact @ exact)) < 1.2, "bfloat16 weights do not move as float32 weights do"


def every_parameter_trains(run):
    """One step moves every parameter, small ones too, and a few steps on one batch lower its loss at each."""
    model = llama()
    start = weights(model)
    run.train(model, max_steps=1)
    assert not [name for name, value in weights(model).items() if torch.equal(value, start[name])]
    losses = logged(run.train(model, SAME_BATCH, max_steps=6), "loss")
    assert losses == sorted(losses, reverse=True)


class Poison(transformers.TrainerCallback):
    """Makes what one parameter's step is taken from NaN before the third step, which refreshes the bases."""

    def __init__(self, name):
        self.name, self.trainer = name, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            layer = layers_of(self.trainer).get(self.name)
            grad = layer.update.grad if layer else self.trainer.model.get_parameter(self.name).grad
            for source in (grad, layer.basis.sketch) if layer else (grad,):
                source.fill_(math.nan)


def nan_at_a_refresh_is_survived(run):
    """The poisoned parameter keeps the basis it had; all others refresh theirs and stay finite."""
    name = "model.layers.0.mlp.up_proj.weight"
    model = llama()
    at_once = {"optim_args": ", stagger=false"}
    before = state_of(run.train(copy.deepcopy(model), max_steps=2, **at_once))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        poison = Poison(name)
        poison.trainer = trainer = run.trainer(model, max_steps=3, trainer={"callbacks": [poison]}, **at_once)
        trainer.train()
    assert [w for w in caught if "not finite" in str(w.message)], "no warning"
    after = state_of(trainer)
    changed = {n for n in after if "basis" in after[n] and not torch.equal(after[n]["basis"], before[n]["basis"])}
    assert changed == {n for n in after if "basis" in after[n]} - {name}
    assert not [n for n, value in weights(model).items() if n != name and not value.isfinite().all()]


# One run leaves nothing behind for the next.


def a_second_trainer_starts_afresh(run):
    """The step of a second Trainer on the same model is that of a first one on a copy, and no hook stays."""
    model = llama()
    run.train(model, max_steps=1)
    copied = copy.deepcopy(model)
    run.train(copied, max_steps=1, learning_rate=1e-4)
    run.train(model, max_steps=1, learning_rate=1e-4)
    assert_same(weights(model), weights(copied))
    assert hooks_on(model) == 0


class Raise(transformers.TrainerCallback):
    """Ends training after the second step, in the middle of a subspace, with the error."""

    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise self.error


def _afresh_after(run, error, optim):
    """Training that the error has ended leaves the model as the user gave it: a next Trainer treats it so."""
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    shape = [(name, param.requires_grad) for name, param in model.named_parameters()]
    trainer = run.trainer(model, optim_args=", update_proj_gap=3", trainer={"callbacks": [Raise(error)]})
    with pytest.raises(type(error)):
        trainer.train()
    assert [(name, param.requires_grad) for name, param in model.named_parameters()] == shape
    assert list(model.state_dict()) == list(llama().state_dict())
    assert not [m for m in model.modules() if "forward" in vars(m)], "a forward is not the module's own"
    assert hooks_on(model) == 0
    assert all(param.grad is None for param in model.parameters()) or "layerwise" not in run.optim
    copied = llama()
    copied.load_state_dict(model.state_dict())
    copied.model.embed_tokens.weight.requires_grad_(False)
    for each in (model, copied):
        Run(optim or run.optim, run.folder).train(each, **{} if optim is None else {"optim_args": None})
    assert_same(weights(model), weights(copied))


def afresh_after_an_error(run):
    _afresh_after(run, RuntimeError("of a callback"), None)


def afresh_after_an_interrupt(run):
    _afresh_after(run, KeyboardInterrupt(), None)


def afresh_with_another_optimizer(run):
    _afresh_after(run, KeyboardInterrupt(), "adamw_torch")


def the_model_is_the_users_own_again(run):
    """After training, names, classes, requires_grad, keys and hooks are as before, and every matrix gets gradients."""
    model, before = llama(), llama()
    run.train(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
    assert [n for n, param in model.named_parameters() if param.requires_grad] == list(weights(before))
    assert list(model.state_dict()) == list(before.state_dict())
    assert not [m for m in model.modules() if "forward" in vars(m)]
    assert hooks_on(model) == 0
    batch = {key: torch.stack([row[key] for row in tokens()[:4]]) for key in ("input_ids", "labels")}
    model.zero_grad()
    model(**batch).loss.backward()
    assert not [name for name, param in model.named_parameters() if param.grad is None]


def a_plain_run_afterwards_is_plain(run):
    """A second Trainer with optim="adamw_torch" trains as it would on a copy that never knew ours."""
    model, copied = llama(), llama()
    run.train(model)
    copied.load_state_dict(model.state_dict())
    plain = Run("adamw_torch", run.folder)
    results = [plain.train(each, optim_args=None) for each in (model, copied)]
    assert_same(weights(model), weights(copied))
    assert in_both(results, "grad_norm")


def in_both(trainers, key):
    """Both Trainers logged the same values, and some."""
    one, other = (logged(trainer, key) for trainer in trainers)
    return one == other != []


def train_again_continues(run):
    """A second train() of one Trainer goes on with the optimizer it has: twice one epoch is two epochs."""
    settings = {"optim_args": ", update_proj_gap=4"}  # the second refresh is in the second call
    epoch = tokens(samples=12)
    trainer = run.train(llama(), epoch, max_steps=3, **settings)
    trainer.train()
    once = run.train(llama(), epoch, max_steps=6, **settings)
    assert_same(weights(trainer.model), weights(once.model))
    for name, state in state_of(once).items():
        assert_same(state_of(trainer)[name], state)


def looking_changes_nothing(run):
    """Evaluating and saving after each step leave the run's bits alone; a checkpoint holds what was evaluated.

    The evaluated loss is that of a plain model from the checkpoint, to the rounding of a mean of 60 float32 terms.
    """
    held_out = {"eval_dataset": tokens(samples=4, seed=2)}
    looks = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    looked = run.train(llama(), trainer=held_out, **looks)
    assert_same(weights(looked.model), weights(run.train(llama()).model))
    evaluated = logged(looked, "eval_loss")
    assert len(set(evaluated)) == 3
    for step, loss in enumerate(evaluated, start=1):
        plain = transformers.AutoModelForCausalLM.from_pretrained(run.folder / f"checkpoint-{step}")
        batch = {key: torch.stack([row[key] for row in held_out["eval_dataset"]]) for key in ("input_ids", "labels")}
        assert plain.eval()(**batch).loss.item() == pytest.approx(loss, rel=60 * EPS)
    assert looked.evaluate()["eval_loss"] == evaluated[-1]
    assert looked.predict(held_out["eval_dataset"]).metrics["test_loss"] == evaluated[-1]
    looked.save_model(str(run.folder / "final"))
    assert_same(weights(type(looked.model).from_pretrained(run.folder / "final")), weights(looked.model))


def the_best_model_is_loaded_at_the_end(run):
    """load_best_model_at_end puts the best checkpoint's weights into the model, in place."""
    model = llama()
    trainer = run.train(
        model,
        SAME_BATCH,
        trainer={"eval_dataset": SAME_BATCH[:4]},
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first step is the best
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    best = transformers.AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    evaluated = logged(trainer, "eval_loss")
    assert max(evaluated) == evaluated[0] > evaluated[-1]
    assert trainer.model is model
    assert_same(weights(model), weights(best))


def asking_for_the_optimizer_leaves_nothing(run):
    """get_optimizer_cls_and_kwargs, called again and again, puts nothing on the model."""
    model, arguments = llama(), run.arguments()
    for _ in range(3):
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    assert hooks_on(model) == 0
    run.train(model, max_steps=1)
    assert_same(weights(model), weights(run.train(llama(), max_steps=1).model))


def training_again_from_model_init_repeats_itself(run):
    """Each trial of a search calls train() on one Trainer, with a model of its own: equal trials end equal."""
    trainer = run.trainer(None, trainer={"model_init": lambda: llama()})
    trainer.train()
    first, first_model = weights(trainer.model), trainer.model
    trainer.train()
    assert trainer.model is not first_model
    assert_same(weights(trainer.model), first)
    assert_same(first, weights(run.train(llama()).model))


def trials_of_a_search_do_not_touch_each_other(run):
    """hyperparameter_search with two trials at the same values: the second ends as a run of its own does."""
    models = []
    trainer = run.trainer(
        None, trainer={"model_init": lambda: models.append(llama()) or models[-1], "eval_dataset": tokens(samples=4)}
    )
    values = {"learning_rate": [3e-3]}
    trainer.hyperparameter_search(
        hp_space=lambda trial: {name: trial.suggest_categorical(name, choices) for name, choices in values.items()},
        n_trials=2,
        backend="optuna",
    )
    expected = weights(run.train(llama(), learning_rate=3e-3).model)
    for model in models[-2:]:
        assert_same(weights(model), expected)


class AtMost:
    """A collator that runs out of memory above four samples, as CUDA says it."""

    def __init__(self):
        self.failures = 0

    def __call__(self, samples):
        if len(samples) > 4:
            self.failures += 1
            raise RuntimeError("CUDA out of memory.")
        return transformers.default_data_collator(samples)


def a_smaller_batch_after_out_of_memory(run):
    """auto_find_batch_size ends with the weights of a run that started at the size it found (5 → 4)."""
    collator = AtMost()
    found = run.train(
        llama(), per_device_train_batch_size=5, auto_find_batch_size=True, trainer={"data_collator": collator}
    )
    assert collator.failures == 1
    assert_same(weights(found.model), weights(run.train(llama()).model))


class FailingOnce(transformers.TrainerCallback):
    """The first backward pass runs out of memory where the named parameter gets its gradient."""

    def __init__(self, name):
        self.name, self.trainer, self.failures = name, None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        layer = layers_of(self.trainer).get(self.name)
        (layer.update if layer else self.trainer.model.get_parameter(self.name)).register_hook(self.fail)

    def fail(self, grad):
        self.failures += 1
        if self.failures == 1:
            raise RuntimeError("CUDA out of memory.")


def a_smaller_batch_after_a_torn_backward(run):
    """Nothing of a backward pass that ran out of memory half-way is in the next one."""
    callback = FailingOnce("model.layers.0.mlp.up_proj.weight")
    settings = {"per_device_train_batch_size": 5, "auto_find_batch_size": True}
    found = callback.trainer = run.trainer(llama(), trainer={"callbacks": [callback]}, **settings)
    found.train()
    assert callback.failures > 1
    assert_same(weights(found.model), weights(run.train(llama()).model))


# What depends on the rule is for every name. The rest is the Trainer's and ours around it: for a name of each kind.
OF_THE_RULE = [
    weight_decay_is_decoupled,
    adam_arguments_reach_the_step,
    gradients_are_clipped,
    accumulation_equals_a_larger_batch,
    autocast_keeps_float32_weights,
    bfloat16_weights_follow_float32,
    every_parameter_trains,
    nan_at_a_refresh_is_survived,
]
OF_THE_TRAINER = [
    schedule_is_followed,
    checkpointing_reentrant,
    checkpointing_non_reentrant,
    a_second_trainer_starts_afresh,
    afresh_after_an_error,
    afresh_after_an_interrupt,
    afresh_with_another_optimizer,
    the_model_is_the_users_own_again,
    a_plain_run_afterwards_is_plain,
    train_again_continues,
    looking_changes_nothing,
    the_best_model_is_loaded_at_the_end,
    asking_for_the_optimizer_leaves_nothing,
    training_again_from_model_init_repeats_itself,
    trials_of_a_search_do_not_touch_each_other,
    a_smaller_batch_after_out_of_memory,
    a_smaller_batch_after_a_torn_backward,
]
MAIN = (METHODS[0], LAYERWISE[0])
CASES = [
    pytest.param(method, check, id=f"{method}-{check.__name__}", marks=() if method in fast else pytest.mark.slow)
    for methods, checks, fast in (
        (NAMES, OF_THE_RULE, (*METHODS, LAYERWISE[0])),
        (MAIN, OF_THE_TRAINER, MAIN),
    )
    for method in methods
    for check in checks
    if check is not adam_arguments_reach_the_step or "adam" in method  # Adafactor has none of these
]


OLD_NAMES = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@OLD_NAMES
@pytest.mark.parametrize(("method", "check"), CASES)
def test_keeps_the_promise(method, check, ours, tmp_path):
    check(Run(method, tmp_path))


# What only the projected backward has.


def folds_may_wait(run):
    """fold_every=3 ends where fold_every=1 does, evaluates and saves what is not folded yet, and resumes from that.

    In float64 the two sum the same terms in another order, some 1e-16 a step. Adam may make lr·1e-16/1e-8 = 1e-11 of
    it; Llama's norms go through float32, where 1e-16 can become 1e-7 of a gradient, in the few entries that it turns:
    lr·1e-3 is room for those.
    """
    looks = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 4, "max_steps": 5}
    held_out = {"eval_dataset": tokens(samples=4, seed=2)}
    each, third = (
        run.train(llama(torch.float64), optim_args=f", fold_every={k}", trainer=held_out, **looks) for k in (1, 3)
    )
    for name, value in weights(each.model).items():
        torch.testing.assert_close(weights(third.model)[name], value, rtol=0.0, atol=1e-6)
    assert logged(third, "eval_loss") == pytest.approx(logged(each, "eval_loss"), rel=1e-6)
    resumed = run.trainer(llama(torch.float64, seed=1), optim_args=", fold_every=3", **looks | {"eval_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(run.folder / "checkpoint-4"))
    assert_same(weights(resumed.model), weights(third.model))


def options_reach_the_engine(run):
    """Every key of optim_args that the projected backward has is that of its settings, the seed is the Trainer's."""
    keys = {"refresh": "exact", "moments": "rotate", "fold_every": 2, "proj_type": "std", "subspace": "svd"}
    text = "".join(f", {key}={value}" for key, value in keys.items())
    trainer = run.train(llama(), seed=7, optim_args=f"{text}, stagger=true, state_dtype=bfloat16", max_steps=1)
    settings = optimizer_of(trainer).lowrank_backward.settings
    assert {key: getattr(settings, key) for key in keys} == keys
    assert (settings.rank, settings.stagger, settings.state_dtype, settings.seed) == (RANK, True, torch.bfloat16, 7)
    own = run.train(llama(), optim_args=", seed=3, stochastic_rounding=false", max_steps=1)
    settings = optimizer_of(own).lowrank_backward.settings
    assert (settings.seed, settings.stochastic_rounding, settings.refresh) == (3, False, "streaming")


def staggered_layers_refresh_one_after_another(run):
    """With stagger=true no two of 14 layers refresh in the same of 14 steps, when all have done so once."""
    gap, seen = 14, []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append({name: layer.basis.matrix.clone() for name, layer in layers_of(trainer).items()})

    trainer = run.trainer(
        llama(),
        max_steps=2 * gap + 1,
        optim_args=f", update_proj_gap={gap}, stagger=true",
        trainer={"callbacks": [Watch()]},
    )
    trainer.train()
    pairs = itertools.pairwise(seen)
    moved = [sum(not torch.equal(after[n], before[n]) for n in before) for before, after in pairs]
    assert moved[gap:] == [1] * gap
    assert max(moved) <= 2  # the first and the second refresh of two layers


def only_small_gradients_exist(run):
    """While training, no target has a gradient, and B's is (m, r)."""

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for name, layer in layers_of(trainer).items():
                weight = trainer.model.get_parameter(name)
                assert weight.grad is None
                assert not weight.requires_grad
                assert layer.update.grad.shape == (weight.shape[0], RANK)
            self.seen = len(layers_of(trainer))

    watch = Watch()
    trainer = run.trainer(llama(), trainer={"callbacks": [watch]})
    trainer.train()
    assert watch.seen == 14


LAYERWISE_BEHAVIOURS = [
    folds_may_wait,
    options_reach_the_engine,
    staggered_layers_refresh_one_after_another,
    only_small_gradients_exist,
]


@pytest.mark.parametrize("check", LAYERWISE_BEHAVIOURS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "method", [LAYERWISE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LAYERWISE[1:])]
)
def test_projected_backward(method, check, ours, tmp_path):
    check(Run(method, tmp_path))


EXACT = [
    accumulation_equals_a_larger_batch,
    checkpointing_reentrant,
    checkpointing_non_reentrant,
    autocast_keeps_float32_weights,
    bfloat16_weights_follow_float32,
    every_parameter_trains,
    a_smaller_batch_after_a_torn_backward,
]


class Exact(Run):
    """A `Run` with refresh=exact."""

    def arguments(self, optim_args="", **changes):
        if not changes.get("optim", self.optim).endswith("layerwise"):
            return super().arguments(optim_args, **changes)
        return super().arguments(f"{optim_args or ''}, refresh=exact", **changes)


@OLD_NAMES
@pytest.mark.filterwarnings("ignore:.*holds the full gradients of all layers")
@pytest.mark.slow
@pytest.mark.parametrize("check", EXACT, ids=lambda check: check.__name__)
def test_keeps_the_promise_with_exact_refreshes(check, ours, tmp_path):
    check(Exact(LAYERWISE[0], tmp_path))


def test_torch_compile(ours, tmp_path):
    """torch_compile=True trains as without, refreshes included.

    aot_eager runs the same kernels in the order of the traced graph: losses to 1e-5 (the rounding of a float32 loss,
    some times), the way of the weights to a hundredth (Adam makes steps of lr from gradients that are mere rounding).
    """
    run = Run(LAYERWISE[0], tmp_path)
    start = weights(llama(num_hidden_layers=1, use_cache=False))
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    try:
        eager, traced = (
            run.train(llama(num_hidden_layers=1, use_cache=False), **options) for options in ({}, compiled)
        )
    finally:
        torch._dynamo.reset()
    assert logged(traced, "loss") == pytest.approx(logged(eager, "loss"), rel=1e-5)
    apart = distance(weights(traced.model), weights(eager.model))
    assert apart < 0.01 * distance(start, weights(eager.model))


# What fails with galore-torch 1.0 and transformers 5.23, and how.
ADAMW, ADAMW_8BIT, ADAFACTOR = METHODS
LAYERED = LAYERWISE[0]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="galore-torch's 8-bit step works where there is CUDA")
DEFECTS = [
    (ADAMW, weight_decay_is_decoupled, AssertionError, "no decay"),
    (ADAFACTOR, weight_decay_is_decoupled, AssertionError, "no decay"),
    (ADAMW, adam_arguments_reach_the_step, AssertionError, "adam_beta1 is ignored"),
    (LAYERED, schedule_is_followed, AssertionError, "a step at rate zero"),
    (LAYERED, gradients_are_clipped, AssertionError, "grad_norm is not that"),
    (LAYERED, accumulation_equals_a_larger_batch, ValueError, "does not support gradient accumulation"),
    (LAYERED, checkpointing_reentrant, AssertionError, "differ"),
    (ADAMW, bfloat16_weights_follow_float32, AssertionError, "do not move as float32 weights do"),
    (ADAFACTOR, bfloat16_weights_follow_float32, AssertionError, "do not move as float32 weights do"),
    (ADAMW, nan_at_a_refresh_is_survived, torch.linalg.LinAlgError, "non-finite"),
    (ADAFACTOR, nan_at_a_refresh_is_survived, torch.linalg.LinAlgError, "non-finite"),
    (LAYERED, a_second_trainer_starts_afresh, AssertionError, "differ"),
    (LAYERED, asking_for_the_optimizer_leaves_nothing, AssertionError, "hooks_on"),
    (LAYERWISE[2], every_parameter_trains, ValueError, "Cannot combine manual"),
]


@pytest.mark.slow
@OLD_NAMES
@pytest.mark.filterwarnings("ignore::FutureWarning:galore_torch")
@pytest.mark.parametrize(
    ("name", "check", "error", "message"),
    [
        *(pytest.param(*row, id=f"{row[0]}-{row[1].__name__}") for row in DEFECTS),
        pytest.param(ADAMW_8BIT, every_parameter_trains, AssertionError, "CUDA", marks=NO_CUDA, id="8bit-on-a-cpu"),
    ],
)
def test_galore_torch_does_not(name, check, error, message, incumbent, tmp_path):
    with pytest.raises(error, match=re.escape(message)):
        check(Run(name, tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the Trainer's fp16=True, with its GradScaler, needs a GPU")
@pytest.mark.parametrize("method", NAMES)
def test_gradient_scaler(method, ours, tmp_path):
    """fp16=True: the scaler unscales before clipping and the step, so the weights follow those of float32."""
    start = weights(llama())
    exact, scaled = (
        weights(Run(method, tmp_path).train(llama(), SAME_BATCH, max_steps=6, use_cpu=False, fp16=fp16).model)
        for fp16 in (False, True)
    )
    exact, scaled = ({name: value.cpu() for name, value in result.items()} for result in (exact, scaled))
    # The scaler starts at 2^16 and may skip some steps while it finds its scale: the same way, not the same length.
    ways = [torch.cat([(end[n] - start[n]).double().flatten() for n in start]) for end in (exact, scaled)]
    assert float(torch.cosine_similarity(*ways, dim=0)) > 0.5
