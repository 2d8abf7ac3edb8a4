"""Other options at a resume: what later steps alone depend on takes effect with one warning, the rest is refused."""

import copy

import pytest
import torch
from lowrank_cases import (
    RANK,
    STACK,
    adamw,
    adamw8bit,
    assert_same,
    on_engine,
    on_optimizer_path,
    saved,
    train,
    weights,
)

from hf_galore import GaLoreAdamW
from hf_galore.schedule import with_gap

CUT, STEPS = 3, 9


def on_optimizer(make=adamw, **options):
    """(model, optimizer) with the projection in the optimizer."""
    return on_optimizer_path(STACK, torch.float32, make, **options)


def in_backward(make=adamw, **options):
    """(model, optimizer) with the projected backward."""
    return on_engine(STACK, torch.float32, make, **options)[:2]


ENGINES = {"galore_adamw": on_optimizer, "galore_adamw_layerwise": in_backward}
MAKERS = {"32 bits": adamw, "8 bits": adamw8bit}
each_engine = pytest.mark.parametrize("build", ENGINES.values(), ids=ENGINES)

# Options of the run that was saved, and what changes.
FREE = [
    ({}, {"scale": 0.5}),
    ({}, {"update_proj_gap": 2}),
    ({}, {"subspace": "svd"}),
    ({"subspace": "random"}, {"subspace": "randomized"}),
    ({}, {"subspace": "random"}),
    ({}, {"subspace": "late_random", "random_from": 5}),
    ({}, {"moments": "keep"}),
    ({}, {"moments": "reset"}),
    ({"moments": "reset", "update_proj_gap": 2}, {"moments": "rotate"}),
    ({}, {"source": "moment"}),
    ({}, {"stagger": True}),
    ({}, {"lazy": True}),
    ({"lazy": True}, {"lazy": False}),
]
FREE_IN_BACKWARD = [
    ({}, {"refresh": "exact"}),
    ({"refresh": "exact"}, {"refresh": "streaming"}),
    ({"fold_every": 2}, {"fold_every": 4}),
    ({"fold_every": 4}, {"fold_every": 1}),
    ({}, {"stochastic_rounding": False}),
]
FIXED = [
    ({}, {"rank": RANK - 1}),
    ({}, {"proj_type": "left"}),
    ({}, {"equal_state": True}),
    ({}, {"basis_dtype": "int8"}),
    ({"basis_dtype": "int4"}, {"basis_dtype": "int8"}),
]


def cut(build, before, make=adamw):
    """The model's weights and the optimizer's state after some steps."""
    model, optimizer = build(make, **before)
    train(STACK, model, optimizer, range(CUT))
    return saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def resumed(build, options, checkpoint, make=adamw):
    model, optimizer = build(make, **options)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))  # torch goes on with the very tensors
    return model, optimizer


def change_at_once(optimizer, options):
    """Changes options of a run that goes on in memory."""
    engine = getattr(optimizer, "_hf_galore_steps", None)
    if engine is not None:
        for name, value in options.items():
            object.__setattr__(engine.engine.settings, name, value)  # one object, which all layers have
        for basis in engine.engine.bases:
            basis.lazy = basis.lazy if engine.engine.settings.lazy else None
            basis.tapping = basis.due()
        return
    for group in optimizer.param_groups:
        if "rank" in group:
            group.update(options)
            for param in group["params"] if not group["lazy"] else ():
                optimizer.state[param].pop("refresh_schedule", None)


@pytest.mark.parametrize(
    ("build", "before", "change"),
    [(build, *row) for build in ENGINES.values() for row in FREE] + [(in_backward, *row) for row in FREE_IN_BACKWARD],
)
def test_what_takes_effect(build, before, change):
    """The resumed run is, bit for bit, the one whose options were changed while it ran."""
    checkpoint = cut(build, before)
    model, optimizer = resumed(build, before, checkpoint)
    change_at_once(optimizer, change)
    with pytest.warns(UserWarning, match=f"the run goes on with .*{next(iter(change))}="):
        other, again = resumed(build, before | change, checkpoint)
    for pair in ((model, optimizer), (other, again)):
        train(STACK, *pair, range(CUT, STEPS))
    assert_same(weights(other), weights(model))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@each_engine
@pytest.mark.parametrize(("before", "change"), FIXED, ids=str)
def test_what_is_refused(before, change, build, make):
    """With the old value and the new; the run at hand has lost nothing."""
    checkpoint = cut(build, before, make)
    model, optimizer = build(make, **before | change)
    train(STACK, model, optimizer, range(2))
    start, state = weights(model), copy.deepcopy(optimizer.state_dict())
    ((name, new),) = change.items()
    with pytest.raises(ValueError, match=rf"{name}: .*{name}=.*{name}={new!r}.*start from its weights"):
        optimizer.load_state_dict(checkpoint["optimizer"])
    assert_same(weights(model), start)
    assert str(optimizer.state_dict()) == str(state)


def test_a_dtype_of_the_states_and_shared_inputs_are_refused():
    bfloat16 = cut(on_optimizer, {}, lambda groups: adamw(groups, state_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"state_dtype=torch.bfloat16 and this run has state_dtype=None"):
        resumed(on_optimizer, {}, bfloat16)
    with pytest.raises(ValueError, match="share_inputs: "):
        resumed(in_backward, {"share_inputs": [["0", "2"]]}, cut(in_backward, {}))


@each_engine
def test_another_seed_takes_effect(build):
    with pytest.warns(UserWarning, match=r"the run goes on with seed=3 \(so far 0\)"):
        _, optimizer = resumed(build, {}, cut(build, {}), lambda groups: adamw(groups, seed=3))
    assert {group["seed"] for group in optimizer.param_groups} == {3}


@each_engine
def test_old_state_dicts_do_not_say_their_options(build):
    """Their shapes still do."""
    checkpoint = cut(build, {})
    for group in checkpoint["optimizer"]["param_groups"]:
        group.pop("lowrank_backward", None)
        group.pop("targets", None)
    resumed(build, {}, checkpoint)
    for group in checkpoint["optimizer"]["param_groups"]:
        if "rank" in group:
            group["rank"] = RANK - 1
    with pytest.raises(ValueError, match=r"shape|rank="):
        resumed(build, {"rank": RANK - 1}, checkpoint)


@each_engine
def test_a_state_of_another_optimizer_is_refused(build):
    theirs = next(one for one in ENGINES.values() if one is not build)
    with pytest.raises(ValueError, match=r"the checkpoint projects in .*another optim|another optimizer .optim."):
        resumed(build, {}, cut(theirs, {}))
    model = STACK.model(torch.float32)
    plain = torch.optim.AdamW(model.parameters())
    train(STACK, model, plain, range(2))
    with pytest.raises(ValueError, match=r"groups of .* parameters and this optimizer has"):
        build()[1].load_state_dict(plain.state_dict())
    if build is on_optimizer:
        with pytest.raises(ValueError, match=r"saved as torch\.uint8.*float32"):
            resumed(build, {}, cut(build, {}, adamw8bit))


def test_other_targets_of_the_same_shapes_are_refused():
    """The state has no names; the groups do."""
    first, second = ([torch.nn.Parameter(torch.randn(6, 6)) for _ in range(2)] for _ in range(2))

    def optimizer(params, name):
        projected = {"params": params[:1], "rank": 2, "targets": [name]}
        return GaLoreAdamW([{"params": params[1:]}, projected])

    with pytest.raises(ValueError, match=r"target modules: the checkpoint projects q\.weight.*projects k\.weight"):
        optimizer(second, "k.weight").load_state_dict(optimizer(first, "q.weight").state_dict())
    optimizer(second, "_orig_mod.q.weight").load_state_dict(optimizer(first, "q.weight").state_dict())


def test_a_lazy_schedule_follows_the_gap():
    """It counts from the last refresh, and what has been doubled stays so."""
    assert with_gap(torch.tensor([120, 80, 3]), 40, 10).tolist() == [60, 20, 3]
    assert with_gap(torch.zeros(3, dtype=torch.int64), 40, 10).tolist() == [0, 0, 0]


@each_engine
def test_another_gap_of_a_lazy_run_takes_effect(build):
    options = {"lazy": True, "update_proj_gap": 100}
    with pytest.warns(UserWarning, match=r"update_proj_gap=2 \(so far 100\)"):
        model, optimizer = resumed(build, options | {"update_proj_gap": 2}, cut(build, options))
    train(STACK, model, optimizer, range(CUT, CUT + 4))
    schedules = [state["refresh_schedule"] for state in optimizer.state.values() if "refresh_schedule" in state]
    assert schedules
    assert all(CUT + 4 <= int(schedule[0]) <= CUT + 6 and int(schedule[1]) == 2 for schedule in schedules)
