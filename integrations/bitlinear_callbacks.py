"""BitLinear in transformers' Trainer: λ as training goes on, and what its codes do, in the log."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers.trainer import Trainer
from transformers.trainer_callback import ExportableState, TrainerCallback

from hf_galore.nn.convert import bitlinears
from hf_galore.nn.statistics import CodesWatch
from hf_galore.nn.warmup import LambdaSchedule, set_lambdas

PREFIX = "ternary/"


class LambdaWarmup(TrainerCallback, ExportableState):
    """Sets λ of every BitLinear before each step, from the steps taken: `Trainer(callbacks=[LambdaWarmup()])`.

    λ is part of the Trainer's checkpoints, and a run that resumes goes on from the step that it is at. When training
    ends λ stays what it was in the last step.

    Args:
        weights, activations: a kind of `LambdaSchedule` (linear, cosine, sigmoid, step), or None for λ = 1 at once.
        weight_steps, activation_steps: optimizer steps until λ is 1.

    Raises:
        ValueError: a kind is unknown, or steps are below 1; when training begins, the model has no BitLinear.
        TypeError: steps are no integer.
    """

    def __init__(
        self,
        weights: str | None = "linear",
        activations: str | None = "linear",
        weight_steps: int = 1000,
        activation_steps: int = 1000,
    ) -> None:
        self._given = {
            "weights": weights,
            "activations": activations,
            "weight_steps": weight_steps,
            "activation_steps": activation_steps,
        }
        self.weights = None if weights is None else LambdaSchedule(weights, weight_steps)
        self.activations = None if activations is None else LambdaSchedule(activations, activation_steps)
        self.lambdas: tuple[float, float] | None = None  # of weights and activations, in the step at hand

    def state(self) -> dict[str, Any]:
        return {"args": self._given, "attributes": {"lambdas": self.lambdas}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.lambdas = None
        self._set(model, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._set(model, state.global_step)

    def _set(self, model: nn.Module, step: int) -> None:
        weights, activations = (1.0 if one is None else one.at(step) for one in (self.weights, self.activations))
        if self.lambdas != (weights, activations):
            set_lambdas(model, weights, activations)
            self.lambdas = (weights, activations)


class TernaryLog(TrainerCallback):
    """Logs `ternary/zeros`, `flipped` and `dead_zone` of all BitLinear layers whenever the Trainer logs the loss.

    Add it to the Trainer that it logs through: `trainer.add_callback(TernaryLog(trainer))`. See
    `hf_galore.nn.statistics` for what they are; it keeps two bits for each weight.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._watch: CodesWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._watch = CodesWatch(list(bitlinears(model).values()), _gathered)
        self._watch.look()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log and self._watch is not None:
            self.trainer.log({f"{PREFIX}{name}": value for name, value in self._watch.look()._asdict().items()})
            control.should_log = True  # of the loss, which `log` takes for done


def _gathered(weight: Tensor) -> AbstractContextManager[Any]:
    """Inside, ZeRO-3 has brought the weight together."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    from hf_galore.integrations.deepspeed_zero import gathered

    return gathered(weight)
