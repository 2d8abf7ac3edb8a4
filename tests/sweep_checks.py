"""What each row of the sweep is asked: every check takes a `Subject` and returns, or raises what it found.

A `Refusal` is a ValueError or TypeError of hf_galore, raised when a method is put on the model and before it runs. A
`Failure` is everything else: results that differ, and whatever is raised later or by others.
"""

import copy
import inspect
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from sweep_models import floats
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from version_cases import cache_in, with_cache

import hf_galore
from hf_galore import GaLoreAdamW, SinkCache, galore_param_groups
from hf_galore.lowrank_backward import enable
from hf_galore.nn.bitlinear import BitLinear
from hf_galore.nn.convert import bitlinears

RANK, RATE, STEPS = 2, 1e-2, 2
N_SINK, WINDOW = 2, 6
LOW_RANK = {
    "rank": RANK,
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "right",
    "subspace": "svd",
    "moments": "keep",
}
# Of what a step moves a weight by at most: float64 leaves 1e-9 of models that compute parts in float32, and eps below
# divides that by gradients of 1e-3.
TOLERANCE = 1e-3
CACHED = 1e-3  # of logits: with a cache a model may sum in another order, in float32


class Refusal(Exception):
    """hf_galore says that it cannot, and why."""


class Failure(Exception):
    """hf_galore does something else than it says."""


class Inapplicable(Exception):
    """The model by itself does not do what the check compares with."""


class Subject:
    """A model and inputs that it runs on; `make` gives a copy of it to each check."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        self._model, self.inputs = model, inputs

    def make(self) -> PreTrainedModel:
        """A copy, in evaluation mode."""
        return copy.deepcopy(self._model).eval()


@contextmanager
def refusing() -> Iterator[None]:
    """Makes a Refusal of the ValueErrors and TypeErrors that hf_galore itself raises inside.

    An error that hf_galore has no part in, such as one of peft's, is Inapplicable.
    """
    try:
        yield
    except Exception as error:
        names = [
            frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)
        ]
        if names[-1] == "hf_galore" and isinstance(error, ValueError | TypeError):
            raise Refusal(str(error)) from error
        if "hf_galore" not in names:
            raise Inapplicable(f"{type(error).__name__}: {error}") from error
        raise


def seed() -> None:
    """All random numbers from the start."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All tensors of numbers that the model gives."""
    seed()
    return list(floats(model(**inputs)))


def check_same(name: str, these: list[Tensor], those: list[Tensor]) -> None:
    """Raises Failure unless both lists have the same bits."""
    if len(these) != len(those):
        raise Failure(f"{name}: {len(these)} outputs instead of {len(those)}")
    for one, other in zip(these, those, strict=True):
        if one.shape != other.shape:
            raise Failure(f"{name}: shape {tuple(one.shape)} instead of {tuple(other.shape)}")
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise Failure(f"{name}: differs by {(one - other).abs().max():.1e}")


def engines(subject: Subject) -> None:
    """GaLoreAdamW and the projected backward take the same steps."""
    model, other = subject.make().double(), subject.make().double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in subject.inputs.items()}
    try:
        outputs(model, inputs)
    except Exception:  # some models make float32 tensors on their way
        model, other, inputs = subject.make(), subject.make(), subject.inputs
    grads = _check_trains(copy.deepcopy(model), inputs)
    for name in filter(lambda name: _is_of_lower_rank(grads[name]), grads):
        model.get_parameter(name).requires_grad_(False)
        other.get_parameter(name).requires_grad_(False)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trains = [param.requires_grad for param in model.parameters()]
    groups, said = _or_refusal(lambda: galore_param_groups(model, **LOW_RANK))
    engine, said_too = _or_refusal(lambda: enable(other, refresh="exact", stagger=False, **LOW_RANK))
    if said and said_too:
        raise Refusal(said)
    if said or said_too:
        raise Failure(f"one engine alone refuses: {said or said_too}")
    _train(model, GaLoreAdamW(groups, lr=RATE), inputs)
    optimizer = GaLoreAdamW(engine.param_groups(other), lr=RATE)
    engine.attach(optimizer)
    _train(other, optimizer, inputs)
    engine.uninstall()
    if trains != [param.requires_grad for param in other.parameters()]:
        raise Failure("other parameters train than before")
    _check_close(start, model.state_dict(), other.state_dict())


def _or_refusal(make: Callable[[], Any]) -> tuple[Any, str]:
    try:
        with refusing():
            return make(), ""
    except Refusal as refusal:
        return None, str(refusal)


