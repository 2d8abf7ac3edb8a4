"""Pictures of massive activations, with matplotlib: magnitudes in three dimensions, over blocks, and the sinks."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hf_galore.attention.report import ActivationReport

_COLUMNS = 3  # of panels


def landscapes(found: Mapping[int, Tensor]) -> Figure:
    """|h| of one sequence after some blocks: {block: (tokens, d)}; one panel each, tokens × features × magnitude."""
    columns = min(_COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(5 * columns, 4.5 * rows), layout="constrained")
    for number, (block, sizes) in enumerate(sorted(found.items())):
        axis: Any = figure.add_subplot(rows, columns, number + 1, projection="3d")
        for token, heights in enumerate(sizes.tolist()):
            axis.plot([token] * len(heights), range(len(heights)), heights, color=f"C{token % 10}", linewidth=0.8)
        axis.set(title=f"after block {block}", xlabel="token", ylabel="feature", zlabel="magnitude")
    return figure


def top_curves(report: ActivationReport) -> Figure:
    """The largest magnitudes and the median over the blocks, means over sequences."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.add_subplot()
    blocks = range(len(report.blocks))
    for number in range(len(report.blocks[0].top)):
        axis.plot(blocks, [block.top[number] for block in report.blocks], marker=".", label=f"top {number + 1}")
    axis.plot(blocks, [block.median for block in report.blocks], color="black", linestyle="--", label="median")
    axis.set(xlabel="block", ylabel="magnitude", yscale="log", title="largest activations after each block")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure


def sink_map(report: ActivationReport) -> Figure:
    """The share of attention that the start token receives, by block and head.

    Raises:
        ValueError: the report has no shares of attention.
    """
    shares = {number: block.shares.start for number, block in enumerate(report.blocks) if block.shares is not None}
    if not shares:
        raise ValueError("report: it has no shares of attention to draw")
    heads = max(map(len, shares.values()))
    cells = [line + [float("nan")] * (heads - len(line)) for line in shares.values()]
    figure = Figure(figsize=(2.5 + 0.25 * heads, 2 + 0.25 * len(shares)), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(cells, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axis.set(xlabel="head", ylabel="block", title="attention to the start token")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_yticks(range(len(shares)), list(map(str, shares)))
    figure.colorbar(image)
    return figure
