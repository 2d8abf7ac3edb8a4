"""Subclasses of the Trainer, defined before `register()`: what they override is asked, with super() or without."""

import pytest
import transformers
from trainer_cases import LAYERWISE, METHODS, Run, assert_same, build, llama, logged, names_of, tokens, weights
from transformers import Trainer
from transformers.trainer_optimizer import is_optimizer_factory

BOTH = (METHODS[0], LAYERWISE[0])
MODELS = {
    "llama": llama,
    "gpt2": lambda: build(transformers.GPT2Config),
    "neox": lambda: build(transformers.GPTNeoXConfig, intermediate_size=64),
    "opt": lambda: build(transformers.OPTConfig, ffn_dim=64, word_embed_proj_dim=32),
}


class OwnDecay(Trainer):
    """Decays what trains in the first layer, vectors too, and nothing else."""

    def get_decay_parameter_names(self, model):
        assert self.model is not None  # a method, not a function of the model
        return [name for name, param in model.named_parameters() if ".0." in name and param.requires_grad]


class LessDecay(Trainer):
    """Decays what transformers does, but for the MLPs."""

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "mlp" not in name]


class OwnOptimizer(OwnDecay):
    """Makes the optimizer by itself, as transformers does and scripts copy it."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if is_optimizer_factory(make):
                self.optimizer = make()(self.model, **options)
            else:
                self.optimizer = make(options.pop("params"), **options)
        return self.optimizer


class OwnRate(Trainer):
    """Asks transformers for the optimizer and changes its learning rate."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        make, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return make, options | {"lr": 2 * options["lr"]}


class Extended(Trainer):
    """Extends every method that `register` replaces, and notes which were called."""

    def __init__(self, *args, **options):
        self.called = []
        super().__init__(*args, **options)

    def create_optimizer(self, model=None):
        self.called.append("create_optimizer")
        return super().create_optimizer(model)

    def train(self, *args, **options):
        self.called.append("train")
        return super().train(*args, **options)

    def _load_from_checkpoint(self, *args, **options):
        self.called.append("_load_from_checkpoint")
        super()._load_from_checkpoint(*args, **options)

    def _load_optimizer_and_scheduler(self, checkpoint):
        self.called.append("_load_optimizer_and_scheduler")
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self):
        self.called.append("_load_best_model")
        super()._load_best_model()


def trainer_of(kind, run, model, **changes):
    return kind(model=model, args=run.arguments(**changes), train_dataset=tokens(), eval_dataset=tokens(4))


def trained(kind, run, **changes):
    trainer = trainer_of(kind, run, llama(), **changes)
    trainer.train()
    return trainer


def decaying(trainer):
    """The names of the weights that the optimizer decays."""
    names = names_of(trainer)
    return {names[p] for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_its_choice_of_what_decays(make, method, ours, tmp_path):
    names = [name for name, _ in make().named_parameters()]
    for kind, expected in (
        (OwnDecay, {name for name in names if ".0." in name}),
        (LessDecay, {name for name in decaying_by(Trainer, method, tmp_path, make) if "mlp" not in name}),
    ):
        assert decaying_by(kind, method, tmp_path, make) == expected


def decaying_by(kind, method, folder, make):
    trainer = trainer_of(kind, Run(method, folder), make(), weight_decay=0.1)
    trainer.create_optimizer()
    return decaying(trainer)


@pytest.mark.parametrize("method", BOTH)
def test_a_create_optimizer_of_its_own(method, ours, tmp_path):
    """The same run as that of transformers' method, with the decay that the class asks for."""
    run = Run(method, tmp_path)
    own, inherited = (trained(kind, run, weight_decay=0.5) for kind in (OwnOptimizer, OwnDecay))
    assert_same(weights(own.model), weights(inherited.model))


@pytest.mark.parametrize("method", BOTH)
def test_its_changes_of_the_optimizers_options(method, ours, tmp_path):
    run = Run(method, tmp_path)
    changed, asked = trained(OwnRate, run, learning_rate=1e-3), trained(Trainer, run, learning_rate=2e-3)
    assert logged(changed, "learning_rate") == logged(asked, "learning_rate")
    assert_same(weights(changed.model), weights(asked.model))


@pytest.mark.parametrize("method", BOTH)
def test_extended_methods(method, ours, tmp_path):
    run = Run(method, tmp_path)
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    whole = trained(Trainer, run, **every_step)
    resumed = trainer_of(Extended, run, llama(seed=1), **every_step, load_best_model_at_end=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.called[0] == "train"
    assert set(resumed.called) == {name for name in vars(Extended) if callable(getattr(Extended, name))} - {"__init__"}
    assert logged(resumed, "loss") == logged(whole, "loss")
