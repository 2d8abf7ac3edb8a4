"""The projected backward trains as the optimizer path does, in every kind of loop, and refreshes as it says."""

import copy
import math

import pytest
import torch
from lowrank_cases import (
    CASES,
    EXACT,
    RANK,
    STACK,
    Case,
    Experts,
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
    layer_of,
    on_engine,
    on_optimizer_path,
    regression,
    relative,
    saved,
    train,
    weights,
)
from parts import slow
from torch import nn

from hf_galore import GaLoreAdafactor
from hf_galore.lowrank_backward import enable
from hf_galore.subspace import Left, Right, rotate
from references import ldadam_rotate

# Degenerate gradients and layers without one are warned of (tests/integrations holds that); here they are wanted.
pytestmark = pytest.mark.filterwarnings("ignore:projected backward:UserWarning")

K = 4
STEPS = 30

# Equality with the optimizer path: the same models, data and rules; 30 steps, 5 refreshes, weight decay.


# The side is looked at by the layers alone, which are nn.Linear's but for GPT-2's.
@pytest.mark.parametrize(
    ("case", "proj_type"),
    [
        pytest.param(
            case,
            side,
            id=f"{name}-{side}",
            marks=() if side == "right" or name in ("linear", "gpt2", "ternary, normed") else pytest.mark.slow,
        )
        for name, case in CASES.items()
        for side in ("right", "left")
    ],
)
class TestEqualsTheOptimizerPath:
    @pytest.mark.parametrize("micro_batches", [slow(1), 2])
    def test_float64(self, case, proj_type, micro_batches):
        plain, optimizer = on_optimizer_path(case, proj_type=proj_type)
        start = weights(plain)
        train(case, plain, optimizer, range(STEPS), micro_batches=micro_batches)
        mine, optimizer, _ = on_engine(
            case, torch.float64, proj_type=proj_type, refresh="exact", micro_batches=micro_batches
        )
        train(case, mine, optimizer, range(STEPS), micro_batches=micro_batches)
        assert relative(weights(mine), weights(plain)) <= EXACT
        assert relative(weights(plain), start) > 0.01  # there was something to agree on

    def test_float32_rounds_no_worse(self, case, proj_type):
        """Both engines round about as often in a step, so the expected ratio of their errors is 1; K is for luck.

        Where float32 and float64 disagree on the sign of a singular vector the paper's moments make two
        trajectories of it; the optimizer path's own error shows that, and there is nothing to compare there.
        """
        runs = {}
        for dtype in (torch.float64, torch.float32):
            model, optimizer = on_optimizer_path(case, dtype, proj_type=proj_type)
            train(case, model, optimizer, range(STEPS), micro_batches=2)
            runs[dtype] = weights(model)
        own_error = relative(runs[torch.float32], runs[torch.float64])
        if own_error > 1e-5:
            pytest.skip("the optimizer path's float32 run parts from its float64 run by the sign of a singular vector")
        model, optimizer, _ = on_engine(case, torch.float32, proj_type=proj_type, refresh="exact", micro_batches=2)
        train(case, model, optimizer, range(STEPS), micro_batches=2)
        assert relative(weights(model), runs[torch.float64]) <= K * own_error

    @each_refresh
    def test_folding_every_few_steps_changes_nothing(self, case, proj_type, how):
        """5 does not divide the gap of 7: refreshes meet pending updates."""
        runs = []
        for every in (1, 5):
            model, optimizer, _ = on_engine(
                case, torch.float64, proj_type=proj_type, refresh=how, fold_every=every, micro_batches=2
            )
            train(case, model, optimizer, range(STEPS), micro_batches=2)
            runs.append(weights(model))
        assert relative(runs[1], runs[0]) <= EXACT


