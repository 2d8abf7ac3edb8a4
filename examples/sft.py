"""Fine-tune a chat model, every weight of it, with TRL's SFTTrainer and the GaLore optimizer.

    python examples/sft.py                                          # no download: a tiny Llama learns small sums
    python examples/sft.py --model Qwen/Qwen3-0.6B --data chats.jsonl --max_steps 500

Each line of the --data file holds `messages`, or `question` and `answer`. The loss is on the assistant's tokens only.
Every argument of `trl.SFTConfig` works too: --learning_rate, --output_dir, --resume_from_checkpoint, --packing,
--optim adamw_torch (to compare), --model_init_kwargs '{"dtype": "bfloat16"}' (half the memory for the weights), ...
"""

import random
from dataclasses import dataclass, field

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast, set_seed
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

import hf_galore

# For a tokenizer without a chat template. `generation` marks what the loss is on: the answer and the eos that ends it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# First values to try, for a real model and for the tiny one made here: random weights need larger steps.
REAL = {"learning_rate": 5e-5, "rank": 256, "scale": 4.0, "num_train_epochs": 1}
TINY = {"learning_rate": 3e-3, "rank": 32, "scale": 1.0, "max_steps": 300, "per_device_train_batch_size": 32}


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "hub name or folder; none: a tiny Llama is made here"})
    data: str | None = field(default=None, metadata={"help": "JSONL file of chats; none: small sums are made here"})
    rank: int = field(default=256, metadata={"help": "rank of the gradients' subspace"})
    update_proj_gap: int = field(default=200, metadata={"help": "steps between two subspaces"})
    scale: float = field(default=4.0, metadata={"help": "factor on the low-rank update"})


def parse_arguments(
    kind: type[ScriptArguments] = ScriptArguments, text: str = __doc__, tiny: dict = TINY, **defaults: str
) -> tuple[ScriptArguments, SFTConfig]:
    """Read the command line; the defaults depend on whether --model is given."""
    model_parser = HfArgumentParser(kind, add_help=False)
    script = model_parser.parse_args_into_dataclasses(return_remaining_strings=True)[0]
    parser = HfArgumentParser((kind, SFTConfig), description=text.splitlines()[0])
    parser.set_defaults(optim="galore_adamw", optim_target_modules="all-linear", assistant_only_loss=True)
    parser.set_defaults(output_dir="sft_output", logging_first_step=True, **(REAL if script.model else tiny))
    parser.set_defaults(**defaults)
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)  # SFTConfig's default is True, which the Trainer refuses here
    script, config = parser.parse_args_into_dataclasses()
    if config.optim.startswith("galore") and config.optim_args is None:
        config.optim_args = f"rank={script.rank}, update_proj_gap={script.update_proj_gap}, scale={script.scale}"
    return script, config


def load_chats(path: str | None) -> Dataset:
    """Return a dataset of `messages`: from a JSONL file, or 400 chats that ask for the sum of two numbers below 20."""
    if path:
        data = load_dataset("json", data_files=path, split="train")
    else:
        pairs = [divmod(number, 20) for number in random.Random(0).choices(range(400), k=400)]
        sums = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}"} for a, b in pairs]
        data = Dataset.from_list(sums)
    if "messages" in data.column_names:
        return data.select_columns([name for name in ("messages", "tools") if name in data.column_names])
    if not {"question", "answer"} <= set(data.column_names):
        raise SystemExit(f"--data {path}: needs `messages`, or `question` and `answer`; got {data.column_names}")
    return data.map(to_messages, remove_columns=data.column_names)


def to_messages(line: dict) -> dict:
    turns = (("user", line["question"]), ("assistant", line["answer"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def make_tiny(chats: Dataset) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Make a Llama of about a million weights, and train its byte-level BPE tokenizer on the chats."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe_trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator((message["content"] for chat in chats["messages"] for message in chat), bpe_trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|eos|>")
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return LlamaForCausalLM(LlamaConfig(**shape, **ids)), tokenizer


def main() -> None:
    hf_galore.register()
    script, config = parse_arguments()
    set_seed(config.seed)
    chats = load_chats(script.data)
    try:
        tokenizer = AutoTokenizer.from_pretrained(script.model) if script.model else None
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {script.model}: no tokenizer in such a folder or on the hub: {error}") from error
    model, tokenizer = (script.model, tokenizer) if tokenizer else make_tiny(chats)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE

    trainer = SFTTrainer(model=model, args=config, train_dataset=chats, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()

    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    *prompt, answer = chats[0]["messages"]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = trainer.model.eval().generate(**inputs.to(trainer.model.device), max_new_tokens=64, do_sample=False)
    reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    trainer.accelerator.print(f"train loss: {losses[0]:.4f} at the start, {losses[-1]:.4f} at the end")
    trainer.accelerator.print(f"question: {prompt[-1]['content']}\nanswer: {reply}\nexpected: {answer['content']}")


if __name__ == "__main__":
    main()
