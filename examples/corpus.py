"""Turns text files into blocks of tokens for a language model: split by file, own BPE tokenizer, fixed length.

Without files of your own the corpus is the source code of Python's standard library, which every machine has.
"""

import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.1

# Installed packages, tests, and folders that hold tables and copies rather than code people wrote.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


class Blocks(Dataset):
    """The rows of an integer array (blocks, seq_len), as the inputs and labels of a causal language model."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": row, "labels": row}


def load_corpus(folder: Path, paths: list[Path], vocab_size: int, seq_len: int, seed: int) -> tuple[Blocks, Blocks]:
    """(train, held-out) blocks of the text in `paths`; empty paths: of the standard library.

    Written to `folder` as tokenizer.json, train.npy and held_out.npy, and read from there the next time.
    """
    files = find_files(paths)
    description = {
        "files": [[str(file), file.stat().st_size] for file in files],
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "seed": seed,
    }
    done = folder / "corpus.json"
    if not done.exists() or json.loads(done.read_text()) != description:
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        write_corpus(folder, files, vocab_size, seq_len, seed)
        done.write_text(json.dumps(description))
    train, held_out = (Blocks(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("train", "held_out"))
    return train, held_out


def write_corpus(folder: Path, files: list[Path], vocab_size: int, seq_len: int, seed: int) -> None:
    """Splits the files, trains the tokenizer on the one part, and cuts both into blocks."""
    texts = read_texts(files)
    print(f"corpus: {len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} million characters", flush=True)
    train, held_out = split(texts, seed)
    tokenizer = train_tokenizer(train, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, part in (("train", train), ("held_out", held_out)):
        np.save(folder / f"{name}.npy", cut_blocks(tokenizer, part, seq_len, name))


def find_files(paths: list[Path]) -> list[Path]:
    """All files under `paths`, sorted; the standard library's modules if `paths` is empty."""
    if not paths:
        root = Path(sysconfig.get_paths()["stdlib"])
        return sorted(file for file in root.rglob("*.py") if not LEFT_OUT & set(file.relative_to(root).parts))
    found = {file for path in paths for file in (path, *path.rglob("*")) if file.is_file()}
    if not found:
        raise SystemExit(f"--text: no files in {', '.join(map(str, paths))}")
    return sorted(found)


def read_texts(files: list[Path]) -> list[str]:
    """The non-empty texts of `files`; bytes that are not UTF-8 are replaced."""
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return [text for text in texts if text.strip()]


def split(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """(train, held-out): by whole files in a seeded order; a single text gives its tail."""
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - HELD_OUT_SHARE))
        return [texts[0][:cut]], [texts[0][cut:]]
    shuffled = random.Random(seed).sample(texts, len(texts))
    cut = max(1, round(len(texts) * HELD_OUT_SHARE))
    return shuffled[cut:], shuffled[:cut]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with at most `vocab_size` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def cut_blocks(tokenizer: Tokenizer, texts: list[str], seq_len: int, name: str) -> np.ndarray:
    """The texts' tokens, each text ended by END_OF_TEXT, in rows of `seq_len`; what is left over is dropped."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens = [
        np.array([*tokenizer.encode(text).ids, end], dtype=np.uint32)
        for text in tqdm(texts, desc=f"tokenizing {name}", unit=" files", dynamic_ncols=True)
    ]
    stream = np.concatenate(tokens)
    if len(stream) < seq_len:
        raise SystemExit(f"the {name} text has {len(stream)} tokens, less than one block of --seq_len {seq_len}")
    return stream[: len(stream) // seq_len * seq_len].reshape(-1, seq_len)
