"""Pretrains a Llama from nothing under the Trainer, with AdamW and with GaLore in two forms, and compares them.

    python examples/pretrain.py                                   # about 6 minutes on two CPU cores
    python examples/pretrain.py --text my_book.txt --rank 32
    python examples/pretrain.py --config 60m --text texts/ --optim galore_adamw
    accelerate launch examples/pretrain.py --config 350m --text texts/ --optim galore_adamw

All methods start from the same weights and see the same data in the same order. Each trains in a process of its own,
so that its peak memory is its own; a single --optim trains in this process.
"""

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from corpus import Blocks, load_corpus
from measure import LossBar, Meter
from presets import PRESETS, Preset
from report import plot, table
from transformers import LlamaConfig, LlamaForCausalLM, ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_galore

ADAMW = "adamw_torch_fused"
GALORE = ["galore_adamw", "galore_adamw_8bit", "galore_adafactor"]
METHODS = [ADAMW, *GALORE, *(f"{name}_layerwise" for name in GALORE)]
COMPARED = [ADAMW, "galore_adamw", "galore_adamw_layerwise"]
# GaLore's targets, by the names of their modules: all matrices of the attention and the MLPs.
MATRICES = ["self_attn", "mlp"]
HELD_OUT_BLOCKS = 192


def main() -> None:
    settings = parse()
    output_dir = Path(settings.output_dir)
    if len(settings.optim) == 1:
        runs = [train(settings, settings.optim[0])]
    else:
        load_data(settings)
        runs = [train_in_child(settings, optim) for optim in settings.optim]
    if int(os.environ.get("RANK", "0")) == 0:
        (output_dir / "table.md").write_text(table(runs) + "\n")
        plot(runs, output_dir / "loss.png")
        print(f"\n{table(runs)}\n\nfigures: {output_dir / 'table.md'}\nlosses:  {output_dir / 'loss.png'}")


Finish = Callable[[Trainer, Path], None]  # is given the Trainer, and the folder of its checkpoints


def train_in_child(settings: argparse.Namespace, optim: str, finish: Finish | None = None) -> dict:
    """`train` in a fresh interpreter."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(train, settings, optim, finish).result()


def train(settings: argparse.Namespace, optim: str, finish: Finish | None = None) -> dict:
    """Trains one model with one optimizer, evaluates it on the held-out text and returns the figures.

    They are also written to <output_dir>/<optim>.json (with --bitlinear <optim>_ternary.json). With settings.resume a
    finished run is read from there, and an unfinished one continues from its last checkpoint.
    """
    folder = Path(settings.output_dir) / (f"{optim}_ternary" if settings.bitlinear else optim)
    result_file = folder.with_suffix(".json")
    if settings.resume and result_file.exists():
        result = json.loads(result_file.read_text())
        if result["settings"] == recorded(settings):
            return result

    hf_galore.register()
    folder.parent.mkdir(parents=True, exist_ok=True)
    arguments = training_arguments(settings, optim, folder)
    with arguments.main_process_first():
        train_blocks, held_out_blocks = load_data(settings)
    set_seed(settings.seed)
    model = build_model(settings)
    meter = Meter()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_blocks,
        eval_dataset=held_out_blocks,
        callbacks=[meter],
        optimizer_cls_and_kwargs=adamw(model, settings) if optim == ADAMW else None,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    print(f"\n{optim}: {model.num_parameters() / 1e6:.1f} million parameters on {arguments.device}", flush=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if settings.resume and folder.exists() else None)
    if finish is not None:
        finish(trainer, folder)
    result = {
        "optim": optim,
        "perplexity": math.exp(trainer.evaluate()["eval_loss"]),
        "tokens_per_second": meter.steps * settings.batch_size * settings.seq_len / meter.seconds,
        "state_bytes": meter.state_bytes,
        "peak_bytes": meter.peak_bytes,
        "refresh_seconds": meter.refresh_seconds,
        "parameters": model.num_parameters(),
        "device": arguments.device.type,
        "threads": torch.get_num_threads(),
        "steps": meter.steps,
        "loss_curve": [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log],
        "settings": recorded(settings),
    }
    if trainer.is_world_process_zero():
        result_file.write_text(json.dumps(result, indent=1))
    return result


def load_data(settings: argparse.Namespace) -> tuple[Blocks, Blocks]:
    """(train, held-out) blocks; of the held-out ones about HELD_OUT_BLOCKS, spread over all files."""
    train_blocks, held_out = load_corpus(
        Path(settings.output_dir) / "corpus",
        [Path(path) for path in settings.text],
        settings.vocab_size,
        settings.seq_len,
        settings.seed,
    )
    return train_blocks, Blocks(held_out.rows[:: max(1, len(held_out) // HELD_OUT_BLOCKS)])


def recorded(settings: argparse.Namespace) -> dict:
    """The settings on which a run's result depends."""
    return {name: value for name, value in vars(settings).items() if name not in ("optim", "resume", "save_steps")}


