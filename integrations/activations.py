"""Massive activations of transformers models: eager attention for the time, and texts in batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from hf_galore.attention.activations import record_activations
from hf_galore.attention.criterion import Criterion
from hf_galore.attention.perplexity import evaluation
from hf_galore.attention.report import ActivationReport
from hf_galore.checks import check_integer

_CRITERION = Criterion()
_CHARACTERS = 2**16  # whole lines of so many are tokenized at a time; a longer line is cut


def massive_activations(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    top: int = 3,
    delimiters: Sequence[int] = (),
    criterion: Criterion = _CRITERION,
    attention: bool = True,
) -> ActivationReport:
    """The report of massive activations of any decoder or ViT model of transformers over the batches.

    The model is in eval mode meanwhile and, for the shares of attention, computes it with attn_implementation="eager";
    afterwards all is as it was. Memory does not depend on the number of batches.

    Args:
        batches: arguments of the model's forward, on its device. A row is a sequence from its start; `attention_mask`
            (batch, tokens) tells its padding.
        top: how many of the largest magnitudes are reported.
        delimiters: token ids (`delimiter_ids`) whose first occurrence in a sequence is a kind of token of its own.
        criterion: when an activation is massive.
        attention: False leaves the shares of attention out.

    Raises:
        ValueError: the model has no single list of blocks; a sequence goes on from a cache, or has activations that
            are not finite; there is no batch; the attention shows no weights.
        TypeError: `top` or a delimiter is no integer.
    """
    with evaluation(model), _implementation(model, "eager" if attention else None):
        with record_activations(
            model, top=top, delimiters=delimiters, criterion=criterion, attention=attention
        ) as recorder:
            for batch in batches:
                model(**batch)
        return recorder.report()


@contextmanager
def _implementation(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, all attention of the model has this implementation; None leaves it as it is.

    The configuration is written to, as `set_attn_implementation` does, because that refuses models (Falcon) which do
    look there, and cannot tell what was there before.
    """
    if name is None:
        yield
        return
    configs = [getattr(module, "config", None) for module in model.modules()]
    own = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
    kept = [(config, config._attn_implementation_internal) for config in own.values()]
    try:
        for config, _ in kept:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, before in kept:
            config._attn_implementation_internal = before


def delimiter_ids(tokenizer: Any, delimiters: Sequence[str] = (".", "\n")) -> tuple[int, ...]:
    """The ids of all tokens that are one of these texts, whatever spaces are around them."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return tuple(token for token, text in enumerate(texts) if text.strip(" ") in delimiters)


@dataclass(frozen=True)
class TextBatches:
    """A text file as batches {input_ids (batch, tokens), use_cache: False} on a device; it can be gone through again.

    Every sequence begins with the token that the tokenizer puts at the beginning, if it does. What is left at the end
    of the file is a shorter sequence, unless nothing in it is to be predicted. The file is read as it is needed.

    Args:
        length: tokens of a sequence, with the first.
        batch_size: sequences in a batch.
        sequences: how many at most; None takes the whole file.

    Raises:
        ValueError: a number is out of range.
        TypeError: a number is no integer.
    """

    tokenizer: Any
    file: Path
    length: int
    batch_size: int = 1
    sequences: int | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_integer("length", self.length, low=2)
        check_integer("batch_size", self.batch_size, low=1)
        if self.sequences is not None:
            check_integer("sequences", self.sequences, low=1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows: list[list[int]] = []
        for row in islice(self._rows(), self.sequences):
            if rows and (len(rows) == self.batch_size or len(row) != len(rows[0])):
                yield self._batch(rows)
                rows = []
            rows.append(row)
        if rows:
            yield self._batch(rows)

    def _batch(self, rows: list[list[int]]) -> dict[str, Any]:
        ids: Tensor = torch.tensor(rows, device=self.device)
        return {"input_ids": ids, "use_cache": False}

    def _rows(self) -> Iterator[list[int]]:
        bos = self.tokenizer.bos_token_id
        first = [bos] if bos is not None and self.tokenizer("").input_ids[:1] == [bos] else []
        size = self.length - len(first)
        waiting: list[int] = []
        for ids in self._tokenized():
            waiting += ids
            for start in range(0, len(waiting) - size + 1, size):
                yield first + waiting[start : start + size]
            waiting = waiting[len(waiting) // size * size :]
        if len(first) + len(waiting) > 1:
            yield first + waiting

    def _tokenized(self) -> Iterator[list[int]]:
        with self.file.open(encoding="utf-8", newline="") as lines:
            piece = ""
            while line := lines.readline(_CHARACTERS):
                piece += line
                if len(piece) >= _CHARACTERS:
                    yield self.tokenizer(piece, add_special_tokens=False).input_ids
                    piece = ""
            if piece:
                yield self.tokenizer(piece, add_special_tokens=False).input_ids


def load(name: str, *, dtype: str, device: str, length: int) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, for sequences of so many tokens.

    Raises:
        ValueError: the model has not so many positions.
        OSError: there is no such model.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"length={length}: {name} has {positions} positions")
    return model, tokenizer