def _loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A sum over all outputs with random signs."""
    total = torch.zeros(())
    for out in floats(model(**inputs)):
        if out.requires_grad:
            signs = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
            total = total + (torch.where(out.isfinite(), out, 0) * signs).sum()
    return total


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> None:
    model.train()
    for _ in range(STEPS):
        seed()
        _loss(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()


def _check_trains(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that there are, by parameter; raises Inapplicable unless there are some, the same ones twice."""
    found = []
    try:
        for _ in range(2):
            seed()
            model.train().zero_grad()
            _loss(model, inputs).backward()
            found.append([param.grad for param in model.parameters()])
    except Exception as error:
        raise Inapplicable(f"the model itself does not train: {type(error).__name__}: {error}") from error
    if not any(grad is not None and grad.any() for grad in found[0]):
        raise Inapplicable("the model itself has no gradients")
    if any(one is not None and not one.isfinite().all() for one in found[0]):
        raise Inapplicable("the model itself has gradients that are not finite")
    for one, other in zip(*found, strict=True):
        if one is not None and not torch.allclose(one, other, rtol=1e-3):
            raise Inapplicable("the model itself has other gradients each time")
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def _is_of_lower_rank(grad: Tensor) -> bool:
    """Whether a matrix of it has a lower rank than the subspace, which it does not determine then: it is in many."""
    if grad.ndim < 2 or min(grad.shape[-2:]) <= RANK:
        return False
    values = torch.linalg.svdvals(grad)
    return bool((values[..., RANK - 1] <= 1e3 * torch.finfo(grad.dtype).eps * values[..., 0]).any())


