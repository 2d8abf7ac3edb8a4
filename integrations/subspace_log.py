"""Statistics of basis refreshes in the Trainer's log: `optim_args="statistics=true"`.

Every refresh of a matrix adds `subspace/<parameter>/captured_energy`, `overlap`, `stable_rank` and `seconds` (see
`hf_galore.statistics`) to `trainer.state.log_history` and to whatever `report_to` names. `python -m hf_galore
plot-subspace RUN_DIR` draws them.
"""

import dataclasses
import math
from typing import Any

from torch import Tensor
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback

from hf_galore.cli.plot_subspace import PREFIX
from hf_galore.lowrank_backward import shown
from hf_galore.lowrank_parameters import UPDATE
from hf_galore.statistics import SubspaceStatistics


class SubspaceLog(TrainerCallback):
    """Gathers the statistics of a step, as the `observe` of an optimizer or engine, and logs them at its end."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._names: dict[Tensor, str] = {}
        self._found: dict[str, float] = {}

    def __call__(self, param: Tensor, statistics: SubspaceStatistics) -> None:
        """Takes one refresh; `param` is the matrix, or the small parameter beside it."""
        for name, value in dataclasses.asdict(statistics).items():
            if name != "step" and math.isfinite(value):
                self._found[f"{PREFIX}{self._name(param)}/{name}"] = value

    def _name(self, param: Tensor) -> str:
        if param not in self._names:
            with shown(self.trainer.model):
                self._names = {
                    one: f"{name.removesuffix(UPDATE)}weight" if name.endswith(UPDATE) else name
                    for name, one in self.trainer.model.named_parameters()
                }
        return self._names[param]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._found:
            should_log = control.should_log  # of the loss, which `log` takes for done
            self.trainer.log(self._found)
            control.should_log = should_log
            self._found = {}
