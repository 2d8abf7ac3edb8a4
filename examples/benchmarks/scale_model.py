"""Tables of communication_model.py in Markdown: beside what was measured, and for 7B and 70B on many GPUs.

python examples/benchmarks/scale_model.py
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import communication_model as model
import result_file
from collectives import KINDS, sent
from communication_model import ENGINES, METHODS, STEPS, Precision, Shapes

RESULTS = Path(__file__).parent / "results" / "communication.csv"
MEASURED = {"60m x 2 layers": (Shapes(512, 1376, 2, 1024, keys=512), 128)}
BUCKET = 2**20  # elements of the gradients' bucket that ZeRO-3 keeps, as communication.py sets it
LARGE = {"7B": Shapes(4096, 11008, 32, 32000, keys=4096), "70B": Shapes(8192, 28672, 80, 32000, keys=1024)}
RANKS = (8, 64, 1024)
GAP = 200
# bfloat16 weights and gradients. States as they are by default, and small ones.
DEFAULT = Precision(word=2, moment=4, basis=4)
SMALL = Precision(word=2, moment=1, basis=1)
GB = 1e9


def predicted(row: dict[str, str]) -> dict[str, float]:
    """S by kind, `sent`, `kept` and `gradients` of a row of communication.csv, by the formulas."""
    shapes, rank = MEASURED[row["shape"]]
    method, engine, ranks = row["method"], row["engine"], int(row["ranks"])
    if engine in model.ZERO and method == "galore_adamw":
        method = "galore_adamw_layerwise"  # what it runs as
    found = model.traffic(shapes, method, rank, engine)[row["step"]]
    size = model.sizes(shapes, method, rank, engine)
    parts = model.memory(size, engine, ranks, Precision())
    gradients = parts["gradients"] / (2 if engine == "DDP" else 1)  # half of DDP's are its buckets, which stay
    kept = parts["weights"] + parts["states"] + parts["bases"]
    kept += {"DDP": gradients, "ZeRO-3": gradients + 4 * BUCKET}.get(engine, 0)
    if row["step"] == "refresh" and size.small:
        kept += model.WORK * size.small  # U, which the sketches are made with
        gradients += model.WORK * size.basis  # the sketches
    total = sum(sent(kind, value, ranks) for kind, value in found.items())
    return {**{kind: found.get(kind, 0) for kind in KINDS}, "sent": total, "kept": kept, "gradients": gradients}


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def beside_measured() -> str:
    """MB that were measured, and their ratio to what the formulas say."""
    rows = result_file.read(RESULTS)
    lines = []
    for ranks, engine, method in dict.fromkeys((row["ranks"], row["engine"], row["method"]) for row in rows):
        line = [ranks, engine, method]
        mine = [row for row in rows if (row["ranks"], row["engine"], row["method"]) == (ranks, engine, method)]
        for row, name in [*((row, "sent") for row in mine), (mine[0], "kept")]:
            measured = int(row[name])
            line.append(f"{measured / 1e6:.2f} ({measured / predicted(row)[name]:.4f})")
        lines.append([*line, f"{int(mine[0]['peak']) / 1e6:.1f}"])
    return table(["ranks", "engine", "method", *STEPS, "kept", "peak"], lines)


def cells() -> list[tuple[str, str]]:
    """Engines and methods; `galore_adamw` is `galore_adamw_layerwise` under ZeRO."""
    pairs = itertools.product(ENGINES, METHODS)
    return [(engine, method) for engine, method in pairs if method != "galore_adamw" or engine not in model.ZERO]


def communication(shapes: Shapes, rank: int) -> str:
    """GB that each rank sends in a step, the mean of T."""
    lines = []
    for engine, method in cells():
        found = model.traffic(shapes, method, rank, engine, word=2)
        lines.append([engine, method, *(f"{model.sent_per_step(found, n, GAP) / GB:.2f}" for n in RANKS)])
    return table(["engine", "method", *(f"N = {n}" for n in RANKS)], lines)


def memory(shapes: Shapes, rank: int) -> str:
    """GB that each rank keeps: weights + gradients + states + bases = all; with small states, all."""
    lines = []
    for engine, method in cells():
        size = model.sizes(shapes, method, rank, engine)
        default, small = ([model.memory(size, engine, n, one) for n in RANKS] for one in (DEFAULT, SMALL))
        lines.append([engine, method, *map(_added, default), *(f"{sum(one.values()) / GB:.1f}" for one in small)])
    return table(["engine", "method", *(f"N = {n}" for n in RANKS), *(f"small, N = {n}" for n in RANKS)], lines)


def _added(parts: dict[str, float]) -> str:
    return f"{' + '.join(f'{part / GB:.1f}' for part in parts.values())} = {sum(parts.values()) / GB:.1f}"


def break_even(shapes: Shapes, rank: int, precision: Precision) -> float:
    """Ranks from which on the projected backward under FSDP2 keeps more than full AdamW, whose all is sharded."""
    full, ours = (model.sizes(shapes, method, rank, "FSDP2") for method in ("AdamW", "galore_adamw_layerwise"))
    return (_sharded(full, precision) - _sharded(ours, precision)) / (precision.basis * ours.basis)


def _sharded(size: model.Sizes, precision: Precision) -> float:
    return sum(model.memory(size, "FSDP2", 1, precision).values()) - precision.basis * size.basis


def main() -> None:
    print(f"MB, and measured / predicted\n\n{beside_measured()}")
    for name, shapes in LARGE.items():
        for rank in (shapes.hidden // 4, 128):
            default, small = (break_even(shapes, rank, one) for one in (DEFAULT, SMALL))
            print(f"\n{name}, rank {rank}: GB sent per step and GPU, T = {GAP}\n\n{communication(shapes, rank)}")
            print(f"\n{name}, rank {rank}: GB per GPU\n\n{memory(shapes, rank)}")
            print(f"\nNo less than full AdamW under FSDP2 from N = {default:.1f}, with small states {small:.1f}")


if __name__ == "__main__":
    main()
