"""Finds the blocks of a transformer, and lets functions see or change what they put out."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_galore.attention.registers import RegisterTokens
from hf_galore.attention.tokens import Sequences, sequences_of

_ATTENTION = re.compile(r"Attention\d*$")

# Is given (block, hidden states (batch, tokens, d), sequences); what it returns takes the place of the hidden states.
OnHidden = Callable[[int, Tensor, Sequences], Tensor | None]
# Is given (block, attention weights (batch, heads, tokens, tokens), sequences).
OnWeights = Callable[[int, Tensor, Sequences], None]


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a decoder or encoder by name, in their order: the outermost ModuleList with attention inside.

    Raises:
        ValueError: there is no such list, or more than one (encoder and decoder, text and images).
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and any(find_attention(child) for child in module):
            lists[name] = module
    if not lists:
        raise ValueError(f"model: {type(model).__name__} has no ModuleList of blocks with an attention module")
    if len(lists) > 1:
        raise ValueError(
            f"model: {type(model).__name__} has several lists of blocks, {', '.join(lists)}; pass the part with one"
        )
    ((name, blocks),) = lists.items()
    return {f"{name}.{index}": block for index, block in enumerate(blocks)}


def find_attention(block: nn.Module) -> nn.Module | None:
    """The first module of the block whose class is called an attention; None if there is none."""
    return next((module for module in block.modules() if _ATTENTION.search(type(module).__name__)), None)


@contextmanager
def observed(
    model: nn.Module,
    on_hidden: OnHidden | None = None,
    on_weights: OnWeights | None = None,
    *,
    delimiters: Sequence[int] = (),
) -> Iterator[list[str]]:
    """Inside, the functions are called for every block in every forward pass of the model; gives the blocks' names.

    Attention that is recomputed in the backward pass (gradient checkpointing) is not seen again; the hooks of the
    blocks are outside of what transformers recomputes. Blocks without attention have no weights.

    Args:
        delimiters: token ids, see `Sequences`.

    Raises, besides the errors of `find_blocks`, in the forward pass:
        ValueError: a block puts out something else than hidden states (batch, tokens, d), runs more than once, has no
            weights (batch, heads, tokens, tokens) to show, or has them of windows; the sequences are no whole ones.
    """
    blocks = find_blocks(model)
    watch = _Watch(model, delimiters, on_hidden, on_weights)
    handles = []
    try:
        handles.append(model.register_forward_pre_hook(watch.begin, with_kwargs=True))
        handles.append(model.register_forward_hook(watch.end, always_call=True))
        for index, (name, block) in enumerate(blocks.items()):
            handles.append(block.register_forward_hook(watch.block_hook(index, name)))
            attention = find_attention(block) if on_weights is not None else None
            if attention is not None:
                handles.append(attention.register_forward_hook(watch.attention_hook(index, name)))
        yield list(blocks)
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Knows the sequences of the forward pass that is going on, and which blocks have run in it."""

    def __init__(
        self,
        model: nn.Module,
        delimiters: Sequence[int],
        on_hidden: OnHidden | None,
        on_weights: OnWeights | None,
    ) -> None:
        self.delimiters, self.on_hidden, self.on_weights = delimiters, on_hidden, on_weights
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._sequences: Sequences | None = None
        self._ran: set[int] = set()
        self._weighed: dict[int, tuple[int, ...]] = {}  # (batch, tokens) of the weights that a block has shown

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # the names may be fewer than the arguments (*args) or more
        registers = {module.n_tokens for module in model.modules() if isinstance(module, RegisterTokens)}
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        self._sequences = sequences_of(given, self.delimiters, registers)
        self._ran, self._weighed = set(), {}

    def end(self, *_: Any) -> None:
        self._sequences = None

    def block_hook(self, index: int, name: str) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._sequences is None or self.on_hidden is None:
                return None
            h = output[0] if isinstance(output, tuple) else output
            if not isinstance(h, Tensor) or h.ndim != 3:
                raise ValueError(f"model: {name} does not put out hidden states (batch, tokens, d)")
            if index in self._ran:
                raise ValueError(f"model: {name} runs more than once in a forward pass")
            if self._weighed.get(index, h.shape[:2]) != h.shape[:2]:
                raise ValueError(f"attention: {name} attends within parts of the sequences; leave attention out")
            self._ran.add(index)
            changed = self.on_hidden(index, h, self._sequences)
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def attention_hook(self, index: int, name: str) -> Callable[..., None]:
        def hook(attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._sequences is None or self.on_weights is None:
                return
            parts = output if isinstance(output, tuple) else ()
            weights = next((part for part in reversed(parts) if isinstance(part, Tensor) and part.ndim == 4), None)
            if weights is None or not _are_weights(weights):
                raise ValueError(
                    f"attention: {type(attention).__name__} of {name} does not show weights (batch, heads, tokens, "
                    "tokens): they need attn_implementation='eager' and no static cache; or leave attention out"
                )
            self._weighed[index] = weights.shape[0], weights.shape[-1]
            self.on_weights(index, weights, self._sequences)

        return hook


def _are_weights(weights: Tensor) -> bool:
    """Whether (batch, heads, tokens, tokens) are weights of attention: of each query at least 0, and at most 1 in sum.

    Other states of a module may have that shape. The sum is below 1 where a sink takes a part.
    """
    square = weights.shape[-2] == weights.shape[-1]
    return square and not bool((weights < 0).any() | (weights.sum(-1) > 1.01).any())
