"""λ schedules: how quantization is brought in over the first steps of training a model that was not ternary.

λ rises from 0 (the layer is linear) to 1 (BitLinear), for weights and activations apart. Of the progress p in [0, 1]:

    linear   p
    cosine   (1 − cos πp) / 2
    sigmoid  σ(10 (p − ½)), moved and stretched to go from 0 to 1
    step     ⌊4p⌋ / 4
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hf_galore.checks import check_choice, check_integer
from hf_galore.nn.convert import bitlinears

_STEEPNESS, _STAIRS = 10.0, 4


def _sigmoid(progress: float) -> float:
    def value(p: float) -> float:
        return 1.0 / (1.0 + math.exp(-_STEEPNESS * (p - 0.5)))

    return (value(progress) - value(0.0)) / (value(1.0) - value(0.0))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1.0 - math.cos(math.pi * progress)) / 2.0,
    "sigmoid": _sigmoid,
    "step": lambda progress: math.floor(_STAIRS * progress) / _STAIRS,
}


@dataclass(frozen=True)
class LambdaSchedule:
    """λ as a function of the number of optimizer steps taken.

    Args:
        kind: linear, cosine, sigmoid or step.
        steps: after so many λ is 1.

    Raises:
        ValueError: `kind` is none of these, or `steps` is below 1.
        TypeError: `steps` is no integer.
    """

    kind: str = "linear"
    steps: int = 1000

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, SCHEDULES)
        check_integer("steps", self.steps, low=1)

    def at(self, step: int) -> float:
        """λ, exactly 1 from `steps` on."""
        return 1.0 if step >= self.steps else SCHEDULES[self.kind](step / self.steps)


def set_lambdas(model: nn.Module, weights: float, activations: float) -> None:
    """Sets λ in every BitLinear of the model.

    Raises:
        ValueError: there is none.
    """
    layers = bitlinears(model).values()
    if not layers:
        raise ValueError("model: it has no BitLinear; make some with replace_linear or BitLinearConfig")
    for layer in layers:
        layer.weight_lambda, layer.activation_lambda = weights, activations
