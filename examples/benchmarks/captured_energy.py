"""Energy that randomized bases capture of the gradients of a training run, relative to the SVD's.

    python examples/benchmarks/captured_energy.py     # 10 minutes on one thread; writes results/captured_energy.csv

GaLore trains the 60m shape on the source code of Python's standard library, and keeps the gradients of all 56
projected matrices at some steps, in --output_dir. A row is a step, a rank and a start: `cold`, or `warm` from the
basis, itself a cold one, of the gradient at an earlier step. Rows that the CSV holds and gradients that are there are
not made again.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path

import result_file
import torch
from tqdm import tqdm

from hf_galore import GaLoreAdamW
from hf_galore.param_groups import galore_param_groups
from hf_galore.subspace import SUBSPACES, captured_energy, refresh, resolve_side

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretrain

RESULTS = Path(__file__).parent / "results" / "captured_energy.csv"
RANKS = [128, 32]
BEFORE = {1: None, 50: 1, 500: 300}  # the step whose basis a warm start at this step has
# Rates at which so small a batch trains steadily; the paper's are for one of 512 sequences.
LR, SCALE, WARMUP, BATCH = 2e-3, 0.5, 50, 2

Gradients = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/captured_energy"), help="(%(default)s)")
    parser.add_argument("--steps", nargs="+", type=int, choices=BEFORE, default=list(BEFORE), help="(%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (%(default)s)")
    options = parser.parse_args()
    steps = sorted({step for last in options.steps for step in (last, BEFORE[last]) if step})
    if not all(file_of(options.output_dir, step).exists() for step in steps):
        train(options.output_dir, steps)
    done = finished(options.results)
    for step in options.steps:
        for rank in RANKS:
            for before in sorted({None, BEFORE[step]}, key=bool):
                if (step, rank, str(before or "")) not in done:
                    result_file.append(options.results, measure(options.output_dir, step, rank, before))


def file_of(folder: Path, step: int) -> Path:
    """Where the gradients of a step are."""
    return folder / f"gradients_{step}.pt"


def train(folder: Path, steps: list[int]) -> None:
    """Trains up to the last of the steps and writes their gradients."""
    settings = pretrain.parse(["--config", "60m", "--vocab_size", "8192", "--output_dir", str(folder)])
    blocks, _ = pretrain.load_data(settings)
    torch.manual_seed(settings.seed)
    model = pretrain.build_model(settings)
    groups = galore_param_groups(
        model, pretrain.MATRICES, rank=settings.rank, update_proj_gap=settings.update_proj_gap, scale=SCALE
    )
    optimizer = GaLoreAdamW(groups, lr=LR)
    projected = {param for group in groups if "rank" in group for param in group["params"]}
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    for step in (bar := tqdm(range(1, steps[-1] + 1), desc="training", dynamic_ncols=True)):
        ids = torch.stack([blocks[index]["input_ids"] for index in order[BATCH * (step - 1) : BATCH * step]])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step in steps:
            torch.save({n: p.grad for n, p in model.named_parameters() if p in projected}, file_of(folder, step))
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, step / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def measure(folder: Path, step: int, rank: int, before: int | None) -> dict[str, object]:
    """The row of a step, a rank and a start."""
    gradients: Gradients = torch.load(file_of(folder, step))
    earlier: Gradients = torch.load(file_of(folder, before)) if before else {}
    energies = torch.tensor([energies_of(grad, earlier.get(name), rank) for name, grad in gradients.items()])
    best, old, found = energies.unbind(1)
    row: dict[str, object] = {"step": step, "rank": rank, "start": "warm" if before else "cold", "from_step": before}
    row["matrices"] = len(gradients)
    for name, values in (("randomized/svd", found / best), ("svd/gradient", best), ("old basis/svd", old / best)):
        row |= {f"min {name}": f"{values.min():.5f}", f"median {name}": f"{values.median():.5f}"}
    row |= {"torch": torch.__version__, "command": shlex.join(["python", *sys.argv])}
    return row


def energies_of(grad: torch.Tensor, earlier: torch.Tensor | None, rank: int) -> tuple[float, float, float]:
    """Shares of the gradient that the SVD's basis captures, the one before the refresh (or NaN), and the one after."""
    side = resolve_side("std", grad.shape)

    def take(method: str, matrix: torch.Tensor, previous: torch.Tensor | None, seed: int) -> torch.Tensor:
        return refresh(matrix, rank, side, SUBSPACES[method], previous, seed)[0]

    best = take("svd", grad, None, 0)
    old = take("randomized", earlier, None, 1) if earlier is not None else None
    found = take("randomized", grad, old, 2)

    def share(basis: torch.Tensor | None) -> float:
        return math.nan if basis is None else float(captured_energy(grad.double(), basis.double(), side))

    return share(best), share(old), share(found)


def finished(path: Path) -> set[tuple[int, int, str]]:
    """Step, rank and earlier step of the rows that the CSV holds."""
    return {(int(row["step"]), int(row["rank"]), row["from_step"]) for row in result_file.read(path)}


if __name__ == "__main__":
    main()