RULES = {
    # name: (optimizer of the small parameters, the rule of the optimizer path)
    "torch AdamW": (
        # eps stands on the other side of the bias correction in torch: without eps the two rules are one.
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, eps=1e-300),
        lambda groups: adamw(groups, eps=1e-300),
    ),
    "torch AdamW, foreach": (
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, eps=1e-300, foreach=True),
        lambda groups: adamw(groups, eps=1e-300),
    ),
    "tensor lr": (lambda groups: adamw(groups, lr=torch.tensor(0.01, dtype=torch.float64)), adamw),
    "Adafactor": (adafactor(), adafactor()),
    "Adafactor, beta1": (adafactor(beta1=0.9), adafactor(beta1=0.9)),
    "Adafactor, relative step": (adafactor(lr=None, relative_step=True), adafactor(lr=None, relative_step=True)),
}


@pytest.mark.parametrize("fold_every", [slow(1), 5])
@pytest.mark.parametrize(("make", "reference"), RULES.values(), ids=RULES)
def test_every_rule_equals_the_optimizer_path(make, reference, fold_every):
    plain, optimizer = on_optimizer_path(STACK, make=reference)
    train(STACK, plain, optimizer, range(STEPS), micro_batches=2)
    mine, optimizer, _ = on_engine(
        STACK, torch.float64, make=make, refresh="exact", fold_every=fold_every, micro_batches=2
    )
    train(STACK, mine, optimizer, range(STEPS), micro_batches=2)
    assert relative(weights(mine), weights(plain)) <= EXACT


def test_eight_bit_moments_stay_close_to_the_optimizer_path():
    """Codes flip where float32 roundings differ: a flip moves a moment by a step of the code book, 1-2 % of it.

    So the two are held to a tenth of what training moved, and to a tenth of what 8 bits themselves cost.
    """
    plain, optimizer = on_optimizer_path(STACK, torch.float32, make=adamw8bit)
    start = weights(plain)
    train(STACK, plain, optimizer, range(STEPS))
    mine, optimizer, engine = on_engine(STACK, torch.float32, make=adamw8bit, refresh="exact")
    train(STACK, mine, optimizer, range(STEPS))
    assert optimizer.state[layer_of(engine, mine.wide).update]["exp_avg"].dtype == torch.uint8
    assert relative(weights(mine), weights(plain)) <= 0.1 * relative(weights(plain), start)


@each_refresh
@each_side
def test_bfloat16_weights_train(how, proj_type):
    model, optimizer, _ = on_engine(STACK, torch.bfloat16, proj_type=proj_type, refresh=how, weight_decay=0.0)
    first = STACK.loss(model, STACK.batch(0, 64).bfloat16()).item()
    train(STACK, model, optimizer, range(60))
    assert STACK.loss(model, STACK.batch(0, 64).bfloat16()).item() < 0.97 * first
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


# The steps of a loop: accumulation, clipping, GradScaler.


@each_refresh
def test_accumulation_equals_one_batch(how):
    runs = []
    for micro_batches in (1, 8):
        model, optimizer, _ = on_engine(STACK, torch.float64, refresh=how, micro_batches=micro_batches)
        train(STACK, model, optimizer, range(15), micro_batches=micro_batches, rows=8)
        runs.append(weights(model))
    assert relative(runs[1], runs[0]) <= EXACT


@each_side
def test_the_clipping_norm_is_that_of_the_projected_gradients(proj_type):
    model, _, engine = on_engine(STACK, torch.float64, proj_type=proj_type)
    full = full_gradients(STACK, model, [0])
    backward(STACK, model, 0)
    squares = 0.0
    for name, grad in full.items():
        if name.endswith("weight"):
            basis = layer_of(engine, model.get_submodule(name.removesuffix(".weight"))).basis.matrix
            grad = grad @ basis if proj_type == "right" else basis.mT @ grad
        squares += 0.0 if grad is None else grad.square().sum().item()
    norm = nn.utils.clip_grad_norm_(engine.parameters(model), 1e-3)
    assert norm.item() == pytest.approx(math.sqrt(squares), rel=EXACT)
    clipped = torch.cat([param.grad.flatten() for param in engine.parameters(model) if param.grad is not None])
    assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-2)  # torch adds 1e-6 to the norm


