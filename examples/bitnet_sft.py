"""Fine-tune a chat model into a BitNet b1.58 with TRL's SFTTrainer: ternary weights, 8-bit activations.

    python examples/bitnet_sft.py                                   # no download: a tiny Llama learns small sums
    python examples/bitnet_sft.py --model Qwen/Qwen3-0.6B --data chats.jsonl --max_steps 500

Quantization is brought in over the first --warmup_share of the steps, and the model as it was before is its teacher.
Arguments are those of sft.py, those of `trl.SFTConfig` and the ones below. Ends with <output_dir>/bitnet, which plain
transformers loads and, in another process without hf_galore, answers a question with.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sft import CHAT_TEMPLATE, load_chats, make_tiny, parse_arguments
from sft import ScriptArguments as SftArguments
from transformers import AutoTokenizer, set_seed
from trl import SFTTrainer

import hf_galore

ANSWER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (cls.from_pretrained(sys.argv[1]) for cls in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer.apply_chat_template(
    json.loads(sys.argv[2]), add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
# First values to try for the tiny model made here: random weights need larger steps.
TINY = {"learning_rate": 1e-2, "rank": 32, "scale": 1.0, "max_steps": 400, "per_device_train_batch_size": 32}


@dataclass
class ScriptArguments(SftArguments):
    warmup_share: float = field(default=0.25, metadata={"help": "share of the steps until all is quantized"})
    teacher: float = field(default=0.0, metadata={"help": "share of the loss that is the model's own old logits"})


def main() -> None:
    hf_galore.register()
    script, config = parse_arguments(
        ScriptArguments, __doc__, TINY, optim="galore_adamw_layerwise", output_dir="bitnet_sft_output"
    )
    set_seed(config.seed)
    chats = load_chats(script.data)
    tokenizer = AutoTokenizer.from_pretrained(script.model) if script.model else None
    model, tokenizer = (script.model, tokenizer) if tokenizer else make_tiny(chats)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE

    # Of a model made here everything is to be trained, not the layers that become ternary alone.
    others = None if script.model else ["embed_tokens", "lm_head"]
    peft_config = hf_galore.BitLinearConfig(task_type="CAUSAL_LM", modules_to_save=others)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=chats, processing_class=tokenizer, peft_config=peft_config
    )
    steps = config.max_steps
    if steps <= 0:
        batches = len(trainer.get_train_dataloader()) / config.gradient_accumulation_steps
        steps = int(batches * config.num_train_epochs)
    warmup = max(1, round(script.warmup_share * steps))
    trainer.add_callback(hf_galore.LambdaWarmup(weight_steps=warmup, activation_steps=warmup))
    trainer.add_callback(hf_galore.TernaryLog(trainer))
    if script.teacher:
        hf_galore.distill(trainer, weight=script.teacher)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()

    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    trainer.accelerator.print(f"train loss: {losses[0]:.4f} at the start, {losses[-1]:.4f} at the end")
    if trainer.is_world_process_zero():
        folder = Path(config.output_dir) / "bitnet"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        report = hf_galore.save_bitnet(trainer.accelerator.unwrap_model(trainer.model), folder, tokenizer=tokenizer)
        *prompt, wanted = chats[0]["messages"]
        print(f"{report}\nquestion: {prompt[-1]['content']}\nanswer: {answer(folder, prompt)}")
        print(f"expected: {wanted['content']}")


def answer(checkpoint: Path, prompt: list[dict]) -> str:
    """What plain transformers, in another process, answers with the checkpoint."""
    command = [sys.executable, "-c", ANSWER, str(checkpoint), json.dumps(prompt)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
