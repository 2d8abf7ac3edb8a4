"""A training script as people have them, which knows nothing of hf_galore: trains once for each name in --optims.

On CPUs accelerate would take FSDP for DDP, so under an FSDP configuration the ranks claim GPUs.
"""

import json
import os
from dataclasses import dataclass, field

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from deepspeed_ops import remember_processor
from trainer_cases import logged, tokens
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ScriptArguments:
    optims: list[str] = field(default_factory=list)
    model: str = ""
    result: str = "result.json"
    batch: int = 4


def main() -> None:
    remember_processor()
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    ranks = args.world_size
    args.per_device_train_batch_size = script.batch // ranks
    found = {}
    for optim in script.optims:
        AcceleratorState._reset_state()  # the engine's plugin cannot be given to a second one
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        args.optim = optim
        model = AutoModelForCausalLM.from_pretrained(script.model, attn_implementation="eager")
        trainer = Trainer(model=model, args=args, train_dataset=tokens())
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
    if dist.is_initialized():
        dist.barrier()  # gloo may abort a process that ends while another still talks to it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
