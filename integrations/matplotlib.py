"""The picture of a run's bases, with matplotlib."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

from hf_galore.cli.plot_subspace import Curves, kind


def draw(curves: Curves, titles: Mapping[str, str], out: Path) -> None:
    """One panel for each measure in `titles`: a thin line for each matrix, in the colour of its kind."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = sorted({kind(parameter) for lines in curves.values() for parameter in lines})
    colours = {name: f"C{index % 10}" for index, name in enumerate(kinds)}
    figure, axes = pyplot.subplots(1, len(titles), figsize=(5 * len(titles), 4), layout="constrained")
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for parameter, line in curves[measure].items():
            steps, values = zip(*line, strict=True)
            axis.plot(steps, values, color=colours[kind(parameter)], linewidth=0.8, alpha=0.7)
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0, top=1 if measure != "stable_rank" else None)
    for name, colour in colours.items():
        axes[-1].plot([], [], color=colour, label=name)
    axes[-1].legend(fontsize="small")
    figure.savefig(out, dpi=120)
