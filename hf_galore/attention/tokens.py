"""What kind of token is where in the sequences of a forward pass: the start, the first delimiter, others, padding."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_galore.attention.placement import Placement, left_padding

CLASSES = ("start", "first_delimiter", "other")
REGISTER = -1  # stands for the id of a register token, which is no word
_PADDING = -1


def token_classes(valid: Tensor, ids: Tensor | None, delimiters: Sequence[int]) -> Tensor:
    """The index in CLASSES of every token, −1 for padding: int64 (batch, tokens).

    The start is the first token that is no padding. The first delimiter is the first token after it whose id is one of
    `delimiters`.

    Args:
        valid: (batch, tokens), False for padding.
        ids: (batch, tokens), or None if there are no delimiters.
    """
    classes = torch.full(valid.shape, CLASSES.index("other"), device=valid.device)
    start = valid & (valid.cumsum(1) == 1)
    if ids is not None and delimiters:
        found = valid & ~start & torch.isin(ids, torch.tensor(list(delimiters), device=ids.device))
        classes[found & (found.cumsum(1) == 1)] = CLASSES.index("first_delimiter")
    classes[start] = CLASSES.index("start")
    classes[~valid] = _PADDING
    return classes


class Sequences:
    """The sequences of one forward pass, one a row. Where register tokens are put in front, the first is the start.

    Args:
        ids: (batch, tokens), or None where the input is none, such as images.
        mask: (batch, tokens), 0 for padding, or None: no padding.
        delimiters: token ids.
        registers: how many register tokens may be put in front.

    Raises:
        ValueError: the mask is not of that shape, or there are delimiters but no ids to compare with them.
    """

    def __init__(
        self, ids: Tensor | None, mask: Tensor | None, delimiters: Sequence[int] = (), registers: Collection[int] = ()
    ) -> None:
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask: of shape {tuple(mask.shape)}, where (batch, tokens) is needed")
        if ids is None and delimiters:
            raise ValueError("delimiters: the forward pass has no input_ids to compare with them; pass them by name")
        self.ids, self.mask, self.delimiters, self.registers = ids, mask, delimiters, registers
        self._classes: Tensor | None = None

    def classes(self, h: Tensor) -> Tensor:
        """The `token_classes` (batch, tokens) of hidden states (batch, tokens, d), on their device.

        Raises:
            ValueError: the hidden states are of more or fewer tokens than the ids or the mask.
        """
        shape = h.shape[:2]
        self._put_registers(shape[1])
        for name, given in (("input_ids", self.ids), ("attention_mask", self.mask)):
            if given is not None and given.shape != shape:
                raise ValueError(f"{name}: of shape {tuple(given.shape)}, but a block has tokens {tuple(shape)}")
        if self._classes is None or self._classes.shape != shape:
            valid = torch.ones(shape, dtype=torch.bool, device=h.device) if self.mask is None else self.mask != 0
            ids = None if self.ids is None else self.ids.to(valid.device)
            self._classes = token_classes(valid, ids, self.delimiters)
        if self._classes.device != h.device:
            self._classes = self._classes.to(h.device)
        return self._classes

    def _put_registers(self, length: int) -> None:
        """Makes ids and mask those of the hidden states, where register tokens are the difference."""
        given = self.ids if self.mask is None else self.mask
        n = 0 if given is None else length - given.shape[1]
        if given is None or n not in self.registers:
            return
        placement = Placement(n, None if self.mask is None else left_padding(self.mask))
        if self.ids is not None:
            self.ids = placement.put(self.ids.new_full((1, n), REGISTER), self.ids)
        if self.mask is not None:
            self.mask = placement.put(self.mask.new_ones(1, n), self.mask)

    def rows(self, h: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The (indices, classes) of the tokens of each sequence of h that are no padding."""
        found = []
        for classes in self.classes(h):
            index = (classes != _PADDING).nonzero().squeeze(1)
            found.append((index, classes[index]))
        return found


def sequences_of(given: dict[str, Any], delimiters: Sequence[int], registers: Collection[int]) -> Sequences:
    """The sequences among the arguments of a model's forward.

    Raises:
        ValueError: they go on from a cache, so that their beginnings are out of sight; or see `Sequences`.
    """
    name = "cache" if given.get("cache") is not None else "past_key_values"  # as transformers has it from 5.24 on
    cache = given.get(name)
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(f"{name}: whole sequences are needed, not their continuations; use use_cache=False")
    return Sequences(given.get("input_ids"), given.get("attention_mask"), delimiters, registers)
