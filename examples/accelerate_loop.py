"""A training loop of one's own with accelerate, full of GaLore: no Trainer, and any engine that accelerate can launch.

    python examples/accelerate_loop.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate_loop.py --layerwise

A tiny Llama learns to count modulo 31 in steps of one to four. Only the step has to be guessed then, from the second
number: the loss falls from 3.5 towards log(4)/15 = 0.09.
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import hf_galore
from hf_galore import GaLoreAdamW, galore_param_groups
from hf_galore.lowrank_backward import enable

LOW_RANK = {"rank": 16, "update_proj_gap": 50, "scale": 1.0, "proj_type": "right"}
NUMBERS, LENGTH = 31, 16


def sequences(count: int) -> torch.Tensor:
    """(count, LENGTH) integers a + b·i modulo NUMBERS."""
    start, step = torch.randint(NUMBERS, (2, count, 1), generator=torch.Generator().manual_seed(0))
    return (start + (1 + step % 4) * torch.arange(LENGTH)) % NUMBERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layerwise", action="store_true", help="never form a full gradient (projected backward)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    hf_galore.register()  # only engines that shard the model need it here
    accelerator = Accelerator(cpu=options.cpu, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS, max_position_embeddings=LENGTH, use_cache=False, **shape))
    if options.layerwise:
        engine = enable(model, "all-linear", **LOW_RANK)
        optimizer = GaLoreAdamW(engine.param_groups(model), lr=3e-3)
        engine.attach(optimizer)
    else:
        optimizer = GaLoreAdamW(galore_param_groups(model, "all-linear", **LOW_RANK), lr=3e-3)
    data = DataLoader(TensorDataset(sequences(32 * 2 * options.steps)), batch_size=32 // accelerator.num_processes)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    for number, (tokens,) in enumerate(data):
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if number % 80 == 0:
            accelerator.print(f"step {number // 2}: loss {accelerator.reduce(loss.detach(), 'mean').item():.3f}")
    accelerator.print(f"loss at the end: {accelerator.reduce(loss.detach(), 'mean').item():.3f}")
    # DDP's last reference to the process group, dropped later, could wait for a thread that waits for this one.
    model, optimizer, data = accelerator.free_memory(model, optimizer, data)
    accelerator.end_training()


if __name__ == "__main__":
    main()
