"""The CSV that a benchmark adds a line to for each finished case."""

import csv
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds one row to the CSV, below a header if it is the first, and prints it."""
    print(*(f"{name}: {value}" for name, value in row.items() if name != "command"), sep=", ", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
