"""Checkpoints of ternary models that transformers loads without hf_galore, written and read.

hf_galore.save_bitnet(model, "ternary")
AutoModelForCausalLM.from_pretrained("ternary")      # anywhere
hf_galore.load_bitnet("ternary")                     # with BitLinear layers that train on
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hf_galore.checks import check_choice
from hf_galore.integrations.bitnet_export import LINEAR_CLASSES, prepare
from hf_galore.integrations.bitnet_load import load_bitnet
from hf_galore.integrations.bitnet_plain import PlainModel, plain_model
from hf_galore.integrations.bitnet_verify import ExportReport, compare, examine, expect, unverified

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

__all__ = ["ExportReport", "load_bitnet", "save_bitnet"]


def save_bitnet(
    model: Any,
    directory: str | os.PathLike[str],
    target: str = "transformers",
    *,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    verify: bool = True,
    max_shard_size: int | str = "50GB",
    gguf_type: str = "tq2_0",
) -> ExportReport:
    """Writes a model with BitLinear layers as a checkpoint that plain transformers loads, and proves that it does.

    A new process, in which hf_galore cannot be imported, loads the checkpoint. All its tensors must be those that were
    stored, and the codes that its layers compute with those of the model, bit for bit. Then both compute logits for
    random tokens in float32. Their relative error must be at most 10 % (it is 1e-7 in a model of 2 layers, and 1 % in
    one of 24: transformers sums in another order, and each activation that this puts on the other side of a rounding
    to 8 bits moves by a whole code), and the most likely token the same, at every position where its lead is more than
    8 times the root mean square of that error. The model that it is compared with has its floats and scales rounded to
    the checkpoint's dtype, as they are stored; the report says how far that is from the model as it trains.

    The checkpoint is written beside `directory` and moved there in the end: whatever fails, nothing is left. The model
    is not changed.

    Layers whose out_features 4 does not divide cannot be packed. The first two targets store them as plain nn.Linear
    with weight t·s; transformers does not round their activations then, nor does what the proof compares with.

    Norms of every BitLinear (use_rms_norm) are stored with them. A Llama with SubLN (use_sub_norm) is stored in
    transformers' `bitnet` architecture.

    `gguf` is for Llama, Qwen2 and Qwen3, without such norms. Layers whose in_features 256 does not divide are stored
    as t·s in float16, as are embeddings and the output layer; norms and biases in float32. Without a tokenizer the
    file says that it has none. The proof is that gguf's own reader finds what was written: t·s with s in float16.

    Args:
        model: a model of transformers, or a PeftModel around one. Under DDP, FSDP or DeepSpeed: unwrapped, gathered,
            and on one rank.
        directory: does not exist, or is empty.
        target: `transformers`, packed in 2 bits with 1 / s (BitLinear); `transformers-auto`, packed with s, unpacked
            when loaded (AutoBitLinear, as microsoft's checkpoints); `online`, the weights that were trained, quantized
            in every forward pass (AutoBitLinear, trainable); `gguf`, a file model.gguf for llama.cpp.
        dtype: of all floats, float32 or bfloat16; default the model's own. In bfloat16 `online` rounds weights so
            that they keep their codes. A GGUF file has its own.
        tokenizer: saved beside the model.
        verify: False skips the proof.
        max_shard_size: as in save_pretrained.
        gguf_type: of ternary matrices in a GGUF file, `tq2_0` or `tq1_0`.

    Raises:
        ValueError: an argument is none of its choices, or the model computes what the target cannot.
        TypeError: `model` is no model of transformers.
        FileExistsError: `directory` is not empty.
        ImportError: the target is `gguf` and that package is not installed.
        RuntimeError: the proof failed.
    """
    check_choice("target", target, [*LINEAR_CLASSES, "gguf"])
    plain = plain_model(model)
    if target == "gguf":
        if dtype is not None:
            raise ValueError(f"dtype={dtype} is not for target='gguf', whose floats are float16 and float32")
        if find_spec("gguf") is None:
            raise ImportError("target='gguf' needs the package gguf: pip install 'hf_galore[gguf]'")
        from hf_galore.integrations.gguf import save_gguf

        with new_directory(directory) as written:
            return save_gguf(plain, written, gguf_type, tokenizer, verify)
    export = prepare(plain, target, target_dtype(dtype, plain))
    with new_directory(directory) as written:
        export.write(written, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        if not verify:
            return unverified(export)
        expected = expect(export, written)
        return compare(expected, examine([expected])[0])


def target_dtype(dtype: torch.dtype | str | None, plain: PlainModel) -> torch.dtype:
    """The dtype of the checkpoint's floats.

    Raises:
        ValueError: neither float32 nor bfloat16.
    """
    if dtype is None:
        dtype = next((v.dtype for v in plain.others.values() if v.is_floating_point()), torch.float32)
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(
            f"dtype={name} is not one of {', '.join(DTYPES)}; in float16 the scales of BitNet become 0 or infinite"
        )
    return DTYPES[name]


@contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` if all goes well, and else is removed.

    Raises:
        FileExistsError: `directory` is a file, or not empty.
    """
    final = Path(directory).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(f"directory={str(directory)!r} is not empty")
    written = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    created = [parent for parent in final.parents if not parent.exists()]
    written.mkdir(parents=True)
    try:
        yield written
        if final.exists():
            final.rmdir()
        written.rename(final)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        for parent in created:
            parent.rmdir()
        raise
