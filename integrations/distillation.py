"""A ternary model that learns from the logits of one that is not quantized, in any Trainer of transformers or TRL."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers.trainer import Trainer

from hf_galore.checks import check_number


def distill(
    trainer: Trainer, teacher: nn.Module | None = None, *, weight: float = 0.5, temperature: float = 1.0
) -> Trainer:
    """Makes the Trainer's loss (1 − weight)·loss + weight·temperature²·KL(teacher ‖ student), and returns the Trainer.

    KL is that of softmax(logits / temperature), averaged over the tokens whose labels count, as the loss is. The
    arguments of the model's forward go to the teacher as well, but for the labels.

    Args:
        teacher: gives `logits` of the student's shape; moved to the Trainer's device and never trained. None takes
            the student's own original weights, which a PEFT model has (`disable_adapter`): no second model.
        weight: from 0 (the loss alone) to 1 (the teacher alone).
        temperature: above 0.

    Raises:
        ValueError: a number is out of range, or there is no teacher and the model has no adapter to disable.
        TypeError: a number is none.
    """
    check_number("weight", weight, low=0.0, high=1.0 + 1e-12)
    check_number("temperature", temperature, low=torch.finfo(torch.float32).tiny)
    if teacher is None and not hasattr(trainer.model, "disable_adapter"):
        raise ValueError("teacher: pass a model; only a PEFT model (BitLinearConfig) has its original weights at hand")
    if teacher is not None:
        teacher.to(trainer.args.device).eval().requires_grad_(False)
    trainer.compute_loss = _Distilled(trainer, teacher, float(weight), float(temperature), trainer.compute_loss)
    return trainer


class _Distilled:
    """Stands in for a Trainer's compute_loss."""

    def __init__(
        self, trainer: Trainer, teacher: nn.Module | None, weight: float, temperature: float, loss: Callable[..., Any]
    ) -> None:
        self.trainer, self.teacher, self.weight, self.temperature, self.loss = (
            trainer,
            teacher,
            weight,
            temperature,
            loss,
        )

    def __call__(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
        labels = inputs["labels"]
        loss, outputs = self.loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            wanted = self._teach(given)
        own = self._divergence(outputs["logits"], wanted, labels, num_items_in_batch)
        loss = (1.0 - self.weight) * loss + self.weight * own
        return (loss, outputs) if return_outputs else loss

    def _teach(self, given: dict[str, Any]) -> Tensor:
        if self.teacher is not None:
            logits: Tensor = self.teacher(**given).logits
            return logits
        student: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = student.training
        with student.disable_adapter():
            try:
                logits = student.eval()(**given).logits
            finally:
                student.train(training)
        return logits

    def _divergence(self, logits: Tensor, wanted: Tensor, labels: Tensor, items: Any) -> Tensor:
        """temperature²·KL: a mean over the tokens to predict; with `items`, their sum divided by this, as the loss."""
        t = self.temperature
        counts = labels[..., 1:] != -100
        own, theirs = (log_softmax(one[..., :-1, :][counts].float() / t, -1) for one in (logits, wanted))
        total = t * t * kl_div(own, theirs, reduction="sum", log_target=True)
        if items is None:
            return total / counts.sum()
        args, ranks = self.trainer.args, self.trainer.accelerator.num_processes
        return total / items * (ranks if args.average_tokens_across_devices else 1)
