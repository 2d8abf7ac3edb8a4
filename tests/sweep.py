"""The sweep: all architectures of transformers, tiny, times all methods of hf_galore.

    python tests/sweep.py --jobs 2 --out sweep.csv        # all; goes on where the file ends
    python tests/sweep.py --only llama bert --checks engines bias
    python tests/sweep.py --share 1/2                     # every second row
    python tests/sweep.py --out sweep.csv --changed       # all anew, and which cells differ from the file's

A cell is `ok`; `refused: …`, hf_galore's own ValueError or TypeError before anything runs; `n/a: …`, which lies with
the model; or `FAILS: …`. A row that fails and is not among KNOWN_FAILURES makes the exit status 1. Every row runs in a
forked child of its own with limits of time and memory.
"""

import argparse
import csv
import logging
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import sweep_models
import torch
import transformers
from sweep_checks import CHECKS, Inapplicable, Refusal, Subject

import hf_galore

SECONDS, BYTES = 120, 8 << 30  # of a row
OK, REFUSED, INAPPLICABLE, FAILS = "ok", "refused", "n/a", "FAILS"
NOT_BUILT = "not built"
COLUMNS = ["class", "types", NOT_BUILT, *CHECKS, "seconds"]

# (class, check): why hf_galore is not at fault
KNOWN_FAILURES = {
    (name, "peft"): "peft asks every model for its input embeddings, LoRA does, too, and this one raises"
    for name in ("FlavaForPreTraining", "PPFormulaNetForConditionalGeneration")
}

# What nearly every model imports, once for all children.
_COMMON = (
    "generation.utils",
    "models.llama.modeling_llama",
    "models.mixtral.modeling_mixtral",
    "models.clip.modeling_clip",
)

Row = dict[str, str]


class Job(NamedTuple):
    """A child that works on a row."""

    row: Row
    checks: list[str]
    process: Any
    results: Connection
    start: float


def work(row: Row, checks: Iterable[str], results: Connection) -> None:
    """Builds the row's model and runs the checks; sends (column, cell) for each as it is known."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        model = sweep_models.build(row["class"])
        subject = Subject(model, sweep_models.inputs_of(model))
    except sweep_models.NotBuilt as reason:
        results.send((NOT_BUILT, str(reason)))
        return
    for check in checks:
        results.send((check, cell(check, subject)))


def cell(check: str, subject: Subject) -> str:
    """What the table says of this check of the model."""
    try:
        CHECKS[check](subject)
    except Refusal as refusal:
        return f"{REFUSED}: {_line(refusal)}"
    except Inapplicable as reason:
        return f"{INAPPLICABLE}: {_line(reason)}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{FAILS}: {type(error).__name__}: {_line(error)} ({Path(where.filename).name}:{where.lineno})"
    return OK


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].replace("|", "/")


def sweep(rows: Iterable[Row], checks: list[str], jobs: int) -> Iterator[Row]:
    """The rows with all cells, in the order in which they are finished."""
    waiting, running = list(rows)[::-1], list[Job]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_started(waiting.pop(), checks))
        wait([job.results for job in running], timeout=1.0)
        for job in running[:]:
            if _finished(job):
                running.remove(job)
                yield job.row


def _started(row: Row, checks: list[str]) -> Job:
    """A child at work on the row."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(row, checks, theirs))
    process.start()
    theirs.close()
    return Job(row, checks, process, ours, time.monotonic())


def _finished(job: Job) -> bool:
    """Takes what the child has sent, and says whether it is at its end; ends it when its time is over."""
    try:
        while job.results.poll():
            column, text = job.results.recv()
            job.row[column] = text
        if time.monotonic() < job.start + SECONDS:
            return False
        job.process.kill()
        reason = f"takes more than {SECONDS} s"
    except EOFError:
        reason = "the process ended"
    job.process.join()
    job.results.close()
    job.row["seconds"] = f"{time.monotonic() - job.start:.1f}"
    if job.process.exitcode and NOT_BUILT not in job.row:
        check = next((check for check in job.checks if check not in job.row), job.checks[-1])
        job.row[check] = f"{FAILS}: {reason} ({job.process.exitcode})"
    return True


def fails(row: Row) -> list[str]:
    """The checks that this row fails."""
    return [
        name for name in CHECKS if row.get(name, "").startswith(FAILS) and (row["class"], name) not in KNOWN_FAILURES
    ]


def chosen(only: list[str], share: str) -> list[Row]:
    """The rows whose class or type is named, and of these the k-th of n parts."""
    part, parts = map(int, share.split("/"))
    found = [
        {"class": name, "types": " ".join(types)}
        for name, types in sweep_models.rows().items()
        if not only or {name, *types} & set(only)
    ]
    return found[part - 1 :: parts]


def prepare() -> None:
    """What children inherit: imports, hooks, one thread, and silence."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for name in _COMMON:
        import_module(f"transformers.{name}")
    import_module("torch._dynamo")
    for name in hf_galore.__all__:
        getattr(hf_galore, name)
    hf_galore.register()


def read(path: Path) -> dict[str, Row]:
    """The rows of the file by class."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["class"]: {k: v for k, v in row.items() if v} for row in csv.DictReader(file)}


def write(path: Path, rows: Iterable[Row]) -> None:
    """A file of the rows."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def markdown(rows: Iterable[Row], checks: list[str]) -> str:
    """A table with a row for each class that was built."""
    lines = ["| " + " | ".join(["class", *checks]) + " |", "|---" * (1 + len(checks)) + "|"]
    for row in rows:
        cells = [row["class"], *(row.get(check, "") for check in checks)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Runs the sweep; 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="classes or model types")
    parser.add_argument("--checks", nargs="*", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--share", default="1/1", help="k/n: the k-th of n parts of the rows")
    parser.add_argument("--out", type=Path, help="a CSV file of the rows; those in it are not run again")
    parser.add_argument("--changed", action="store_true", help="run all again, and list what differs from --out")
    args = parser.parse_args()
    prepare()
    before = read(args.out) if args.out else {}
    done = {} if args.changed else dict(before)
    wanted = chosen(args.only, args.share)
    start = time.monotonic()
    todo = [row for row in wanted if row["class"] not in done]
    for row in sweep(todo, args.checks, args.jobs):
        done[row["class"]] = row
        if args.out:
            write(args.out, done.values())
        for check in fails(row):
            print(f"{row['class']}: {check} {row[check]}", flush=True)
    table = [done[row["class"]] for row in wanted]
    return report(table, args.checks, before if args.changed else {}, time.monotonic() - start)


def report(table: list[Row], checks: list[str], before: dict[str, Row], seconds: float) -> int:
    """Prints the table and its counts; 1 if a row fails."""
    built = [row for row in table if NOT_BUILT not in row]
    print(markdown(built, checks))
    for row in table:
        if NOT_BUILT in row:
            print(f"not built: {row['class']}: {row[NOT_BUILT]}")
        for check in checks:
            old = before.get(row["class"], {}).get(check, "")
            if row["class"] in before and old != row.get(check, ""):
                print(f"changed: {row['class']} {check}: {old} -> {row.get(check, '')}")
    for check in checks:
        print(check, dict(Counter(row.get(check, "").partition(":")[0] for row in built)))
    failing = [row["class"] for row in table if fails(row)]
    print(f"{len(built)} built, {len(table) - len(built)} not, {len(failing)} fail, in {seconds:.0f} s")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
