"""A training script as people have them, which knows nothing of hf_galore: trains once for each name in --optims.

On CPUs accelerate would take FSDP for DDP, so under an FSDP configuration the ranks claim GPUs.
"""

import json
import os
from dataclasses import dataclass, field

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from trainer_cases import llama, logged, tokens
from transformers import HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ScriptArguments:
    optims: list[str] = field(default_factory=list)
    result: str = "result.json"
    batch: int = 4


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    ranks = args.world_size
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    args.per_device_train_batch_size = script.batch // ranks
    found = {}
    for optim in script.optims:
        args.optim = optim
        trainer = Trainer(model=llama(attention_bias=False), args=args, train_dataset=tokens())
        trainer.train()
        found[optim] = {
            "losses": logged(trainer, "loss"),
            "norms": logged(trainer, "grad_norm"),
            "ranks": ranks,
            "engine": trainer.accelerator.distributed_type.value,
            "model": type(trainer.model_wrapped).__name__,
        }
    if args.process_index == 0:
        with open(script.result, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
