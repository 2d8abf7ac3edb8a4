"""Tiny models, random tokens, and one object that trains them with the real Trainer: shared by the Trainer's tests."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import hf_galore

METHODS = ("galore_adamw", "galore_adamw_8bit", "galore_adafactor")
LAYERWISE = tuple(f"{name}_layerwise" for name in METHODS)
NAMES = (*METHODS, *LAYERWISE)

RANK = 8
VOCABULARY = 128


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """hf_galore stands behind the GaLore names inside, whatever stood there before stands there afterwards."""
    hf_galore.register()
    try:
        yield
    finally:
        hf_galore.unregister()


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A Llama of 0.1 M parameters: norms, biases, square and both kinds of oblong matrices.

    `galore_adamw_8bit` keeps moments of 4096 elements and more in 8 bits: embeddings, head, and (512, 8) of the MLP.
    """
    settings = {"intermediate_size": 512, "num_key_value_heads": 2, "attention_bias": True}
    settings["tie_word_embeddings"] = False
    return build(transformers.LlamaConfig, dtype, **settings | changes)


def build(config: type, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> nn.Module:
    """A model of the config class with hidden size 32 and two layers, from a seed, in `dtype`."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config(**sizes | settings), attn_implementation="eager")
    return model.to(dtype)


def with_columns_and_registers(model: Any) -> nn.Module:
    """The model with an attention bias and register tokens, which weigh as much as its own weights do."""
    hf_galore.add_attention_bias(model, start="random", n=2)
    return hf_galore.add_register_tokens(model, 2)


def tokens(samples: int = 64, length: int = 16, seed: int = 1) -> list[dict[str, Tensor]]:
    """Random sequences, each its own label."""
    ids = torch.randint(2, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit the same tensors under the same names."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} differ: {different[:4]}"
    assert {name: tensor.dtype for name, tensor in actual.items()} == {n: t.dtype for n, t in expected.items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The Euclidean distance of two sets of weights, in float64."""
    return float(sum((one[name].double() - other[name].double()).square().sum() for name in one) ** 0.5)


def optimizer_of(trainer: Trainer) -> torch.optim.Optimizer:
    """The Trainer's optimizer without accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def layers_of(trainer: Trainer) -> dict[str, Any]:
    """The layers of the projected backward by the names of their weights; none for the other names of `optim`."""
    engine = getattr(optimizer_of(trainer), "lowrank_backward", None)
    modules = {module: name for name, module in trainer.model.named_modules()}
    return {f"{modules[layer.module]}.weight": layer for layer in engine.layers.values()} if engine else {}


def names_of(trainer: Trainer) -> dict[Tensor, str]:
    """What each parameter of the optimizer is called; a small parameter of the projected backward is its weight."""
    small = {layer.update: name for name, layer in layers_of(trainer).items()}
    return {param: name for name, param in trainer.model.named_parameters()} | small


def in_groups(trainer: Trainer) -> list[str]:
    """The names of all parameters in the optimizer's groups, in alphabetical order."""
    names = names_of(trainer)
    return sorted(names[param] for group in trainer.optimizer.param_groups for param in group["params"])


def projected_names(trainer: Trainer) -> set[str]:
    """Names of the parameters that are trained in low-rank coordinates."""
    names = names_of(trainer)
    projected = {names[p] for group in trainer.optimizer.param_groups if group.get("rank") for p in group["params"]}
    return projected | set(layers_of(trainer))


def state_of(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The optimizer's state by the name of the parameter."""
    names = names_of(trainer)
    return {names[param]: state for param, state in optimizer_of(trainer).state.items()}


def hooks_on(model: nn.Module) -> int:
    """How many hooks hang on the model's parameters and modules."""
    on_parameters = itertools.chain.from_iterable(
        (param._post_accumulate_grad_hooks or (), param._backward_hooks or ()) for param in model.parameters()
    )
    on_modules = itertools.chain.from_iterable(
        (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks) for m in model.modules()
    )
    return sum(map(len, itertools.chain(on_parameters, on_modules)))


class StepRecorder(transformers.TrainerCallback):
    """Keeps the weights before the first step and after each."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = [weights(model)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(weights(self.model))

    def moved(self) -> list[float]:
        """The distance that each step moved the weights."""
        return [distance(before, after) for before, after in itertools.pairwise(self.weights)]


class NamesRecorder(transformers.TrainerCallback):
    """Keeps the names of the parameters of the callbacks' model, as training begins and before and after each step."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append([name for name, _ in kwargs["model"].named_parameters()])

    on_step_begin = on_step_end = on_train_begin


@dataclass(frozen=True)
class Run:
    """How to train: `optim` by whichever implementation stands behind the name now, in a folder for the output."""

    optim: str
    folder: Path

    def arguments(self, optim_args: str = "", **changes: Any) -> TrainingArguments:
        """Three steps of four samples at a constant rate, in order, rank 8 and T = 2, each step logged; or as changed.

        `optim_args` are put behind the rank and T, in the form `, key=value`.
        """
        settings: dict[str, Any] = {
            "optim": self.optim,
            "optim_target_modules": "all-linear",
            "optim_args": f"rank={RANK}, update_proj_gap=2, scale=1.0{optim_args}",
            "output_dir": str(self.folder),
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "train_sampling_strategy": "sequential",
            "max_steps": 3,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return TrainingArguments(**settings | changes)

    def trainer(
        self, model: Any, data: Any = None, *, trainer: dict[str, Any] | None = None, **changes: Any
    ) -> Trainer:
        """The real Trainer on the model; `changes` are those of `arguments`, `trainer` further keywords for it."""
        data = tokens() if data is None else data
        quiet = Trainer(model=model, args=self.arguments(**changes), train_dataset=data, **trainer or {})
        quiet.remove_callback(transformers.PrinterCallback)
        return quiet

    def train(self, model: nn.Module, data: Any = None, **changes: Any) -> Trainer:
        """The Trainer after it has trained the model."""
        trainer = self.trainer(model, data, **changes)
        trainer.train()
        return trainer


def logged(trainer: Trainer, key: str) -> list[float]:
    """What the Trainer logged under the key, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
