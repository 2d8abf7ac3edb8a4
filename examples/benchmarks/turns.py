"""Times of calls that take turns, so that what disturbs the machine disturbs them alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median


def median_seconds(calls: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """The median of each call over the rounds; `warm_up` rounds before them are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}
