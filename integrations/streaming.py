"""Generation without an end, with what it costs shown as it goes: for `python -m hf_galore stream`."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from hf_galore.integrations.compatibility import cache_argument
from hf_galore.integrations.decoders import decoder_of
from hf_galore.integrations.sink_cache import SinkCache

_FOREVER = 10**12  # tokens
_PLACE = "GPU" if torch.cuda.is_available() else "process"


class Figures(NamedTuple):
    """The state of a stream: tokens so far, speed since the figures before, bytes now."""

    tokens: int
    tokens_per_second: float
    cache_bytes: int
    process_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens | {self.tokens_per_second:,.1f} tokens/s | cache "
            f"{self.cache_bytes / 2**20:,.2f} MiB | {_PLACE} {self.process_bytes / 2**20:,.0f} MiB"
        )


def print_figures(figures: Figures) -> None:
    """To standard error."""
    print(f"[{figures}]", file=sys.stderr, flush=True)


class Meter(BaseStreamer):
    """A streamer for generate() that hands figures to `report` every `every` tokens, by default to standard error.

    With a tokenizer it writes the text to standard output, too.
    """

    def __init__(
        self, cache: Any, tokenizer: Any = None, every: int = 100, report: Callable[[Figures], None] = print_figures
    ) -> None:
        self.cache, self.every, self.report = cache, every, report
        self.text = None if tokenizer is None else TextStreamer(tokenizer, skip_prompt=True)
        self.tokens = -1  # the first call has the prompt

    def put(self, value: torch.Tensor) -> None:
        """One more token."""
        if self.text is not None:
            self.text.put(value)
        self.tokens += 1
        if self.tokens == 0:
            self.start = time.perf_counter()
        elif self.tokens % self.every == 0:
            now = time.perf_counter()
            speed = self.every / (now - self.start)
            self.report(Figures(self.tokens, speed, cache_bytes(self.cache), process_bytes()))
            self.start = now

    def end(self) -> None:
        """The last token has come."""
        if self.text is not None:
            self.text.end()


def stream(
    model: Any, input_ids: torch.Tensor, meter: Meter, max_new_tokens: int | None = None, **kwargs: Any
) -> None:
    """Generates from a prompt (1, tokens) into the meter's cache, past any end-of-text token.

    Args:
        max_new_tokens: None goes on until it is interrupted.
        kwargs: for generate().
    """
    end, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            streamer=meter,
            max_new_tokens=max_new_tokens or _FOREVER,
            **{cache_argument(decoder_of(model).forward): meter.cache},
            **kwargs,
        )
    finally:
        model.generation_config.eos_token_id = end


def load(name: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a directory or of the Hub, on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()
    return model, AutoTokenizer.from_pretrained(name)


def process_bytes() -> int:
    """What torch has allocated on the GPU; without one, the resident memory of this process, 0 where it is unknown."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a SinkCache or a DynamicCache."""
    if isinstance(cache, SinkCache):
        return cache.nbytes
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