@each_refresh
@pytest.mark.parametrize("bad_step", [0, 2, 4, 5], ids=["first", "between", "refresh", "after a refresh"])
@pytest.mark.parametrize("to_none", [True, slow(False)], ids=["gradients to None", "gradients to zero"])
def test_grad_scaler_skips_a_bad_step(how, bad_step, to_none):
    """Scales are powers of two, so that the run with a skipped step equals one that never tried it, bit for bit."""
    steps = 7
    plain, optimizer, _ = on_engine(STACK, refresh=how, update_proj_gap=4)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=to_none)
        backward(STACK, plain, step)
        optimizer.step()

    model, optimizer, engine = on_engine(STACK, refresh=how, update_proj_gap=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(steps):
        if step == bad_step:
            before = weights(model), bases(engine), saved(optimizer.state_dict())
            optimizer.zero_grad(set_to_none=to_none)
            scaler.scale(STACK.loss(model, STACK.batch(99)) * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 512.0
            assert_same(weights(model), before[0])
            assert all(torch.equal(one, other) for one, other in zip(bases(engine), before[1], strict=True))
            assert_equal_states(saved(optimizer.state_dict()), before[2])
        optimizer.zero_grad(set_to_none=to_none)
        backward(STACK, model, step, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert_same(weights(model), weights(plain))


@each_refresh
def test_gradients_that_are_thrown_away_leave_no_trace(how):
    """A backward pass without a step, then zero_grad in either manner."""
    runs = []
    for to_none in (None, True, False):
        model, optimizer, _ = on_engine(STACK, refresh=how, update_proj_gap=3)
        for step in range(5):
            if to_none is not None:
                backward(STACK, model, 50 + step)
            optimizer.zero_grad(set_to_none=to_none is not False)
            backward(STACK, model, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none is not False)
        runs.append(weights(model))
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


# Refreshes.


def aligned(one, other):
    """The smallest |cosine| between the columns of two matrices, one by one."""
    return (one * other).sum(0).abs().min().item()


@each_side
def test_a_streaming_basis_is_the_sketchs_and_holds_from_the_next_step(proj_type):
    """Z = Gᵀ U (right) or G U (left) by hand from autograd's G over two micro-batches, at the first two refreshes.

    Singular vectors are as sharp as the gaps of the singular values: 1e-9 leaves seven digits for those.
    """
    model, optimizer, engine = on_engine(
        STACK, torch.float64, proj_type=proj_type, refresh="streaming", moments="keep", update_proj_gap=3
    )
    for step in range(5):
        full = full_gradients(STACK, model, [step], micro_batches=2)
        old = {name: layer_of(engine, module) for name, module in model.named_children()}
        old = {name: (layer.basis.matrix.clone(), layer.test_matrix, layer) for name, layer in old.items()}
        optimizer.zero_grad()
        backward(STACK, model, step, micro_batches=2)
        for name, (basis, _, layer) in old.items():
            grad = full[f"{name}.weight"]
            byhand = grad @ basis if proj_type == "right" else basis.mT @ grad
            torch.testing.assert_close(layer.update.grad, byhand, rtol=0, atol=EXACT)
        optimizer.step()
        for name, (basis, test, layer) in old.items():
            if step % 3 == 0:
                grad = full[f"{name}.weight"]
                sketch = grad.mT @ test if proj_type == "right" else grad @ test
                assert aligned(layer.basis.matrix, torch.linalg.svd(sketch, full_matrices=False)[0]) > 1 - 1e-9
            else:
                assert torch.equal(layer.basis.matrix, basis)
            if step == 2:  # the next step refreshes: U spans the columns (rows, on the left) of the first moment
                moment = optimizer.state[layer.update]["exp_avg"]
                u = torch.linalg.svd(moment if proj_type == "right" else moment.mT, full_matrices=False)[0]
                assert aligned(layer.test_matrix, u) > 1 - 1e-9


@each_side
def test_a_streaming_basis_captures_a_low_rank_gradient(proj_type):
    """Two tokens: gradients of rank 2 <= RANK are captured whole, whatever U is (it is random here)."""
    model, optimizer, engine = on_engine(STACK, torch.float64, proj_type=proj_type)
    x = torch.randn(2, 20, dtype=torch.float64)
    regression(model, x).backward()
    plain = copy.deepcopy(STACK.model(torch.float64))
    regression(plain, x).backward()
    optimizer.step()
    for name, module in model.named_children():
        grad, basis = plain.get_submodule(name).weight.grad, layer_of(engine, module).basis.matrix
        captured = grad @ basis if proj_type == "right" else basis.mT @ grad
        assert (captured.norm() / grad.norm()).item() == pytest.approx(1.0, abs=1e-10)
        gram = basis.mT @ basis
        torch.testing.assert_close(gram, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=EXACT)


@each_side
@each_refresh
def test_a_bad_gradient_in_a_refresh_step_keeps_the_basis(how, proj_type):
    model, optimizer, engine = on_engine(STACK, refresh=how, update_proj_gap=2, proj_type=proj_type)
    train(STACK, model, optimizer, range(2))
    before = bases(engine)
    optimizer.zero_grad()
    (STACK.loss(model, STACK.batch(2)) * float("nan")).backward()
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(bases(engine), before, strict=True))


@each_side
def test_a_refresh_moves_the_moments_as_ldadam_does(proj_type):
    """Two runs that are one until the refresh of the first step, which moves the moments in one of them."""
    kept, rotated = (
        on_engine(STACK, torch.float64, proj_type=proj_type, moments=moments) for moments in ("keep", "rotate")
    )
    old = bases(rotated[2])
    for model, optimizer, _ in (kept, rotated):
        train(STACK, model, optimizer, range(1))
    assert_same(weights(kept[0]), weights(rotated[0]))
    for q_old, layer, twin in zip(old, rotated[2].layers.values(), kept[2].layers.values(), strict=True):
        before, after = kept[1].state[twin.update], rotated[1].state[layer.update]
        flip = (lambda t: t.mT) if proj_type == "right" else (lambda t: t)
        byhand = ldadam_rotate(
            flip(before["exp_avg"]), flip(before["exp_avg_sq"]), layer.basis.matrix, q_old, 1, (0.9, 0.999)
        )
        for name, value in zip(("exp_avg", "exp_avg_sq"), byhand, strict=True):
            torch.testing.assert_close(flip(after[name]), value, rtol=1e-9, atol=1e-15)
            assert not torch.allclose(after[name], before[name], rtol=1e-2, atol=0)


@pytest.mark.parametrize("side", [Right(), Left()], ids=["right", "left"])
class TestRotate:
    def moments(self, side):
        mean = torch.randn(9, 3, dtype=torch.float64)
        square = mean.square() + torch.rand(9, 3, dtype=torch.float64)
        flip = (lambda t: t) if isinstance(side, Right) else (lambda t: t.mT.contiguous())
        return {"exp_avg": flip(mean), "exp_avg_sq": flip(square)}

    def orthonormal(self):
        return torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64))[0]

    @pytest.mark.parametrize("t", [1, 2, 500])
    def test_is_ldadams(self, side, t):
        moments, old, new, betas = self.moments(side), self.orthonormal(), self.orthonormal(), (0.9, 0.95)
        flip = (lambda v: v.mT) if isinstance(side, Right) else (lambda v: v)
        byhand = ldadam_rotate(flip(moments["exp_avg"]), flip(moments["exp_avg_sq"]), new, old, t, betas)
        rotate(moments, new, old, side, *(1 - beta**t for beta in betas))
        for name, value in zip(("exp_avg", "exp_avg_sq"), byhand, strict=True):
            torch.testing.assert_close(flip(moments[name]), value, rtol=1e-9, atol=1e-12)
        assert (moments["exp_avg_sq"] >= 0).all()

    def test_equal_bases_change_nothing(self, side):
        moments = self.moments(side)
        before = {name: value.clone() for name, value in moments.items()}
        same = self.orthonormal()
        rotate(moments, same, same, side, 0.1, 0.001)
        for name, value in before.items():
            torch.testing.assert_close(moments[name], value, rtol=1e-12, atol=1e-12)

    def test_a_swap_of_directions_swaps_the_moments(self, side):
        moments = self.moments(side)
        before = {name: value.clone() for name, value in moments.items()}
        order = [2, 0, 1]
        old = self.orthonormal()
        rotate(moments, old[:, order], old, side, 0.1, 0.001)
        for name, value in before.items():
            swapped = value[:, order] if isinstance(side, Right) else value[order]
            torch.testing.assert_close(moments[name], swapped, rtol=1e-12, atol=1e-12)

    def test_factored_moments(self, side):
        """Adafactor's: the one along the projected dimension is averaged with C², the other kept."""
        row, col = torch.rand(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
        turned, kept = (
            ("exp_avg_sq_col", "exp_avg_sq_row")
            if isinstance(side, Right)
            else (
                "exp_avg_sq_row",
                "exp_avg_sq_col",
            )
        )
        row = row[:3]
        moments = {turned: row.clone(), kept: col.clone()}
        new, old = self.orthonormal(), self.orthonormal()
        rotate(moments, new, old, side)
        torch.testing.assert_close(moments[turned], (new.mT @ old).square() @ row, rtol=1e-12, atol=0)
        assert torch.equal(moments[kept], col)


@each_refresh
@pytest.mark.parametrize("gap", [1, 3, 7])
@pytest.mark.parametrize("stagger", [False, True])
def test_which_layers_refresh_when(how, gap, stagger):
    """Layer i of L = 3 at steps ≡ −⌊i·T/L⌋ (mod T), or all at steps ≡ 0.

    Exact refreshes begin with the first step. Staggered streaming ones begin at step ⌊i·min(T, 16)/L⌋.
    """
    model, optimizer, engine = on_engine(STACK, refresh=how, update_proj_gap=gap, stagger=stagger)
    for step in range(16):
        before = bases(engine)
        train(STACK, model, optimizer, [step])
        moved = [not torch.equal(one, other) for one, other in zip(bases(engine), before, strict=True)]
        firsts = [i * min(gap, 16) // 3 if stagger and how == "streaming" else 0 for i in range(3)]
        earlies = [i * gap // 3 if stagger else 0 for i in range(3)]
        due = [
            step >= first and (step == first or (step + early) % gap == 0)
            for first, early in zip(firsts, earlies, strict=True)
        ]
        assert moved == due, step


@pytest.mark.parametrize(("how", "staggered"), [("streaming", True), ("exact", False)])
def test_streaming_refreshes_are_staggered_unless_told_otherwise(how, staggered):
    assert enable(STACK.model(), rank=RANK, refresh=how).settings.stagger is staggered
    assert enable(STACK.model(), rank=RANK, refresh=how, stagger=not staggered).settings.stagger is not staggered


def test_first_refreshes_are_over_after_sixteen_steps():
    """However long the gap and however many the layers."""
    model, optimizer, engine = on_engine(STACK, update_proj_gap=200, stagger=True)
    before, moves = bases(engine), []
    for step in range(18):
        train(STACK, model, optimizer, [step])
        moves.append([not torch.equal(one, other) for one, other in zip(bases(engine), before, strict=True)])
        before = bases(engine)
    assert [step for step, moved in enumerate(moves) if any(moved)] == [0, 5, 10]
    assert all(sum(moved) <= 1 for moved in moves)


def test_a_refresh_rotates_the_momentum_of_sgd():
    """torch's SGD has one first moment, under another name."""
    runs = {}
    for moments in ("keep", "rotate", "reset"):
        model, optimizer, engine = on_engine(
            STACK, torch.float64, lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9), moments=moments
        )
        old = bases(engine)
        train(STACK, model, optimizer, range(1))
        runs[moments] = [
            (optimizer.state[layer.update]["momentum_buffer"], layer.basis.matrix, basis)
            for layer, basis in zip(engine.layers.values(), old, strict=True)
        ]
    for (kept, *_), (turned, new, old), (zero, *_) in zip(*runs.values(), strict=True):
        torch.testing.assert_close(turned, kept @ (new.mT @ old).mT, rtol=1e-12, atol=1e-15)
        assert not zero.any()


# Layers that are used otherwise than once.


def test_a_layer_without_a_gradient_is_left_alone():
    """Its weight, basis and moments stay, it does not decay, and its own refreshes count its own steps."""
    case = Case(Experts, lambda model, x: regression(lambda rows: model(rows, used), x))
    model, optimizer, engine = on_engine(case, update_proj_gap=3)
    used = (0, 2)
    train(case, model, optimizer, range(2))
    idle = layer_of(engine, model.experts[1])
    assert torch.equal(model.experts[1].weight, case.model().experts[1].weight)
    assert idle.update not in optimizer.state
    used = (0, 1, 2)
    train(case, model, optimizer, range(2, 4))
    used = (0,)
    before, basis = weights(model), idle.basis.matrix.clone()
    train(case, model, optimizer, range(4, 9))
    after = weights(model)
    for name in ("experts.1.weight", "experts.2.weight"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["experts.0.weight"], before["experts.0.weight"])
    assert torch.equal(idle.basis.matrix, basis)
    assert idle.basis.steps == optimizer.state[idle.update]["step"] == 2


@each_refresh
def test_idle_layers_as_on_the_optimizer_path(how):
    """In turns with the other two; the optimizer path treats a parameter without a gradient the same way."""
    turns = [(0, 2), (0, 1), (1, 2), (0, 1, 2), (1,)]
    case = Case(Experts, lambda model, x: regression(lambda rows: model(rows, turn), x))
    runs = []
    for fold_every in (1, 4):
        options = {"fold_every": fold_every, "update_proj_gap": 3, "micro_batches": 2}
        model, optimizer, _ = on_engine(case, torch.float64, refresh=how, **options)
        for step in range(20):
            turn = turns[step % 5]
            train(case, model, optimizer, [step], micro_batches=2)
        runs.append(weights(model))
    assert relative(runs[1], runs[0]) <= EXACT
    if how == "exact":
        model, optimizer = on_optimizer_path(case, update_proj_gap=3)
        for step in range(20):
            turn = turns[step % 5]
            train(case, model, optimizer, [step], micro_batches=2)
        assert relative(runs[0], weights(model)) <= EXACT


# What an exact refresh holds.


def test_a_second_backward_pass_in_an_exact_refresh_is_refused():
    """Its full gradients are gone by then; the error comes in the first step, before anything is lost."""
    model, _, _ = on_engine(STACK, refresh="exact")
    backward(STACK, model, 0)
    with pytest.raises(RuntimeError, match="pass gradient_accumulation_steps, or refresh='streaming'"):
        backward(STACK, model, 1)


def test_gradients_that_are_thrown_away_are_no_second_pass():
    runs = []
    for wasted in (False, True):
        model, optimizer, _ = on_engine(STACK, refresh="exact")
        if wasted:
            backward(STACK, model, 99)
            model.zero_grad()
        train(STACK, model, optimizer, range(4))
        runs.append(weights(model))
    assert relative(runs[1], runs[0]) == 0.0


def test_accumulated_full_gradients_are_warned_of_with_their_bytes():
    """Stack in float64: 12·20 + 12·12 + 20·12 elements of 8 bytes are less than a MiB."""
    with pytest.warns(UserWarning, match=r"holds the full gradients of all layers, 0 MiB.*stagger=True"):
        enable(STACK.model(torch.float64), rank=RANK, refresh="exact", gradient_accumulation_steps=2)
    enable(STACK.model(), rank=RANK, refresh="exact", gradient_accumulation_steps=2, stagger=True)


def test_a_rule_that_measures_its_parameter_is_refused():
    model = STACK.model()
    engine = enable(model, rank=RANK)
    optimizer = GaLoreAdafactor(engine.param_groups(model), lr=1e-2, relative_step=False, scale_parameter=True)
    with pytest.raises(ValueError, match="scale_parameter=True"):
        engine.attach(optimizer)


def test_seconds_in_refreshes_are_counted():
    model, optimizer, engine = on_engine(STACK)
    assert engine.refresh_seconds == 0.0
    train(STACK, model, optimizer, range(1))
    once = engine.refresh_seconds
    assert once > 0.0
    train(STACK, model, optimizer, range(1, 3))
    assert engine.refresh_seconds == once  # step 7 is the next
