"""BitLinear in the real Trainer: codes once a step, λ, what is logged, resuming, and a teacher."""

import itertools

import pytest
import torch
from parts import in_part, slow
from torch.nn.functional import kl_div, log_softmax
from trainer_cases import Run, assert_same, llama, logged, projected_names, tokens, weights
from transformers.trainer_callback import TrainerState

from hf_galore import replace_linear
from hf_galore.integrations.bitlinear_callbacks import LambdaWarmup, TernaryLog
from hf_galore.integrations.distillation import distill
from hf_galore.nn import bitlinear
from hf_galore.nn.bitlinear import BitLinear
from hf_galore.nn.convert import bitlinears
from hf_galore.nn.functional import absmean_ternary

STEPS = 4
LAYERS = 14
OPTIMS = ("adamw_torch", "galore_adamw", "galore_adamw_layerwise")


def ternary(**changes):
    return replace_linear(llama(**changes))


# Codes are made once a step.


@pytest.fixture
def counted(monkeypatch):
    calls = []
    monkeypatch.setattr(bitlinear, "absmean_ternary", lambda weight: calls.append(1) or absmean_ternary(weight))
    return calls


def without_cache(monkeypatch):
    kept = BitLinear.ternary

    def ternary(self):
        self.requantize()
        return kept(self)

    monkeypatch.setattr(BitLinear, "ternary", ternary)


@pytest.mark.parametrize(
    ("optim", "accumulation", "checkpointing"),
    in_part(
        itertools.product(OPTIMS, [1, 4], [False, True]),
        *((optim, 4, True) for optim in OPTIMS),
        *((OPTIMS[2], 4, False), (OPTIMS[2], 1, False)),
    ),
)
def test_codes_are_made_once_a_step_and_change_nothing(
    ours, counted, monkeypatch, tmp_path, optim, accumulation, checkpointing
):
    settings = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "activation_checkpointing": checkpointing,
        "max_steps": 2,
    }
    trainer = Run(optim, tmp_path).train(ternary(), **settings)
    assert len(counted) == 2 * LAYERS
    with monkeypatch.context() as patch:
        without_cache(patch)
        again = Run(optim, tmp_path).train(ternary(), **settings)
    assert len(counted) >= 2 * LAYERS * (1 + accumulation * (2 if checkpointing else 1))
    assert logged(again, "loss") == logged(trainer, "loss")
    assert_same(weights(again.model), weights(trainer.model))


@pytest.mark.parametrize("optim", OPTIMS[1:])
def test_the_ternary_weights_are_what_galore_projects(ours, tmp_path, optim):
    trainer = Run(optim, tmp_path).train(ternary())
    assert projected_names(trainer) == {f"{path}.weight" for path in bitlinears(trainer.model)}
    assert logged(trainer, "loss")[-1] != logged(trainer, "loss")[0]


