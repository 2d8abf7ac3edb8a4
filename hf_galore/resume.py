"""What a run that goes on may change: the options it was saved with against those it goes on with.

A group of a state dict says them: a projected one has its keys and the names of its `targets`, and one of small
parameters of the projected backward has the same under `lowrank_backward`. Older state dicts say less, and what they
do not say is not compared.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from hf_galore.schedule import with_gap

Group = Mapping[str, Any]

BACKWARD = "lowrank_backward"  # the key of a group of small parameters
TARGETS = "targets"

# What the shape or the meaning of a state depends on, and what only the steps to come depend on.
FIXED = ("rank", "proj_type", "equal_state", "share_inputs", "basis_dtype", "state_dtype", "min_8bit_size")
FREE = (
    *("update_proj_gap", "scale", "subspace", "random_from", "moments", "source", "stagger", "lazy", "refresh"),
    *("fold_every", "offload_masters", "stochastic_rounding", "seed"),
)
OURS = (*FREE, "transposed", TARGETS)  # what stays as this run has it
_ADVICE = (
    "Go on as the checkpoint was written, or start from its weights: load it as the model and train without its "
    "optimizer's state (without resume_from_checkpoint)"
)
_SHOWN = 4  # names of targets in a message
_FULL = "steps at full rank"


def refused(reason: str) -> ValueError:
    """The error for a state that the run cannot go on from."""
    return ValueError(f"{reason}. {_ADVICE}")


def changes(ours: Group, saved: Group) -> dict[str, str]:
    """The options that a run goes on with otherwise than it was saved, each as it is told of.

    Raises:
        ValueError: the state of the saved run does not fit an option of this one.
    """
    found = {}
    for name in (*FIXED, *FREE):
        if name in ours and name in saved and ours[name] != saved[name]:
            if name in FIXED:
                raise refused(
                    f"{name}: the checkpoint was written with {name}={saved[name]!r} and this run has "
                    f"{name}={ours[name]!r}, which its state does not fit"
                )
            found[name] = f"{name}={ours[name]!r} (so far {saved[name]!r})"
    return found


def tell(found: Mapping[str, str]) -> None:
    """Warns in one line of the options that have changed, if any."""
    if found:
        warnings.warn(f"the run goes on with {', '.join(found.values())}", stacklevel=2)


def check_groups(ours: Sequence[Group], saved: Sequence[Group]) -> None:
    """Raises ValueError where the groups do not hold the same parameters, as far as names, kinds and numbers tell.

    Numbers alone, of groups of which none is projected, are left to torch.
    """
    here, there = _targets(ours), _targets(saved)
    if here and there and here != there:
        raise refused(
            f"target modules: the checkpoint projects {_some(there - here)} and this run does not; this run projects "
            f"{_some(here - there)} and the checkpoint does not"
        )
    now, then = sizes(ours), sizes(saved)
    if now != then and (here or there):
        raise refused(
            f"the checkpoint has groups of {then} parameters and this optimizer has {now}: another optimizer (optim) "
            "wrote it, or one with other target modules"
        )
    for one, other in zip(ours, saved, strict=False):
        if _kind(one) != _kind(other) and not (BACKWARD in one and _kind(other) == _FULL):
            raise refused(f"the checkpoint {_kind(other)} what this run {_kind(one)}: another optim wrote it")


def sizes(groups: Sequence[Group]) -> list[int]:
    """The number of parameters in each group."""
    return [len(group["params"]) for group in groups]


def with_schedule(state: Mapping[str, Any], ours: Group, saved: Group) -> dict[str, Any]:
    """A saved state with its lazy schedule as it is for the options of this run; without one if it is not lazy."""
    found = dict(state)
    if "refresh_schedule" in found:
        if not ours["lazy"]:
            del found["refresh_schedule"]
        elif "update_proj_gap" in saved:
            gaps = (saved["update_proj_gap"], ours["update_proj_gap"])
            found["refresh_schedule"] = with_gap(found["refresh_schedule"], *gaps)
    return found


def _targets(groups: Sequence[Group]) -> set[str]:
    """The names of what is projected; a wrapper of torch.compile does not change them."""
    names = [name for group in groups for name in (*group.get(TARGETS, ()), *group.get(BACKWARD, {}).get(TARGETS, ()))]
    return {name.replace("_orig_mod.", "") for name in names}


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN]) or "nothing"
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _kind(group: Group) -> str:
    if BACKWARD in group:
        return "projects in the backward pass (a _layerwise name)"
    return _FULL if group.get("rank") is None else "projects in the optimizer"