def build_model(settings: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_attention_heads=settings.heads,
        num_hidden_layers=settings.layers,
        max_position_embeddings=settings.seq_len,
        tie_word_embeddings=settings.tie_embeddings,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, settings.dtype))
    if settings.bitlinear:
        hf_galore.replace_linear(model, MATRICES)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def adamw(model: LlamaForCausalLM, settings: argparse.Namespace) -> tuple[type, dict]:
    """AdamW with one learning rate for the matrices that GaLore projects and one for all the rest.

    GaLore has both as well: lr·scale and lr. AdamW with a single rate would be no fair comparison.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and any(target in name for target in MATRICES)
        (matrices if is_matrix else rest).append(parameter)
    groups = [
        {"params": matrices, "lr": settings.adamw_lr_matrices},
        {"params": rest, "lr": settings.adamw_lr_rest},
    ]
    return torch.optim.AdamW, {
        "params": groups,
        "lr": settings.adamw_lr_rest,
        "betas": (0.9, settings.adam_beta2),
        "weight_decay": 0.0,
        "fused": True,
    }


def training_arguments(settings: argparse.Namespace, optim: str, folder: Path) -> TrainingArguments:
    """The same for both methods, but for the optimizer."""
    galore = {
        "optim_target_modules": MATRICES,
        "optim_args": f"rank={settings.rank}, update_proj_gap={settings.update_proj_gap}, scale={settings.scale}",
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        optim=optim,
        learning_rate=settings.adamw_lr_rest if optim == ADAMW else settings.galore_lr,
        **({} if optim == ADAMW else galore),
        weight_decay=0.0,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.1 * settings.max_steps),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.micro_batch_size,
        per_device_eval_batch_size=settings.micro_batch_size,
        # On a CPU bf16 is much slower than fp32 wherever the processor lacks instructions for it.
        bf16=settings.dtype == "float32" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=torch.cuda.is_available(),
        prediction_loss_only=True,
        logging_steps=max(1, settings.max_steps // 60),
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        seed=settings.seed,
        report_to="none",
    )
    at_once = settings.micro_batch_size * arguments.world_size
    if settings.batch_size % at_once:
        raise SystemExit(
            f"--batch_size {settings.batch_size} is not a multiple of --micro_batch_size {settings.micro_batch_size} "
            f"times {arguments.world_size} processes"
        )
    arguments.gradient_accumulation_steps = settings.batch_size // at_once
    return arguments


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` above zero."""

    def parse_number(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse_number.__name__ = f"positive {kind.__name__}"  # argparse: "invalid positive int value: '0'"
    return parse_number


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what it leaves open filled in from the preset, and checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", choices=PRESETS, default="demo", help="size and settings (%(default)s)")
    parser.add_argument("--optim", nargs="+", choices=METHODS, default=COMPARED, help=f"({' '.join(COMPARED)})")
    parser.add_argument("--text", nargs="+", default=[], help="text files or folders (Python's own library)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (float32)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and order of the data (%(default)s)")
    parser.add_argument("--output_dir", default="runs/pretrain", help="where everything is written (%(default)s)")
    parser.add_argument("--save_steps", type=positive(int), help="steps between checkpoints (none are written)")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoints in output_dir")
    parser.add_argument("--bitlinear", action="store_true", help="ternary matrices (BitNet b1.58)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, slower")
    for field in fields(Preset):
        if field.type is not bool:
            parser.add_argument(f"--{field.name}", type=positive(field.type), help="(the config's)")
    settings = parser.parse_args(arguments)
    for name, value in asdict(PRESETS[settings.config]).items():
        if getattr(settings, name, None) is None:
            setattr(settings, name, value)

    for path in settings.text:
        if not Path(path).exists():
            parser.error(f"argument --text: no such file or folder: {path}")
    if settings.hidden_size % settings.heads:
        parser.error(f"argument --heads: {settings.heads} does not divide --hidden_size {settings.hidden_size}")
    if settings.rank > settings.hidden_size:
        parser.error(f"argument --rank: {settings.rank} is above the model's hidden_size, {settings.hidden_size}")
    if len(settings.optim) > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("argument --optim: with several processes give one method, such as --optim galore_adamw")
    return settings


if __name__ == "__main__":
    main()