@pytest.mark.parametrize(
    ("optim", "how"),
    in_part(itertools.product(OPTIMS, ["bf16", "bfloat16"]), (OPTIMS[1], "bf16"), (OPTIMS[2], "bfloat16")),
)
def test_bfloat16_trains_float32_masters(ours, tmp_path, optim, how):
    """Those of the layers; with steps that bfloat16 could not hold."""
    model = ternary() if how == "bf16" else ternary(dtype=torch.bfloat16)
    before = weights(model)
    trainer = Run(optim, tmp_path).train(model, bf16=how == "bf16", learning_rate=1e-6)
    assert all(torch.isfinite(torch.tensor(logged(trainer, "loss"))))
    for path, layer in bitlinears(model).items():
        assert layer.weight.dtype == torch.float32
        moved = (layer.weight - before[f"{path}.weight"]).abs().max()
        assert 0.0 < moved < 1e-5


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", slow("galore_adamw_8bit_layerwise")])
def test_masters_on_the_host_give_the_same_run_and_resume(ours, tmp_path, optim):
    args = {"max_steps": STEPS, "max_grad_norm": 0.1, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    plain = Run(optim, tmp_path / "plain").train(ternary(), **args)
    args["optim_args"] = ", offload_masters=true"
    whole = Run(optim, tmp_path / "whole").train(ternary(), save_strategy="steps", save_steps=3, **args)
    resumed = Run(optim, tmp_path / "resumed").trainer(ternary(), **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for trainer in (whole, resumed):
        assert logged(trainer, "loss") == logged(plain, "loss")
        assert_same(weights(trainer.model), weights(plain.model))


def test_masters_of_other_layers_are_not_offloaded(ours, tmp_path):
    with pytest.raises(ValueError, match="all targets must be BitLinear"):
        Run("galore_adamw_layerwise", tmp_path).train(llama(), optim_args=", offload_masters=true")


# λ.


def test_lambda_follows_its_schedule_and_ends_at_one(tmp_path):
    seen = []

    class Seen(LambdaWarmup):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({(one.weight_lambda, one.activation_lambda) for one in bitlinears(model).values()})

    callback = Seen("linear", "step", weight_steps=2, activation_steps=4)
    Run("adamw_torch", tmp_path).train(ternary(), max_steps=5, trainer={"callbacks": [callback]})
    assert seen == [{(0.0, 0.0)}, {(0.5, 0.25)}, {(1.0, 0.5)}, {(1.0, 0.75)}, {(1.0, 1.0)}]


def test_at_zero_the_model_is_the_dense_one(tmp_path):
    losses = [
        logged(Run("adamw_torch", tmp_path).train(model, max_steps=1, trainer={"callbacks": callbacks}), "loss")
        for model, callbacks in ((llama(), []), (ternary(), [LambdaWarmup()]))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("optim", OPTIMS)
def test_resumes_to_the_bit_within_the_warmup(ours, tmp_path, optim):
    def trainer(folder, **changes):
        callbacks = [LambdaWarmup("cosine", "sigmoid", weight_steps=6, activation_steps=3)]
        return Run(optim, folder).trainer(
            ternary(), max_steps=STEPS, lr_scheduler_type="linear", trainer={"callbacks": callbacks}, **changes
        )

    whole = trainer(tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_lambda_is_in_the_checkpoint(tmp_path):
    run = Run("adamw_torch", tmp_path)
    run.train(ternary(), save_strategy="steps", save_steps=2, trainer={"callbacks": [LambdaWarmup(weight_steps=4)]})
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-2" / "trainer_state.json"))
    kept = state.stateful_callbacks["LambdaWarmup"]
    assert kept["args"]["weight_steps"] == 4
    assert kept["attributes"]["lambdas"] == [0.25, 0.001]
    restored = run.trainer(ternary(), restore_callback_states_from_checkpoint=True, max_steps=3)
    restored.add_callback(LambdaWarmup("step"))
    restored.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (callback,) = [one for one in restored.callback_handler.callbacks if isinstance(one, LambdaWarmup)]
    assert callback.lambdas == (0.5, 0.002)


def test_a_model_without_bitlinear_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no BitLinear"):
        Run("adamw_torch", tmp_path).train(llama(), trainer={"callbacks": [LambdaWarmup()]})


# What is logged.


@pytest.mark.parametrize("optim", OPTIMS)
def test_what_codes_do_is_logged_with_the_loss(ours, tmp_path, optim):
    model = ternary()
    trainer = Run(optim, tmp_path).trainer(model, logging_steps=2, max_steps=4, learning_rate=1e-2)
    trainer.add_callback(TernaryLog(trainer))
    before = {path: layer.ternary().codes.clone() for path, layer in bitlinears(model).items()}
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "ternary/zeros" in entry] == [2, 4]
    assert len(logged(trainer, "loss")) == 2
    assert 0.0 < logged(trainer, "ternary/flipped")[0] < 0.5
    for zeros, dead in zip(logged(trainer, "ternary/zeros"), logged(trainer, "ternary/dead_zone"), strict=True):
        assert 0.0 < dead < zeros < 0.5
    changed = [
        float((layer.ternary().codes != before[path]).float().mean()) for path, layer in bitlinears(model).items()
    ]
    assert max(changed) > 0.0


# A teacher.


@pytest.mark.parametrize("items", [True, False])
def test_the_loss_is_that_of_labels_and_teacher(tmp_path, items):
    trainer = Run("adamw_torch", tmp_path).trainer(ternary())
    plain = trainer.compute_loss
    teacher = llama(seed=3)
    assert distill(trainer, teacher, weight=0.25, temperature=2.0) is trainer
    batch = torch.stack([one["input_ids"] for one in tokens()[:4]])
    inputs = {"input_ids": batch, "labels": batch.clone()}
    inputs["labels"][:, :5] = -100
    count = (inputs["labels"][:, 1:] != -100).sum()
    given = {"num_items_in_batch": count} if items else {}
    loss, outputs = plain(trainer.model, inputs, return_outputs=True, **given)
    chosen = inputs["labels"][:, 1:] != -100
    own, theirs = (
        log_softmax(logits[:, :-1][chosen] / 2.0, -1) for logits in (outputs.logits, teacher(input_ids=batch).logits)
    )
    wanted = 0.75 * loss + 0.25 * 4.0 * kl_div(own, theirs, reduction="batchmean", log_target=True)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs, **given), wanted)
    assert not any(param.requires_grad for param in teacher.parameters())


def test_a_student_comes_nearer_to_its_teacher(tmp_path):
    teacher, student = llama(), ternary()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(5.0)
    batch = torch.stack([one["input_ids"] for one in tokens()[:8]])

    def apart():
        with torch.no_grad():
            own, theirs = (log_softmax(model(batch).logits, -1) for model in (student, teacher))
        return float(kl_div(own, theirs, reduction="batchmean", log_target=True))

    before = apart()
    trainer = Run("adamw_torch", tmp_path).trainer(student, max_steps=30, learning_rate=3e-3)
    distill(trainer, teacher, weight=1.0).train()
    assert apart() < 0.5 * before


def test_bad_distillation_is_refused(tmp_path):
    trainer = Run("adamw_torch", tmp_path).trainer(ternary())
    with pytest.raises(ValueError, match="teacher: pass a model"):
        distill(trainer)
    with pytest.raises(ValueError, match="Invalid weight"):
        distill(trainer, llama(), weight=1.5)
    with pytest.raises(ValueError, match="Invalid temperature"):
        distill(trainer, llama(), temperature=0.0)
