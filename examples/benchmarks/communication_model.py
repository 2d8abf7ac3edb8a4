"""The bytes that each rank is given to send in a step, and those it keeps, from the shapes of a model: docs/scale.md.

For Llamas without grouped heads but in keys and values, with an untied head. Bytes are those of collectives.py: S, of
the whole thing. Left out: norms for clipping, flags and buffers of some bytes, and padding of rows that N does not
divide.
"""

from dataclasses import dataclass
from typing import NamedTuple

from collectives import sent

ZERO = ("ZeRO-1", "ZeRO-2", "ZeRO-3")
ENGINES = ("DDP", "FSDP2", *ZERO)
METHODS = ("AdamW", "LoRA", "galore_adamw", "galore_adamw_layerwise")
STEPS = ("normal", "before", "refresh")
WORK = 4  # bytes of an element in working precision: what sketches, new bases and moments are sent in
Traffic = dict[str, dict[str, float]]  # S by step and kind of collective


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    keys: int  # output features of the projections of keys and of values

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(m, n) of each weight that is projected: m output features, n input features."""
        d, i, k = self.hidden, self.intermediate, self.keys
        return [(d, d), (k, d), (k, d), (d, d), (i, d), (i, d), (d, i)] * self.layers

    @property
    def tail(self) -> int:
        """Elements of the head and the norm before it, which FSDP2 brings together once in a step."""
        return self.vocabulary * self.hidden + self.hidden

    @property
    def first(self) -> int:
        """Elements of the frozen weights that ZeRO-3 does not need in LoRA's backward pass.

        Nothing below the first adapters has a gradient: the embeddings, a norm, the first queries, keys and values.
        """
        return self.hidden * (self.vocabulary + 1 + self.hidden + 2 * self.keys)

    @property
    def rest(self) -> int:
        """Elements of all that is not projected: embeddings, head and norms."""
        return self.tail + self.vocabulary * self.hidden + 2 * self.layers * self.hidden


class Precision(NamedTuple):
    """Bytes of an element of weights and gradients, of a moment, and of a basis as it is kept."""

    word: float = 4
    moment: float = 4
    basis: float = 4


class Sizes(NamedTuple):
    """Numbers of elements for a method."""

    present: int  # all parameters, adapters and small parameters included
    trained: int  # those with a gradient
    moments: int  # of one of the two moments
    basis: int  # of all bases
    small: int  # of the small parameters B (m, r)
    full: int  # of the matrices that are projected


def sizes(shapes: Shapes, method: str, rank: int, engine: str) -> Sizes:
    """What the method has; `galore_adamw` projects on the right where rows are sharded, as `std` says under DDP."""
    matrices = [(m, n, min(rank, m, n)) for m, n in shapes.matrices]
    full = sum(m * n for m, n, _ in matrices)
    everything = full + shapes.rest
    if method == "AdamW":
        return Sizes(everything, everything, everything, 0, 0, full)
    if method == "LoRA":
        adapters = sum(r * (m + n) for m, n, r in matrices)
        return Sizes(everything + adapters, adapters, adapters, 0, 0, full)
    if method == "galore_adamw":
        sides = [(max(m, n), min(m, n), r) if engine == "DDP" else (m, n, r) for m, n, r in matrices]
        moments, basis = sum(m * r for m, _, r in sides), sum(n * r for _, n, r in sides)
        return Sizes(everything, everything, moments + shapes.rest, basis, 0, full)
    small, basis = sum(m * r for m, _, r in matrices), sum(n * r for _, n, r in matrices)
    trained = small + shapes.rest
    return Sizes(everything + small, trained, trained, basis, small, full)


def traffic(shapes: Shapes, method: str, rank: int, engine: str, word: float = 4) -> Traffic:
    """S of the collectives of each kind of step; T steps are T − 2 normal ones, one before a refresh, a refresh."""
    size = sizes(shapes, method, rank, engine)
    once = shapes.tail if engine == "FSDP2" else shapes.first if method == "LoRA" else 0
    normal = _normal(size, engine, word, once)
    more = _at_a_refresh(size, method, engine, word)
    return {step: _sum(normal, more.get(step, {})) for step in STEPS}


def _normal(size: Sizes, engine: str, word: float, once: int) -> dict[str, float]:
    """The gradients, and the weights where these are sharded: all but `once` of them come together twice."""
    gradients = word * size.trained
    if engine == "DDP":
        return {"all_reduce": gradients}
    if engine in ("FSDP2", "ZeRO-3"):
        return {"reduce_scatter": gradients, "all_gather": word * (2 * size.present - once)}
    return {"all_reduce": gradients, "all_gather": gradients}


def _at_a_refresh(size: Sizes, method: str, engine: str, word: float) -> Traffic:
    """What the step before a refresh and the refresh have more. Under ZeRO there is a fold in both."""
    if method in ("AdamW", "LoRA"):
        return {}
    new = WORK * size.basis
    if method == "galore_adamw":
        gathered = {"gather": word * size.full} if engine == "FSDP2" else {}
        return {"refresh": {"broadcast": new, **gathered}}
    refresh = {"reduce": new, "broadcast": new}
    moment = WORK * size.small
    if engine == "DDP":
        return {"refresh": refresh}
    if engine == "FSDP2":
        return {"before": {"all_gather": moment}, "refresh": refresh}
    fold = _fold_of_zero(size, engine, word)
    before = _sum(fold, {"all_reduce": moment})
    return {"before": before, "refresh": _sum(_sum(fold, refresh), {"all_reduce": 2 * moment})}


def _fold_of_zero(size: Sizes, engine: str, word: float) -> dict[str, float]:
    """B from its float32 partitions; in ZeRO-3 also W and the B to be zeroed, and both back to their shards."""
    if engine == "ZeRO-3":
        both = word * (size.full + size.small)
        return {"all_gather": WORK * size.small + both, "broadcast": both}
    return {"all_reduce": WORK * size.small}


def _sum(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {kind: one.get(kind, 0) + other.get(kind, 0) for kind in {**one, **other}}


def sent_per_step(found: Traffic, ranks: int, gap: int) -> float:
    """Bytes that a rank sends in a step, the mean of T = `gap` of them."""
    weights = {"normal": gap - 2, "before": 1, "refresh": 1}
    step = {name: sum(sent(kind, size, ranks) for kind, size in kinds.items()) for name, kinds in found.items()}
    return sum(weights[name] * step[name] for name in STEPS) / gap


def memory(size: Sizes, engine: str, ranks: int, precision: Precision) -> dict[str, float]:
    """Bytes that each rank keeps of weights, gradients, states and bases; no activations, nothing that comes and goes.

    DDP's buckets are a second copy of the gradients. ZeRO's states include the float32 copy of what it trains.
    """
    word, moment, basis = precision
    share = {"DDP": 1, "ZeRO-1": 1, "ZeRO-2": 1}.get(engine, ranks)
    gradients = word * size.trained
    states = 2 * moment * size.moments
    return {
        "weights": word * size.present / share,
        "gradients": {"DDP": 2 * gradients, "ZeRO-1": gradients}.get(engine, gradients / ranks),
        "states": states if engine == "DDP" else (states + (4 * size.trained if engine in ZERO else 0)) / ranks,
        "bases": basis * size.basis,
    }
