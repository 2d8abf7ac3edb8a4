"""The oldest versions that hf_galore runs with, in one place: `setup.py` reads it, and older ones are refused by name.

Each bound is of what was run; what fails below it stands beside it.
"""

from importlib.metadata import PackageNotFoundError, version

OLDEST = {
    "torch": "2.6",
    "transformers": "5.20",
    "accelerate": "1.10",
    "peft": "0.20",
    "trl": "1.0",
    "deepspeed": "0.19",
}


def refuse_older(*packages: str) -> None:
    """Sees that what is installed of the packages is new enough; what is not installed is not asked for.

    Raises:
        ImportError: one is older, with the version that is needed.
    """
    for package in packages:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if _numbers(found) < _numbers(OLDEST[package]):
            raise ImportError(
                f"hf_galore needs {package} {OLDEST[package]} or newer, and {found} is installed: "
                f"pip install '{package}>={OLDEST[package]}'"
            )


def _numbers(release: str) -> tuple[int, ...]:
    """The leading numbers of a version: those of 5.24.0.dev0 are (5, 24, 0)."""
    numbers = []
    for part in release.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
