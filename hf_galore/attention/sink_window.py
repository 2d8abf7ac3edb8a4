"""Which tokens a cache of sinks and a rolling window holds, in which slots, and at which rotary positions.

StreamingLLM (arXiv 2309.17453) keeps the first S tokens (the sinks) and the last W, and counts positions within the
cache. Rotary embeddings only know differences of positions, so the same scores come from keys of the window that stay
at the position they were written at, queries that go on counting, and sinks that are moved up by the number of tokens
evicted. That is S keys to rotate in a step instead of S + W, and none is rotated twice.

Legend: t a token's index in its row, counted from the first that is not padding; N = S + W; rows = 1 where no row is
padded (all are alike, and the tensors broadcast), else the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Slots = slice | Tensor  # in all rows the same, or (rows, n)


@dataclass(frozen=True)
class Step:
    """What one forward pass of `new` tokens does to the cache; every layer does the same."""

    new: int
    stored: int  # slots in use afterwards
    positions: Tensor  # (rows, new), rotary positions of the new tokens
    slots: Slots  # where they are written
    sink_slots: Slots
    arrivals: Tensor | None  # (rows, S), which new token is sink j, negative or >= new if none; None: no row has any
    shifts: Tensor | None  # (rows, new), by how much the sinks are rotated for each query; None: by nothing
    mask: Tensor | None  # (rows, new, new·S + N + new), what the queries see of (sinks per query, slots, new tokens)


class SinkWindow:
    """The bookkeeping of all layers: how much was seen, the rows' left padding, and where positions are counted from.

    Args:
        n_sink: S >= 0.
        window: W >= 1.
        limit: positions stay below it: before they would reach it, they are counted anew, and stored keys are rotated
            back once (`rebase`). At least N plus the longest step.
    """

    def __init__(self, n_sink: int, window: int, limit: int) -> None:
        self.n_sink, self.window, self.limit = n_sink, window, limit
        self.capacity = n_sink + window
        self.reset()

    def reset(self) -> None:
        """As if nothing had been seen."""
        self.seen = 0
        self.least_padding = self.most_padding = 0
        self.top_base = 0  # `base` of the row with the least padding
        self.padding = self.base = torch.zeros(1, dtype=torch.long)

    def pad(self, padding: Tensor) -> None:
        """Before a step: how many tokens on the left of each row (batch,) are padding, or (1,) for any batch.

        Raises:
            ValueError: that is not what it was, in a row that has tokens.
        """
        old = self.padding.to(padding.device)
        if self.seen and not ((padding == old) | ((padding > old) & (old == self.seen))).all():
            raise ValueError("attention_mask: the padding is not that of the tokens seen before")
        self.least_padding, self.most_padding = int(padding.min()), int(padding.max())
        self.padding = padding
        self.base = self.base.to(padding.device).expand_as(padding)

    def select_rows(self, rows: Tensor) -> None:
        """Rows in another order, or some of them."""
        if len(self.padding) > 1:
            rows = rows.to(self.padding.device)
            self.padding, self.base = self.padding[rows], self.base[rows]

    def fits_in_order(self, new: int) -> bool:
        """Whether the slots, with so many more tokens, hold all of them in the order they came."""
        return self.seen + new <= self.capacity

    def rebase(self, new: int) -> Tensor | None:
        """If the next step would reach the limit: counts positions anew, and returns by how much they fell (rows,)."""
        if self.seen + new - self.least_padding - self.top_base <= self.limit:
            return None
        evicted = (self.seen - self.padding - self.capacity).clamp(min=0)
        fall, self.base = evicted - self.base, evicted
        self.top_base = max(0, self.seen - self.least_padding - self.capacity)
        return fall

    def step(self, new: int) -> Step:
        """What the next forward pass of `new` tokens does; `advance` afterwards.

        More than one token that do not fit in order are a chunk, of at most W tokens: its queries have different
        tokens evicted, so each is given its own copy of the sinks, and a mask says who sees what.
        """
        if new == 1 and not self.most_padding and self.seen >= self.capacity:
            return self._usual_step()
        index = self.seen + torch.arange(new, device=self.padding.device)
        token = index - self.padding[:, None]
        in_order = self.fits_in_order(new)
        arrivals = None
        if self.n_sink and self.seen < self.most_padding + self.n_sink:
            arrivals = torch.arange(self.n_sink, device=index.device) + (self.padding - self.seen)[:, None]
        slots: Slots = slice(self.seen, self.seen + new)
        if not in_order:
            slots = torch.where(token < 0, torch.where(index < self.capacity, index, 0), self._slots(token))
        return Step(
            new=new,
            stored=min(self.seen + new, self.capacity),
            positions=token.clamp(min=0) - self.base[:, None],
            slots=slots,
            sink_slots=self._slots(torch.arange(self.n_sink, device=index.device)[None]),
            arrivals=arrivals,
            shifts=None if in_order else (token + 1 - self.capacity).clamp(min=0) - self.base[:, None],
            mask=None if in_order or new == 1 else self._mask(token),
        )

    def _usual_step(self) -> Step:
        """One token that evicts one, in rows without padding: the same without the arithmetic on tensors."""
        slot = self.n_sink + (self.seen - self.n_sink) % self.window
        position = self.seen - self.top_base
        device = self.padding.device
        return Step(
            new=1,
            stored=self.capacity,
            positions=torch.full((1, 1), position, device=device),
            slots=slice(slot, slot + 1),
            sink_slots=slice(0, self.n_sink),
            arrivals=None,
            shifts=torch.full((1, 1), position + 1 - self.capacity, device=device),
            mask=None,
        )

    def advance(self, step: Step) -> None:
        """After the forward pass of the step."""
        self.seen += step.new

    def _slots(self, token: Tensor) -> Tensor:
        """Slots of tokens (rows, n), all t >= 0.

        A row's padding is evicted before any of its tokens, from the last one down to slot 0: so the padding that is
        left is always at the start, where an attention mask over the last N columns looks for it. Then the window goes
        round, and the sinks stay.
        """
        padding = self.padding.clamp(max=self.capacity)[:, None]
        place = torch.where(token < self.capacity, token, self.n_sink + (token - self.n_sink) % self.window)
        return torch.where(place < self.capacity - padding, padding + place, self.capacity - 1 - place)

    def _held(self) -> Tensor:
        """The token t in each slot (rows, N), -1 for none."""
        count = self.seen - self.padding[:, None]
        window = count - self.window + torch.arange(self.window, device=count.device)
        slots = torch.where(window < self.n_sink, self.capacity, self._slots(window.clamp(min=0)))
        held = torch.full((len(count), self.capacity + 1), -1, device=count.device)
        return held.scatter_(1, slots, window)[:, :-1]

    def _mask(self, token: Tensor) -> Tensor:
        query = token[:, :, None]
        own = torch.eye(token.shape[1], dtype=torch.bool, device=token.device)
        sinks = own[:, :, None] & (torch.arange(self.n_sink, device=token.device) <= query[..., None])
        key = torch.cat([self._held(), token], dim=1)[:, None, :]
        window = (key >= self.n_sink) & (key > query - self.window) & (key <= query)
        window[:, :, self.capacity :] |= own & (query < 0)  # padding sees itself, not nothing: that would be NaN
        return torch.cat([sinks.flatten(2), window], dim=-1)