def _check_close(start: dict[str, Tensor], one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    if list(one) != list(other):
        raise Failure(f"state dicts differ in {sorted(set(one) ^ set(other))[:3]}")
    far = {}
    for name, value in one.items():
        if value.is_floating_point() and value.numel():
            far[name] = float((value - other[name]).abs().max()) / RATE
    worst = max(far, key=far.__getitem__)
    if not far[worst] <= TOLERANCE:
        several = sum(not distance <= TOLERANCE for distance in far.values())
        still = [
            name for name in far if torch.equal(other[name], start[name]) and not torch.equal(one[name], start[name])
        ]
        raise Failure(f"{several} weights differ, {worst} by {far[worst]:.0e} of a step; untrained: {still[:3]}")


def bitlinear(subject: Subject) -> None:
    """BitLinear trains, every layer of it is called, and without it the model is what it was, bit for bit."""
    model, inputs = subject.make(), subject.inputs
    before, weights = outputs(model, inputs), copy.deepcopy(model.state_dict())
    trained = _check_trains(copy.deepcopy(model), inputs)
    with refusing():
        hf_galore.replace_linear(model)
    called = set()  # weights: of blocks that share theirs, some layers are never called
    layers = bitlinears(model)
    handles = [
        module.register_forward_hook(lambda module, *_: called.add(module.weight))
        for module in model.modules()
        if isinstance(module, BitLinear)
    ]
    seed()
    _loss(model.train(), inputs).backward()
    for handle in handles:
        handle.remove()
    for path, layer in layers.items():
        if layer.weight.grad is not None and layer.weight not in called:
            raise Failure(f"{path} is read and never called")
        if layer.weight.grad is not None and not layer.weight.grad.isfinite().all():
            raise Failure(f"{path} has a gradient that is not finite")
        if f"{path}.weight" in trained and layer.weight.grad is None:
            raise Failure(f"{path} has no gradient")
    if not any(layer.weight.grad is not None for layer in layers.values()):
        raise Inapplicable("no linear layer has a gradient")
    model.zero_grad()
    hf_galore.restore_linear(model.eval())
    parameters = {name for name, _ in model.named_parameters()}
    for name, value in model.state_dict().items():
        if name in parameters and not torch.equal(value, weights[name]):
            raise Failure(f"restore_linear leaves {name} changed")
    model.load_state_dict(weights)  # what the forward pass in training mode has counted
    check_same("restored", outputs(model, inputs), before)


def peft(subject: Subject) -> None:
    """BitLinear as an adapter of peft: the model is itself while the adapter is disabled, and after it is unloaded."""
    from peft import get_peft_model

    # peft freezes what no adapter is on, and of some inputs torch rounds products with frozen weights in another way.
    model, inputs = subject.make().requires_grad_(False), subject.inputs
    before = outputs(model, inputs)
    with refusing():
        wrapped = get_peft_model(model, hf_galore.BitLinearConfig()).eval()
    outputs(wrapped, inputs)
    with wrapped.disable_adapter():
        check_same("disabled", outputs(wrapped, inputs), before)


def bias(subject: Subject) -> None:
    """An attention bias that starts as nothing changes no bit, has gradients in all layers, and goes without trace."""
    model, inputs = subject.make(), subject.inputs
    before = outputs(model, inputs)
    with refusing():
        hf_galore.add_attention_bias(model)
    check_same("with a bias", outputs(model, inputs), before)
    seed()
    _loss(model, inputs).backward()
    gates = {name: param for name, param in model.named_parameters() if name.endswith("kv_bias.gate")}
    missing = [name for name, param in gates.items() if param.grad is None or not param.grad.any()]
    if missing or not gates:
        raise Failure(f"{len(missing)} of {len(gates)} gates without gradient: {missing[:2]}")
    hf_galore.remove_attention_bias(model)
    model.zero_grad()
    check_same("removed", outputs(model, inputs), before)


def registers(subject: Subject) -> None:
    """Register tokens change what is computed, not its shape; with a cache and without is the same; they go again."""
    model, inputs = subject.make(), subject.inputs
    before = outputs(model, inputs)
    own, generates = _steps_apart(model, inputs), _generates(model, inputs)
    with refusing():
        hf_galore.add_register_tokens(model)
    after = outputs(model, inputs)
    if [out.shape for out in after] != [out.shape for out in before]:
        raise Failure(
            f"shapes {[tuple(out.shape) for out in after][:3]} instead of {[tuple(o.shape) for o in before][:3]}"
        )
    if all(torch.equal(one, other) for one, other in zip(after, before, strict=True)):
        raise Failure("nothing has changed")
    if any(one.isfinite().all() and not other.isfinite().all() for one, other in zip(before, after, strict=True)):
        raise Failure("not finite")
    if own is not None and own < CACHED and (apart := _steps_apart(model, inputs)) is not None and apart > CACHED:
        raise Failure(f"a step with a cache is {apart:.0e} away from the whole")
    if generates and not _generates(model, inputs):
        raise Failure("generate does not run with them")
    hf_galore.remove_register_tokens(model)
    check_same("removed", outputs(model, inputs), before)


def _generates(model: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether generate() makes a token more of input_ids."""
    if list(inputs) != ["input_ids"] or not model.can_generate():
        return False
    ids = inputs["input_ids"]
    try:
        return model.generate(ids, max_new_tokens=1, do_sample=False).shape[1] == ids.shape[1] + 1
    except Exception:
        return False


@torch.no_grad()
def _steps_apart(model: Any, inputs: dict[str, Tensor]) -> float | None:
    """How far the last token's logits with a cache are from those without; None where the model has no such thing."""
    ids = inputs.get("input_ids")
    if list(inputs) != ["input_ids"] or ids is None:
        return None
    try:
        whole = model(input_ids=ids)
        past = cache_in(model(input_ids=ids[:, :-1], use_cache=True))
        step = model(input_ids=ids[:, -1:], **with_cache(model, past))
        return float((whole[0][:, -1] - step[0][:, -1]).abs().max())
    except Exception:
        return None


@torch.no_grad()
def sinks(subject: Subject) -> None:
    """A SinkCache gives DynamicCache's bits until it is full, and goes on from there."""
    model, inputs = subject.make(), subject.inputs
    with refusing():
        cache = SinkCache(model, n_sink=N_SINK, window=WINDOW)
    if list(inputs) != ["input_ids"]:
        raise Failure(f"accepted by a model of {', '.join(inputs)}")
    ids = inputs["input_ids"]
    full = N_SINK + WINDOW
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    own: Any = None
    for start, stop in [(0, full - 2), (full - 2, full - 1), (full - 1, full)]:
        # As generate() gives them: some models, such as Bamba, count from 0 in every call without.
        positions = {"position_ids": torch.arange(start, stop)[None]} if takes_positions else {}
        theirs = model(input_ids=ids[:, start:stop], use_cache=True, **positions, **with_cache(model, own))
        own = cache_in(theirs)
        ours = model(input_ids=ids[:, start:stop], use_cache=True, **with_cache(model, cache))
        check_same(f"tokens {start} to {stop}", [ours[0]], [theirs[0]])
    for token in range(full, full + 2):
        out = model(input_ids=ids[:, token : token + 1], use_cache=True, **with_cache(model, cache))[0]
        if not out.isfinite().all():
            raise Failure("not finite after an eviction")


def activations(subject: Subject) -> None:
    """The report of massive activations, with the shares of attention where there are some; the model is as it was."""
    model, inputs = subject.make(), subject.inputs
    before = outputs(model, inputs)
    _check_runs_eager(subject)
    with refusing():
        report = hf_galore.massive_activations(model, [inputs])
    if "|" not in report.to_markdown():
        raise Failure("the report has no table")
    check_same("afterwards", outputs(model, inputs), before)


def _check_runs_eager(subject: Subject) -> None:
    model: Any = subject.make()
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config._attn_implementation_internal = "eager"
    try:
        outputs(model, subject.inputs)
    except Exception as error:
        raise Inapplicable(f"the model itself does not run with eager attention: {error}") from error


CHECKS: dict[str, Callable[[Subject], None]] = {
    "engines": engines,
    "bitlinear": bitlinear,
    "peft": peft,
    "bias": bias,
    "registers": registers,
    "sinks": sinks,
    "activations": activations,
}
