"""The mutants: patches that each put one fault into the code, and whether the tests of its package catch it.

    python tests/mutants/run.py --jobs 2 --out mutants.csv    # all
    python tests/mutants/run.py adamw_no_bias_correction sink_window_one_too_many

A mutant is a file <name>.patch in this folder: a diff as `git apply` takes it, after the lines

    what: one sentence that says what is wrong then
    tests: the test files that are to catch it

The tests run in copies of the checkout's tracked files, as these are now, with its built native ops. They have to pass
there without a patch first. The exit status is 1 if a mutant survives, and 2 if the tests do not pass without it, or a
patch does not apply.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGE = "hf_galore"
COLUMNS = ["mutant", "file", "what", "result", "caught_by", "seconds"]
CAUGHT, SURVIVED = "caught", "SURVIVED"
# Hypothesis tries the same examples each time, and does not look for the smallest one that fails.
_QUICK = """
import sys, pytest
from hypothesis import Phase, settings
settings.register_profile("mutants", derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants")
sys.exit(pytest.main(sys.argv[1:]))
"""
PYTEST = ["-c", _QUICK, "-x", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow"]
_WHERE = "import runpy, sys; runpy.run_path('tests/conftest.py'); import hf_galore; print(hf_galore.__file__)"


class Error(Exception):
    """What keeps the mutants from being tried."""


class Mutant(NamedTuple):
    """A patch: its name, the file that it changes, what is wrong then, and the tests that are to catch it."""

    name: str
    patch: Path
    file: str
    what: str
    tests: tuple[str, ...]


class Outcome(NamedTuple):
    """What pytest said: whether all passed, the first test that did not, its output, and how long it took."""

    passed: bool
    failed: str
    output: str
    seconds: float


def read(patch: Path) -> Mutant:
    """The mutant in a file.

    Raises:
        Error: a line of the head is missing, or names a test file that is not there.
    """
    text = patch.read_text("utf-8")
    head = dict(re.findall(r"^(what|tests): (.+)$", text.partition("\n--- ")[0], re.MULTILINE))
    files = re.findall(r"^\+\+\+ b/(\S+)$", text, re.MULTILINE)
    if head.keys() != {"what", "tests"} or len(files) != 1:
        raise Error(f"{patch.name}: it must have a line 'what: …', a line 'tests: …' and a diff of one file")
    tests = tuple(head["tests"].split())
    for test in tests:
        if not (ROOT / test).is_file():
            raise Error(f"{patch.name}: there is no {test}")
    return Mutant(patch.stem, patch, files[0], head["what"], tests)


def chosen(names: Sequence[str]) -> list[Mutant]:
    """The mutants of these names; all without names.

    Raises:
        Error: there is none of a name.
    """
    mutants = {patch.stem: read(patch) for patch in sorted(HERE.glob("*.patch"))}
    if unknown := [name for name in names if name not in mutants]:
        raise Error(f"{unknown[0]}: there is no such mutant; there are {', '.join(mutants)}")
    return [mutants[name] for name in names or mutants]


def tracked() -> Iterator[Path]:
    """The files of the checkout that git knows, and the native ops that were built; relative paths."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    yield from (Path(name) for name in listed.stdout.split("\0") if name)
    yield from (path.relative_to(ROOT) for path in (ROOT / PACKAGE).glob("_native_*"))


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the checkout, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy = Path(name).resolve()
        for path in tracked():
            if os.path.lexists(ROOT / path):
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / path, copy / path, follow_symlinks=False)
        yield copy


def environment(copy: Path) -> dict[str, str]:
    """That of the tests: the package is imported from the copy, in their child processes as well."""
    alone = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    return os.environ | alone


def check_import(copy: Path) -> None:
    """Raises Error unless tests in the copy import the package from there."""
    command = [sys.executable, "-c", _WHERE]
    process = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    if process.stdout.strip() != str(copy / PACKAGE / "__init__.py"):
        raise Error(f"tests do not import {PACKAGE} from a copy: {process.stdout.strip() or process.stderr[-2000:]}")


def apply(mutant: Mutant, copy: Path, *options: str) -> None:
    """Puts the fault into the copy; with --check it only sees whether it could.

    Raises:
        Error: the patch does not apply.
    """
    command = ["git", "apply", *options, str(mutant.patch)]
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)}  # no repository that the copy may lie in
    process = subprocess.run(command, cwd=copy, env=alone, capture_output=True, text=True)
    if process.returncode != 0:
        raise Error(f"{mutant.name}: the patch does not apply: {process.stderr.strip()}")


def tested(copy: Path, tests: Iterable[str]) -> Outcome:
    """What the test files say of the copy.

    Raises:
        Error: pytest did not get as far as to run a test.
    """
    started = time.perf_counter()
    command = [sys.executable, *PYTEST, *tests]
    process = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    seconds = time.perf_counter() - started
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", process.stdout, re.MULTILINE)
    if process.returncode not in (0, 1) and failed is None:
        raise Error(f"pytest failed on {' '.join(tests)}:\n{process.stdout[-2000:]}{process.stderr[-2000:]}")
    return Outcome(process.returncode == 0, failed[1] if failed else "", process.stdout, seconds)


def check_baseline(tests: tuple[str, ...]) -> None:
    """Raises Error unless the test files pass without a patch."""
    with copied() as copy:
        outcome = tested(copy, tests)
    if not outcome.passed:
        raise Error(f"without a patch {outcome.failed} fails:\n{outcome.output[-2000:]}")
    print(f"{outcome.seconds:7.1f} s  pass without a patch: {' '.join(tests)}", flush=True)


def tried(mutants: Sequence[Mutant]) -> list[dict[str, str]]:
    """The rows of mutants with the same test files, which have to pass without a patch first."""
    check_baseline(mutants[0].tests)
    rows = []
    for mutant in mutants:
        with copied() as copy:
            apply(mutant, copy)
            outcome = tested(copy, mutant.tests)
        result = SURVIVED if outcome.passed else CAUGHT
        print(f"{outcome.seconds:7.1f} s  {mutant.name}: {result} {outcome.failed}", flush=True)
        values = (mutant.name, mutant.file, mutant.what, result, outcome.failed, f"{outcome.seconds:.0f}")
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutants, without .patch; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time")
    parser.add_argument("--out", type=Path, help="a CSV file for the results")
    args = parser.parse_args()
    try:
        mutants = chosen(args.names)
        with copied() as copy:
            check_import(copy)
            for mutant in mutants:  # before the tests, which take longer
                apply(mutant, copy, "--check")
        sets = dict.fromkeys(mutant.tests for mutant in mutants)
        alike = [[mutant for mutant in mutants if mutant.tests == tests] for tests in sets]
        with ThreadPoolExecutor(args.jobs) as pool:
            found = {row["mutant"]: row for rows in pool.map(tried, alike) for row in rows}
        rows = [found[mutant.name] for mutant in mutants]
    except Error as error:
        print(error, file=sys.stderr)
        return 2
    if args.out is not None:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    survivors = [row["mutant"] for row in rows if row["result"] == SURVIVED]
    print(f"{len(rows) - len(survivors)} of {len(rows)} mutants caught", *survivors, sep="\nSURVIVED: ")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
