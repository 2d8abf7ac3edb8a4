"""The oldest versions that hf_galore runs with, in one place: `setup.py` reads it, and older ones are refused by name.

Beside each stands the reason.
"""

from importlib.metadata import PackageNotFoundError, version

OLDEST = {
    "torch": "2.6",  # what transformers asks for from 5.20 on, and torch.compiler.set_stance
    "transformers": "5.22",  # 5.20 has the caches (a type for each layer, is_croppable), but was not run whole
    "accelerate": "1.10",  # the oldest that was run; below 1.6 there is no fsdp2_prepare_model
    "peft": "0.21",  # _get_adapter_state_dict and _remove_adapter_name_from_key of a tuner: in 0.20 they are not
    "trl": "1.0",  # the oldest whose trainers were run
    "deepspeed": "0.19",  # the layout of the flat partitions that is read
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
