"""Where the bookkeeping puts tokens, against lists that are filled one token at a time."""

import pytest
import torch

from hf_galore.attention.sink_window import SinkWindow

CASES = [(2, 5), (0, 4), (3, 3), (1, 1)]
PADDING = [0, 2, 6, 7, 11]  # of a capacity of 7 or less


def kept(count: int, n_sink: int, window: int) -> set[int]:
    """The tokens left of the first `count`: appended to a list, whose first entry after the sinks goes when full."""
    tokens: list[int] = []
    for token in range(count):
        tokens.append(token)
        if len(tokens) > n_sink + window:
            del tokens[n_sink]
    return set(tokens)


def as_tensor(slots) -> torch.Tensor:
    """Slots (rows, n), for all rows."""
    if isinstance(slots, slice):
        slots = torch.arange(slots.start, slots.stop)[None]
    return slots.expand(len(PADDING), -1) if len(slots) == 1 else slots


@pytest.mark.parametrize(("n_sink", "window"), CASES)
@pytest.mark.parametrize(
    "sizes", [[1] * 40, [3, 1, 1, 3, 2, 1, 3, 3, 3, 1, 1, 1, 3, 3, 1, 1, 3]], ids=["single", "chunks"]
)
def test_slots(n_sink, window, sizes):
    book = SinkWindow(n_sink, window, limit=10**6)
    book.pad(torch.tensor(PADDING))
    content = [[None] * book.capacity for _ in PADDING]
    for size in sizes:
        size = min(size, window)
        if book.seen < book.capacity:
            size = min(size, book.capacity - book.seen)
        step = book.step(size)
        for row, padding in enumerate(PADDING):
            for column in range(size):
                token = book.seen + column - padding
                content[row][as_tensor(step.slots)[row, column]] = token if token >= 0 else None
        book.advance(step)
        for row, padding in enumerate(PADDING):
            here = {token for token in content[row] if token is not None}
            assert here == kept(max(0, book.seen - padding), n_sink, window)
            # Where a mask over the last N columns has padding, there is none of these; elsewhere, one in each slot.
            masked = max(0, padding - max(0, book.seen - book.capacity))
            in_use = content[row][: min(book.seen, book.capacity)]
            assert all(token is None for token in in_use[:masked])
            assert None not in in_use[masked:]
            sinks = [content[row][slot] for slot in as_tensor(step.sink_slots)[row].tolist()]
            assert sinks[: len(here)] == sorted(here)[:n_sink]


@pytest.mark.parametrize(("n_sink", "window"), CASES)
def test_mask_of_a_chunk_shows_what_single_queries_would_see(n_sink, window):
    book = SinkWindow(n_sink, window, limit=10**6)
    book.pad(torch.tensor(PADDING))
    content = torch.full((len(PADDING), book.capacity), -1)
    size = min(3, window)
    while book.seen < 30:
        new = size if book.seen >= book.capacity else book.capacity
        step = book.step(new)
        token = book.seen + torch.arange(new) - book.padding[:, None]
        if step.mask is not None:
            keys = torch.cat([torch.arange(n_sink).repeat(new).expand(len(PADDING), -1), content, token], dim=1)
            for row in range(len(PADDING)):
                for column in range(new):
                    query = int(token[row, column])
                    seen = keys[row][step.mask[row, column]].tolist()
                    expected = kept(query + 1, n_sink, window) if query >= 0 else {query}
                    assert sorted(seen) == sorted(expected)
                    # Its own copies of the sinks, which are rotated by the number of tokens evicted from its row.
                    own = torch.arange(n_sink * new) // max(n_sink, 1) == column
                    assert not step.mask[row, column, : n_sink * new][~own].any()
                    assert step.shifts[row, column] == max(0, query + 1 - book.capacity)
        content.scatter_(1, as_tensor(step.slots), token.clamp(min=-1))
        book.advance(step)


def test_positions_stay_below_the_limit_and_keep_their_differences():
    limit = 20
    book = SinkWindow(2, 5, limit)
    book.pad(torch.tensor([0, 4]))
    absolute = torch.zeros(2, dtype=torch.long)  # what was subtracted so far
    falls = 0
    for _ in range(100):
        fall = book.rebase(1)
        if fall is not None:
            absolute += fall
            falls += 1
        step = book.step(1)
        assert step.positions.max() < limit
        token = (book.seen - book.padding)[:, None]
        assert torch.equal(step.positions + absolute[:, None], token.clamp(min=0))
        if step.shifts is not None:  # sink 0, written at position 0, is as far from the query as within the cache
            assert torch.equal(step.positions - step.shifts, token.clamp(max=book.capacity - 1))
        book.advance(step)
    assert 100 // limit <= falls <= 100 // (limit - book.capacity)


@pytest.mark.parametrize(("n_sink", "window"), CASES)
def test_rows_without_padding_are_the_same_without_tensors(n_sink, window):
    """A single token that evicts one has a short cut; the same window beside a padded row does not take it."""
    quick, slow = SinkWindow(n_sink, window, limit=30), SinkWindow(n_sink, window, limit=30)
    slow.pad(torch.tensor([0, 1]))
    for _ in range(100):
        for book in (quick, slow):
            book.rebase(1)
        one, two = quick.step(1), slow.step(1)
        assert torch.equal(as_tensor(one.slots)[0], as_tensor(two.slots)[0])
        assert torch.equal(one.positions[0], two.positions[0])
        if one.shifts is not None:
            assert torch.equal(one.shifts[0], two.shifts[0])
            assert torch.equal(as_tensor(one.sink_slots)[0], as_tensor(two.sink_slots)[0])
        for book, step in ((quick, one), (slow, two)):
            book.advance(step)
