"""Pictures of massive activations, with matplotlib: magnitudes in three dimensions, over blocks, and the sinks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

from hf_galore.attention.report import ActivationReport

_COLUMNS, _BARS = 3, 128  # of the landscapes; features are put together, by their largest, into at most so many bars


def draw_landscapes(found: Mapping[int, Tensor], out: Path) -> None:
    """|h| of one sequence after some blocks: {block: (tokens, d)}; one panel each, tokens × features × magnitude."""
    pyplot = _pyplot()
    rows = -(-len(found) // _COLUMNS)
    figure = pyplot.figure(figsize=(5 * min(_COLUMNS, len(found)), 4.5 * rows), layout="constrained")
    for number, (block, sizes) in enumerate(sorted(found.items())):
        axis: Any = figure.add_subplot(rows, min(_COLUMNS, len(found)), number + 1, projection="3d")
        width = -(-sizes.shape[1] // _BARS)  # features of a bar
        for token, features in enumerate(sizes):
            heights = [float(part.max()) for part in features.split(width)]
            starts = [width * bar for bar in range(len(heights))]
            axis.bar(starts, heights, zs=token, zdir="x", width=width, color=f"C{token % 10}", alpha=0.8)
        axis.set(title=f"after block {block}", xlabel="token", ylabel="feature", zlabel="magnitude")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def draw_top(report: ActivationReport, out: Path) -> None:
    """The largest magnitudes and the median over the blocks, means over sequences."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    blocks = range(len(report.blocks))
    for number in range(len(report.blocks[0].top)):
        axis.plot(blocks, [block.top[number] for block in report.blocks], marker=".", label=f"top {number + 1}")
    axis.plot(blocks, [block.median for block in report.blocks], color="black", linestyle="--", label="median")
    axis.set(xlabel="block", ylabel="magnitude", yscale="log", title="largest activations after each block")
    axis.legend()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def draw_sinks(report: ActivationReport, out: Path) -> None:
    """The share of attention that the start token receives, by block and head.

    Raises:
        ValueError: the report has no shares of attention.
    """
    shares = {number: block.shares.start for number, block in enumerate(report.blocks) if block.shares is not None}
    if not shares:
        raise ValueError("report: it has no shares of attention to draw")
    heads = max(map(len, shares.values()))
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(2 + 0.25 * heads, 2 + 0.25 * len(shares)), layout="constrained")
    cells = [line + [float("nan")] * (heads - len(line)) for line in shares.values()]
    image = axis.imshow(cells, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axis.set(xlabel="head", ylabel="block", title="attention to the start token")
    axis.set_yticks(range(len(shares)), list(map(str, shares)))
    figure.colorbar(image)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
