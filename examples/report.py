"""Shows finished runs side by side: a Markdown table and a plot of the training losses."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MIB = 2**20


def table(runs: list[dict]) -> str:
    """One row per run; `runs` are the results that `pretrain.train` returns."""
    peak = "peak GPU memory (MiB)" if runs[0]["device"] != "cpu" else "peak memory of the process (MiB)"
    header = ["method", "held-out perplexity", "tokens/s", "optimizer state (MiB)", peak, "seconds in refreshes"]
    rows = [
        [
            run["optim"],
            f"{run['perplexity']:.2f}",
            f"{run['tokens_per_second']:.0f}",
            f"{run['state_bytes'] / MIB:.1f}",
            f"{run['peak_bytes'] / MIB:.0f}",
            f"{run['refresh_seconds']:.1f}",
        ]
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def plot(runs: list[dict], path: Path) -> None:
    """Draws every run's training loss, smoothed, over the steps into a PNG."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run in runs:
        steps, losses = zip(*run["loss_curve"], strict=True)
        axes.plot(steps, smooth(losses), label=f"{run['optim']} (held-out perplexity {run['perplexity']:.2f})")
    axes.set(xlabel="step", ylabel="training loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smooth(values: list[float], weight: float = 0.6) -> list[float]:
    """Exponential moving average, free of the bias towards its start."""
    average, total, smoothed = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed
