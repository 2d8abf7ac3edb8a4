"""Every basis option of the projected backward: a resume to the bit, the optimizer path, or the formula by hand."""

import copy

import pytest
import torch
from lowrank_cases import (
    EXACT,
    HEADS,
    RANK,
    STACK,
    Case,
    adafactor,
    adamw,
    adamw8bit,
    assert_equal_states,
    assert_same,
    backward,
    bases,
    each_refresh,
    each_side,
    full_gradients,
    inside,
    layer_of,
    on_engine,
    on_optimizer_path,
    regression,
    relative,
    saved,
    stacked,
    torch_adamw,
    train,
    weights,
)
from option_cases import each_wrong_option
from parts import slow
from torch import nn

from hf_galore.lowrank_backward import enable
from references import ldadam_rotate, qgalore_refreshes

# Ranks that are clamped are warned of; here they are wanted.
pytestmark = pytest.mark.filterwarnings("ignore:projected backward:UserWarning")

GAP = 4
BETAS = (0.9, 0.999)

# Resume.

OPTIONS = {
    "randomized": {"subspace": "randomized"},
    "gram": {"subspace": "gram"},
    "random": {"subspace": "random"},
    "late_random": {"subspace": "late_random", "random_from": 5},
    "keep": {"moments": "keep"},
    "align": {"moments": "align"},
    "rotate": {"moments": "rotate"},
    "reset": {"moments": "reset"},
    "source=moment": {"source": "moment"},
    "float32": {"basis_dtype": "float32"},
    "bfloat16": {"basis_dtype": "bfloat16"},
    "int8": {"basis_dtype": "int8"},
    "int4, left": {"basis_dtype": "int4", "proj_type": "left"},
    "equal_state": {"equal_state": True, "rank": 6},
    "stagger": {"stagger": True},
    "lazy": {"lazy": True, "update_proj_gap": 1},
    "shared": {"share_inputs": True, "basis_dtype": "int4", "lazy": True, "source": "moment"},
    "many": {"moments": "reset", "basis_dtype": "int8", "lazy": True, "stagger": True, "equal_state": True, "rank": 6},
}
MAKERS = {"AdamW": adamw, "8-bit AdamW": adamw8bit, "Adafactor": adafactor(), "torch AdamW": torch_adamw}
RESUMED = [
    *((name, "AdamW", torch.float32) for name in OPTIONS),
    *((name, "AdamW", torch.bfloat16) for name in ("align", "source=moment", "shared", "many")),
    *((name, make, torch.float32) for name in ("rotate", "reset", "many") for make in MAKERS if make != "AdamW"),
    *(("shared", "torch AdamW", dtype) for dtype in (torch.float32, torch.bfloat16)),
]


@pytest.mark.parametrize(
    ("how", "options", "make", "dtype"),
    [
        pytest.param(
            how,
            OPTIONS[name],
            MAKERS[make],
            dtype,
            id=f"{how}-{name}-{make}-{dtype}",
            marks=() if how == "streaming" or name in ("random", "rotate", "int8", "stagger") else pytest.mark.slow,
        )
        for name, make, dtype in RESUMED
        for how in ("exact", "streaming")
        if how == "streaming" or not OPTIONS[name].keys() & {"source", "share_inputs"}
    ],
)
def test_resume_is_bit_identical(how, options, make, dtype):
    """From before a refresh and from after one: weights and states are those of the run that went on."""
    options = {"refresh": how, "update_proj_gap": GAP, **options}
    model, optimizer, _ = on_engine(HEADS, dtype, make, **options)
    checkpoints = {}
    for step in range(2 * GAP + 1):
        if step in (1, GAP, GAP + 2):
            checkpoints[step] = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train(HEADS, model, optimizer, [step])
    for stop, checkpoint in checkpoints.items():
        resumed, again, _ = on_engine(HEADS, dtype, make, seed=1, **options)
        resumed.load_state_dict(checkpoint["model"])
        again.load_state_dict(checkpoint["optimizer"])
        assert_equal_states(saved(again.state_dict()), checkpoint["optimizer"])
        train(HEADS, resumed, again, range(stop, 2 * GAP + 1))
        assert_same(weights(resumed), weights(model))
        assert_equal_states(saved(again.state_dict()), saved(optimizer.state_dict()))


KEPT = {
    None: {"basis": torch.float32},
    "float32": {"basis": torch.float32},
    "bfloat16": {"basis": torch.bfloat16},
    "int8": {"basis": torch.int8, "basis_scale": torch.float32},
    "int4": {"basis": torch.uint8, "basis_scale": torch.float32},
}


@pytest.mark.parametrize(
    ("how", "proj_type"),
    [("streaming", "right"), ("exact", "left"), slow("streaming", "left"), slow("exact", "right")],
)
@pytest.mark.parametrize("make", [adamw, torch_adamw])
@pytest.mark.parametrize("basis_dtype", KEPT)
def test_what_is_kept_of_a_basis(how, proj_type, make, basis_dtype):
    """In the state of B: plain tensors, with nothing behind them."""
    model, optimizer, _ = on_engine(
        STACK, make=make, proj_type=proj_type, refresh=how, basis_dtype=basis_dtype, lazy=True, update_proj_gap=2
    )
    train(STACK, model, optimizer, range(3))
    for layer in model.children():
        state = optimizer.state[layer.lowrank_update]
        moments = {"step", "exp_avg", "exp_avg_sq", "basis_steps", "refresh_schedule"}
        assert state.keys() - {"test_matrix"} == moments | KEPT[basis_dtype].keys()
        assert {name: state[name].dtype for name in KEPT[basis_dtype]} == KEPT[basis_dtype]
        rows = layer.weight.shape[1 if proj_type == "right" else 0]
        assert state["basis"].shape == (rows // 2 if basis_dtype == "int4" else rows, RANK)
        for value in state.values():
            assert type(value) is torch.Tensor
            assert value.untyped_storage().nbytes() == value.numel() * value.itemsize


@pytest.mark.parametrize("make", [adamw, torch_adamw])
@pytest.mark.parametrize(("mine", "theirs"), [(None, "int8"), ("int8", None), ("int8", "int4"), ("int4", "bfloat16")])
def test_a_basis_that_is_kept_otherwise_is_refused(make, mine, theirs):
    """Codes are not taken for numbers, nor numbers for codes, and nothing has been loaded then."""
    model, optimizer, _ = on_engine(STACK, make=make, basis_dtype=theirs)
    train(STACK, model, optimizer, range(1))
    other, again, engine = on_engine(STACK, make=make, basis_dtype=mine)
    before = bases(engine)
    with pytest.raises(ValueError, match="basis_dtype"):
        again.load_state_dict(saved(optimizer.state_dict()))
    assert len(again.state) == 0
    assert all(torch.equal(one, basis) for one, basis in zip(bases(engine), before, strict=True))
    train(STACK, other, again, range(1))


# Exact refreshes do what those of the optimizer path do.


def tiny_eps(groups):
    """torch adds eps elsewhere: without it the two rules are one."""
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-300)


EQUAL = {
    "align": {"moments": "align"},
    "rotate": {"moments": "rotate"},
    "reset": {"moments": "reset"},
    "float32": {"basis_dtype": "float32"},
    "bfloat16": {"basis_dtype": "bfloat16"},
    "int8": {"basis_dtype": "int8"},
    "int4": {"basis_dtype": "int4"},
    "rotate, int8": {"moments": "rotate", "basis_dtype": "int8"},
    "align, int4": {"moments": "align", "basis_dtype": "int4"},
    "equal_state": {"equal_state": True, "rank": 6},
    "lazy": {"lazy": True, "update_proj_gap": 1},
    "lazy, int4": {"lazy": True, "update_proj_gap": 1, "basis_dtype": "int4", "moments": "reset"},
}
RULES = {
    "AdamW": (adamw, adamw),
    "torch AdamW": (tiny_eps, lambda groups: adamw(groups, eps=1e-300)),
    "Adafactor": (adafactor(beta1=0.9), adafactor(beta1=0.9)),
}


@each_side
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        *(pytest.param(options, "AdamW", id=f"{name}-AdamW") for name, options in EQUAL.items()),
        *(pytest.param(EQUAL[name], rule, id=f"{name}-{rule}") for name in ("rotate", "reset") for rule in RULES),
    ],
)
def test_an_exact_refresh_is_that_of_the_optimizer_path(proj_type, options, rule):
    """Weights over 20 steps; a code that a rounding flips would show as 1e-3, and none is near enough to a tie."""
    make, reference = RULES[rule]
    options = {"update_proj_gap": 3, **options}
    plain, optimizer = on_optimizer_path(STACK, make=reference, proj_type=proj_type, **options)
    start = weights(plain)
    train(STACK, plain, optimizer, range(20))
    mine, optimizer, _ = on_engine(STACK, torch.float64, make, proj_type=proj_type, refresh="exact", **options)
    train(STACK, mine, optimizer, range(20))
    assert relative(weights(mine), weights(plain)) <= EXACT
    assert relative(weights(plain), start) > 0.01


def test_options_of_what_is_not_swapped_reach_the_optimizer():
    """The group with `rank`, for targets that stay with the optimizer, has them all."""
    options = {"moments": "reset", "basis_dtype": "int8", "lazy": True, "equal_state": True, "subspace": "randomized"}
    model = STACK.model()
    engine = enable(model, rank=RANK, **options)
    engine.unswapped = {"wide.bias"}
    groups = engine.param_groups(model)
    (group,) = [group for group in groups if "rank" in group]
    assert {name: group[name] for name in options} == options


# Moments in streaming refreshes, which move them after the step.


@each_side
@pytest.mark.parametrize("make", [adamw, torch_adamw])
@pytest.mark.parametrize("basis_dtype", [None, "int8"])
def test_rotate_is_ldadams(proj_type, make, basis_dtype):
    """By hand from the moments of a run that keeps them, which is the same run until the first refresh is over."""
    options = {"proj_type": proj_type, "basis_dtype": basis_dtype}
    kept, turned = (
        on_engine(STACK, torch.float64, make, moments=moments, **options) for moments in ("keep", "rotate")
    )
    old = bases(turned[2])
    for model, optimizer, _ in (kept, turned):
        train(STACK, model, optimizer, range(1))
    assert_same(weights(turned[0]), weights(kept[0]))
    flip = (lambda value: value.mT) if proj_type == "right" else (lambda value: value)
    for twin, layer, before in zip(kept[2].layers.values(), turned[2].layers.values(), old, strict=True):
        was, state = kept[1].state[twin.update], turned[1].state[layer.update]
        m, v = ldadam_rotate(flip(was["exp_avg"]), flip(was["exp_avg_sq"]), layer.basis.matrix, before, 1, BETAS)
        torch.testing.assert_close(flip(state["exp_avg"]), m, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(flip(state["exp_avg_sq"]), v, rtol=1e-9, atol=1e-14)
        assert float(state["step"]) == 1.0


@each_side
@pytest.mark.parametrize("make", [adamw, torch_adamw])
def test_reset_is_a_fresh_start(make, proj_type):
    """After the refresh of step 3 the moments are zero; the step after it is Adam's first, with R in the new basis."""
    model, optimizer, engine = on_engine(
        STACK, torch.float64, make, weight_decay=0.0, proj_type=proj_type, moments="reset", update_proj_gap=3
    )
    train(STACK, model, optimizer, range(4))
    for layer in engine.layers.values():
        state = optimizer.state[layer.update]
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
        assert float(state["step"]) == (0.0 if make is torch_adamw else 4.0)
        assert make is torch_adamw or float(state["reset_step"]) == 4.0
    before, full = weights(model), full_gradients(STACK, model, [4])
    old = {name: layer_of(engine, module).basis.matrix for name, module in model.named_children()}
    train(STACK, model, optimizer, [4])
    eps = 1e-8 if make is torch_adamw else 1e-6 / (1 - BETAS[1]) ** 0.5  # where ours stands, before the correction
    for name, basis in old.items():
        grad = full[f"{name}.weight"]
        low = grad @ basis if proj_type == "right" else basis.T @ grad
        update = low / (low.abs() + eps)
        update = update @ basis.T if proj_type == "right" else basis @ update
        expected = before[f"{name}.weight"] - 1e-2 * 0.25 * update
        torch.testing.assert_close(model.get_submodule(name).weight.detach(), expected, rtol=0, atol=1e-11)


@each_side
def test_align_turns_no_direction_round(proj_type):
    """The bases of `keep` up to signs, in streaming refreshes too."""
    twins = [
        on_engine(STACK, torch.float64, proj_type=proj_type, moments=moments, update_proj_gap=3)
        for moments in ("keep", "align")
    ]
    flips = 0
    for step in range(4):
        old = bases(twins[1][2])
        for model, optimizer, _ in twins:
            train(STACK, model, optimizer, [step])
        if step == 0:
            for kept, aligned in zip(bases(twins[0][2]), bases(twins[1][2]), strict=True):
                assert torch.equal(aligned.abs(), kept.abs())
                flips += int((aligned * kept).sum(0).lt(0).sum())
        for aligned, before in zip(bases(twins[1][2]), old, strict=True):
            assert ((aligned * before).sum(0) >= 0).all()
    assert flips > 0


# What a basis is made of.


def aligned(one, other):
    """The smallest |cosine| between the columns of two matrices, one by one."""
    return (one * other).sum(0).abs().min().item()


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e3], ids=["not clipped", "clipped", "unscaled"])
@pytest.mark.parametrize("make", [adamw, torch_adamw])
@pytest.mark.parametrize(
    ("proj_type", "options"),
    [
        ("right", {}),
        ("left", {}),
        ("left", {"moments": "keep", "fold_every": 2}),
        ("right", {"share_inputs": True}),
        ("right", {"basis_dtype": "bfloat16", "moments": "reset"}),
    ],
    ids=str,
)
def test_the_sketch_of_the_first_moment(proj_type, options, make, factor):
    """The left singular vectors of [(1 − β)·c·G + β·back(M)]ᵀ U, where the gradients are multiplied by c on the way.

    M is as it was before the step; on the left all of it is transposed. Singular vectors are as sharp as the gaps of
    the singular values: 1e-9 leaves seven digits for those. bfloat16 rounds a basis by 2⁻⁹ of its entries.
    """
    rough = options.get("basis_dtype") == "bfloat16"
    case = HEADS if "share_inputs" in options else STACK
    model, optimizer, engine = on_engine(
        case, torch.float64, make, proj_type=proj_type, source="moment", update_proj_gap=3, **options
    )
    turn = (lambda value: value) if proj_type == "right" else (lambda value: value.T)
    for step in range(7):
        grads = stacked(engine, model, full_gradients(case, model, [step], 2))
        expected = {}
        for basis, grad in grads.items() if step % 3 == 0 else ():
            test = torch.cat([layer.test_matrix for layer in basis.layers])
            moments = [optimizer.state.get(layer.update, {}).get("exp_avg") for layer in basis.layers]
            mixed = (1 - BETAS[0]) * factor * turn(grad)
            if step:
                mixed = mixed + BETAS[0] * torch.cat([turn(m) for m in moments]) @ basis.matrix.double().T
            expected[basis] = torch.linalg.svd(mixed.T @ test, full_matrices=False)[0]
        optimizer.zero_grad()
        backward(case, model, step, 2)
        for layer in engine.layers.values():
            layer.update.grad.mul_(factor)
        optimizer.step()
        for basis, byhand in expected.items():
            assert aligned(basis.matrix, byhand) > 1 - (1e-2 if rough else 1e-9)


def test_late_random_by_refreshes():
    """Refreshes in steps 0, 3 and 6, which hold from there, or streaming ones a step later. Step 4 is to be random."""
    for how, late in (("exact", [False, False, True]), ("streaming", [False, True, True])):
        runs = {}
        for subspace in ("late_random", "randomized", "random"):
            random_from = 4 if subspace == "late_random" else None
            options = {"subspace": subspace, "random_from": random_from, "moments": "rotate"}
            model, optimizer, engine = on_engine(STACK, refresh=how, update_proj_gap=3, **options)
            runs[subspace] = []
            for step in range(7):
                train(STACK, model, optimizer, [step])
                if step % 3 == 0:
                    runs[subspace].append((weights(model), bases(engine)))
        for number, is_random in enumerate(late):
            mine, other = (runs[name][number] for name in ("late_random", "random" if is_random else "randomized"))
            assert all(torch.equal(one, two) for one, two in zip(mine[1], other[1], strict=True))
            if not is_random:
                assert_same(mine[0], other[0])


@each_refresh
def test_random_bases_differ_between_layers_steps_and_seeds(how):
    found = []
    for seed in (0, 1):
        model = Case(lambda: nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 20)), regression).model()
        engine = enable(model, rank=3, update_proj_gap=2, refresh=how, subspace="random", seed=seed, stagger=False)
        optimizer = adamw(engine.param_groups(model))
        engine.attach(optimizer)
        for step in range(3):
            train(STACK, model, optimizer, [step])
            if step % 2 == 0:
                found += [tuple(basis.flatten().tolist()) for basis in bases(engine)]
    assert len(set(found)) == 8


# When refreshes come.


@each_refresh
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("basis_dtype", [None, "int8"])
def test_lazy_refreshes(how, stagger, basis_dtype):
    """Against Q-GaLore's rule on the similarities of the bases that were seen: those of one batch, again and again.

    The first basis of all is random, and does not count as one to be similar to.
    """
    gap = 2
    model, optimizer, engine = on_engine(
        STACK,
        make=lambda groups: adamw(groups, lr=1e-4),
        refresh=how,
        update_proj_gap=gap,
        lazy=True,
        stagger=stagger,
        basis_dtype=basis_dtype,
    )
    steps, seen = {basis: [] for basis in engine.bases}, {basis: [] for basis in engine.bases}
    found = set()
    engine.observe = lambda update, _: found.add(update)
    for step in range(40):
        found.clear()
        optimizer.zero_grad()
        backward(STACK, model, 0)
        optimizer.step()
        for basis in engine.bases:
            if basis.layers[0].update in found:
                steps[basis].append(step)
                seen[basis].append(basis.matrix.clone())
    for index, basis in enumerate(engine.bases):
        pairs = zip(seen[basis], seen[basis][1:], strict=False)
        cosines = [(new * old).sum(0).abs() / new.norm(dim=0) / old.norm(dim=0) for old, new in pairs]
        similar = [float(cosine.mean()) >= 0.4 for cosine in cosines]
        early = index * gap // 3 if stagger else 0
        first = early if how == "streaming" else 0
        assert steps[basis] == qgalore_refreshes(gap, early, similar, first)
        assert len(steps[basis]) < 20  # it has become lazy


@each_refresh
def test_a_layer_that_turns_is_refreshed_as_without_lazy(how, monkeypatch):
    monkeypatch.setattr("hf_galore.schedule._SIMILAR", 2.0)  # more than any cosine
    runs = []
    for lazy in (False, True):
        model, optimizer, engine = on_engine(STACK, refresh=how, update_proj_gap=3, lazy=lazy, stagger=True)
        train(STACK, model, optimizer, range(12))
        runs.append((weights(model), engine))
    assert_same(runs[1][0], runs[0][0])


def test_the_first_refresh_is_similar_to_nothing():
    """Not to the random basis before it, which in a layer as small as these it might be by chance."""
    case = Case(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))), lambda model, x: model(x[..., :4]).sum())
    model, optimizer, engine = on_engine(case, refresh="exact", update_proj_gap=3, lazy=True)
    train(case, model, optimizer, range(1))
    schedules = [optimizer.state[update]["refresh_schedule"].tolist() for update in engine.layers]
    assert schedules == [[3, 3, 0]] * 6


# The rank of equal_state.


@each_side
def test_equal_state(proj_type):
    """(12, 20) on the right: 6·(2·20 + 12) = 312 elements at rank 6 of std, 44 for each rank here, so 7."""
    model, _, engine = on_engine(STACK, proj_type=proj_type, equal_state=True, rank=6)
    shapes = {name: layer_of(engine, module).update.shape for name, module in model.named_children()}
    if proj_type == "right":
        assert shapes == {"wide": (12, 7), "square": (12, 6), "tall": (20, 6)}
    else:
        assert shapes == {"wide": (6, 20), "square": (6, 12), "tall": (6, 12)}
    assert [tuple(basis.matrix.shape) for basis in engine.bases] == [
        (layer.weight.shape[1 if proj_type == "right" else 0], layer.rank) for layer in engine.layers.values()
    ]


# Refusals.


@each_wrong_option
def test_a_wrong_option_is_refused_before_anything_changes(options, kind, regex):
    """The model stays what it was, also if it was enabled before."""
    model = STACK.model()
    for enabled in (False, True):
        if enabled:
            enable(model, rank=RANK)
        before = copy.copy(vars(model)), [inside(module) for module in model.modules()]
        with pytest.raises(kind, match=regex):
            enable(model, rank=RANK, **options)
        assert (vars(model), [inside(module) for module in model.modules()]) == before


def test_source_moment_needs_a_sketch():
    with pytest.raises(ValueError, match="source='moment' needs refresh='streaming'"):
        enable(STACK.model(), rank=RANK, source="moment", refresh="exact")


@pytest.mark.parametrize(
    "make",
    [adafactor(), adafactor(beta1=0.9), lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9)],
    ids=["Adafactor", "Adafactor, beta1", "SGD"],
)
def test_source_moment_needs_an_average_of_gradients(make):
    """Said before any hook is on the optimizer, or any B has given up its storage."""
    model = STACK.model()
    engine = enable(model, rank=RANK, source="moment")
    optimizer = make(engine.param_groups(model))
    with pytest.raises(ValueError, match=r"source='moment': .* keeps no average of the gradients; use source='gradi"):
        engine.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert all(layer.update.is_contiguous() and not layer.attached for layer in engine.layers.values())
