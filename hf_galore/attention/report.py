"""The report of massive activations: as numbers, as JSON and as Markdown tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_galore.attention.criterion import Criterion
from hf_galore.attention.tallies import Activation, AttentionTally, HiddenTally, Place
from hf_galore.attention.tokens import CLASSES, REGISTER

SINK_SHARE = 0.3  # a head with more attention than this on the start token has a sink there


@dataclass(frozen=True)
class Shares:
    """Shares of attention in one block; a token's share is the mean over all queries of its attention weight.

    Attributes:
        start: of the start token, by head.
        first_delimiter: of the first delimiter, by head; None where no sequence has one.
        by_position: of the token at each position, the mean over heads and the sequences that are so long.
        sink_score: share of heads whose share for the start token is above 0.3.
    """

    start: list[float]
    first_delimiter: list[float] | None
    by_position: list[float]
    sink_score: float


@dataclass(frozen=True)
class Block:
    """One block: means over sequences, extremes over all of them.

    Attributes:
        name: of the module.
        top: the largest magnitudes, largest first: the mean of the largest, of the second largest, …
        median: of |h|, over tokens and features (of an even number the lower one of the middle two).
        massive: how many activations are massive, in all sequences together.
        strongest: the largest of all sequences.
        shares: None where attention was not recorded or the block has none.
    """

    name: str
    top: list[float]
    median: float
    massive: int
    strongest: list[Activation]
    shares: Shares | None


@dataclass(frozen=True)
class Spot:
    """What a site has after one block."""

    count: int
    mean: float
    strongest: Activation


@dataclass(frozen=True)
class Site:
    """A kind of token and a feature that have massive activations.

    Attributes:
        token: start, first_delimiter or other.
        born: the first block, from 0, after which one is massive in any sequence.
        died: the block after the last such one, which has removed them; None if they are there at the end.
        blocks: by block; those without a massive activation are left out.
    """

    token: str
    feature: int
    born: int
    died: int | None
    blocks: dict[int, Spot]

    @property
    def strongest(self) -> Activation:
        """The largest after any block."""
        return max((spot.strongest for spot in self.blocks.values()), key=lambda one: abs(one.value))


@dataclass(frozen=True)
class ActivationReport:
    """Massive activations of a model over `sequences` sequences; blocks are counted from 0, as in the model's list."""

    sequences: int
    criterion: Criterion
    delimiters: tuple[int, ...]
    blocks: list[Block]
    sites: list[Site]

    @property
    def sink_score(self) -> float | None:
        """The mean of the blocks' sink scores; None where attention was not recorded."""
        scores = [block.shares.sink_score for block in self.blocks if block.shares is not None]
        return sum(scores) / len(scores) if scores else None

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON has them."""
        report: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for block, own in zip(report["blocks"], self.blocks, strict=True):
            block["strongest"] = [one._asdict() for one in own.strongest]
        for site, mine in zip(report["sites"], self.sites, strict=True):
            for number, spot in mine.blocks.items():
                site["blocks"][str(number)]["strongest"] = spot.strongest._asdict()
        return report | {"sink_score": self.sink_score}

    def to_markdown(self, names: Mapping[int, str] | None = None) -> str:
        """Two tables, of the blocks and of the sites; `names` has what token ids stand for."""
        tables = [markdown_table(*self._blocks_table(names or {}))]
        if self.sites:
            tables.append(markdown_table(*self._sites_table(names or {})))
        else:
            tables.append("No activation is massive.")
        return "\n\n".join(tables)

    def _blocks_table(self, names: Mapping[int, str]) -> tuple[list[str], list[list[str]]]:
        top = [f"top {number + 1}" for number in range(len(self.blocks[0].top))]
        head = ["block", *top, "median", "massive per sequence", "strongest", "sink score", "attention to start"]
        rows = []
        for number, block in enumerate(self.blocks):
            sink, start = "-", "-"
            if block.shares is not None:
                sink = f"{block.shares.sink_score:.2f}"
                start = f"{sum(block.shares.start) / len(block.shares.start):.3f}"
            cells = [*(f"{value:.4g}" for value in (*block.top, block.median, block.massive / self.sequences))]
            rows.append([str(number), *cells, _describe(block.strongest[0], names), sink, start])
        return head, rows

    def _sites_table(self, names: Mapping[int, str]) -> tuple[list[str], list[list[str]]]:
        head = ["token", "feature", "born in block", "removed in block", "mean at birth", "strongest"]
        rows = []
        for site in self.sites:
            died = "-" if site.died is None else str(site.died)
            mean = f"{site.blocks[site.born].mean:.4g}"
            token = site.token.replace("_", " ")
            strongest = _describe(site.strongest, names)
            rows.append([token, str(site.feature), str(site.born), died, mean, strongest])
        return head, rows


def make_report(
    names: Sequence[str],
    hidden: Mapping[int, HiddenTally],
    attention: Mapping[int, AttentionTally],
    criterion: Criterion,
    delimiters: tuple[int, ...],
) -> ActivationReport:
    """The report of what the tallies of the blocks have counted."""
    blocks = []
    for number, name in enumerate(names):
        tally = hidden[number]
        shares = _shares(attention[number]) if number in attention else None
        top = (tally.top_total / tally.sequences).tolist()
        massive = sum(one.count for one in tally.massive.values())
        blocks.append(Block(name, top, tally.median_total / tally.sequences, massive, tally.strongest, shares))
    places = sorted({place for tally in hidden.values() for place in tally.massive}, key=_order)
    sites = [_site(place, hidden) for place in places]
    return ActivationReport(hidden[0].sequences, criterion, delimiters, blocks, sites)


def _order(place: Place) -> tuple[int, int]:
    return CLASSES.index(place.token), place.feature


def _site(place: Place, hidden: Mapping[int, HiddenTally]) -> Site:
    spots = {}
    for number in sorted(hidden):
        found = hidden[number].massive.get(place)
        if found is not None and found.strongest is not None:
            spots[number] = Spot(found.count, found.mean, found.strongest)
    died = max(spots) + 1
    return Site(place.token, place.feature, min(spots), died if died < len(hidden) else None, spots)


def _shares(tally: AttentionTally) -> Shares:
    start, delimiter = (CLASSES.index(name) for name in ("start", "first_delimiter"))
    by_head = (tally.by_class_total / tally.by_class_count).T.tolist()
    sinks = [share > SINK_SHARE for share in by_head[start]]
    return Shares(
        by_head[start],
        by_head[delimiter] if tally.by_class_count[delimiter] else None,
        (tally.by_position_total / tally.by_position_count).tolist(),
        sum(sinks) / len(sinks),
    )


def _describe(one: Activation, names: Mapping[int, str]) -> str:
    named = {REGISTER: "register token", **names}
    token = "" if one.token is None else f" ({named.get(one.token, one.token)})"
    text = f"{one.value:.4g} at token {one.position}{token}, feature {one.feature}"
    return text.replace("|", "\\|").replace("\n", "\\n")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
