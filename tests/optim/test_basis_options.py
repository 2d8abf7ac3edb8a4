"""Every basis option: what stands in the state, a resume to the bit, when refreshes come, and what is refused."""

import math

import pytest
import torch
from basis_cases import GAP, ROWS, WITH_MOMENTS, Row, basis_of, each_row, projected, record, started, steps_of
from optimizer_cases import BASE, assert_same, contents, each_class, saved, train
from option_cases import each_wrong_option
from parts import slow
from torch.nn import Parameter

from hf_galore import GaLoreAdafactor, GaLoreAdamW

MOMENTS = {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_absmax", "exp_avg_sq_absmax"}
HOST = {"step", "basis_seed", "refresh_schedule", "reset_step"}  # numbers that the host reads in every step

# The state.


@each_row
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, "bfloat16"), slow(torch.float64, None), slow(torch.bfloat16, None)],
    ids=str,
)
def test_state_holds_what_it_says_and_nothing_behind_it(cls, row, dtype, state_dtype):
    task, optimizer = started(cls, row, dtype, state_dtype)
    train(task, optimizer, GAP + 1)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    usual = torch.bfloat16 if state_dtype else work
    for param, state, group in projected(optimizer):
        assert set(state) - MOMENTS == {"step", *row.kept}
        for name, value in state.items():
            assert type(value) is torch.Tensor
            assert not value.requires_grad
            assert value.is_contiguous()
            assert value.untyped_storage().nbytes() == value.numel() * value.itemsize, name
            assert name not in HOST or value.device.type == "cpu"
            if name in row.kept:
                assert value.dtype == (row.kept[name] or usual), name
        shapes = {name: value.shape for name, value in state.items()}
        basis = basis_of(optimizer, param)
        assert shapes.get("basis_seed", ()) == shapes.get("reset_step", ()) == shapes["step"] == ()
        assert shapes.get("refresh_schedule", (3,)) == (3,)
        if "basis" in state:
            rows, rank = basis.shape
            assert shapes["basis"] == (math.ceil(rows / 2) if group["basis_dtype"] == "int4" else rows, rank)
            assert shapes.get("basis_scale", (math.ceil(rows * rank / 128),)) == (math.ceil(rows * rank / 128),)


# Resume.


@each_row
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16], ids=str)
def test_resume_is_bit_identical(cls, row, dtype):
    """From a step before a refresh and from one after it: weights and states are those of the run that went on."""
    steps = 3 * GAP
    task, optimizer = started(cls, row, dtype)
    checkpoints = {}
    for step in range(steps):
        if step in (GAP, GAP + 2):
            checkpoints[step] = task.weights(), saved(optimizer)
        train(task, optimizer, 1)
    for step, (weights, state) in checkpoints.items():
        other, resumed = started(cls, row, dtype, seed=1)
        other = other._replace(inputs=task.inputs)
        with torch.no_grad():
            for name, param in other.params.items():
                param.copy_(weights[name])
        resumed.load_state_dict(state)
        assert_same(contents(resumed)["state"], state["state"])
        train(other, resumed, steps - step)
        assert_same(other.weights(), task.weights())
        assert_same(contents(resumed), contents(optimizer))


@pytest.mark.parametrize("key", ["moments", "source", "basis_dtype", "random_from", "equal_state", "stagger", "lazy"])
@each_class
def test_a_state_dict_from_before_an_option_loads(cls, key):
    task, optimizer = started(cls, ROWS["default"])
    train(task, optimizer, 2)
    older = saved(optimizer)
    for group in older["param_groups"]:
        group.pop(key)
    other, resumed = started(cls, ROWS["default"])
    with torch.no_grad():
        for name, param in other.params.items():
            param.copy_(task.params[name])
    resumed.load_state_dict(older)
    train(task, optimizer, GAP)
    train(other, resumed, GAP)
    assert_same(other.weights(), task.weights())


# Random bases.


@each_class
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"proj_type": "full"}, {"moments": "rotate"}, {"moments": "reset"}], ids=str)
def test_a_seed_is_as_good_as_the_basis(cls, dtype, options):
    """The run with bases kept in float32, bit for bit, and without a basis in the state."""
    runs = []
    for basis_dtype in (None, "float32"):
        task, optimizer = started(cls, Row({"subspace": "random", **options}, {}), dtype, basis_dtype=basis_dtype)
        train(task, optimizer, 2 * GAP + 1)
        runs.append(task.weights())
        for param, state, _ in projected(optimizer):
            assert ("basis" in state) is (basis_dtype is not None)
            assert ("basis_seed" in state) is (basis_dtype is None)
            runs.append(basis_of(optimizer, param))
    assert_same(runs[: len(runs) // 2], runs[len(runs) // 2 :])


@each_class
def test_random_bases_differ_between_matrices_steps_and_seeds(cls):
    found = []
    for seed in (0, 1):
        params = [Parameter(torch.zeros(12, 8)) for _ in range(2)]
        groups = [{"params": [param], "rank": 2, "update_proj_gap": 2, "subspace": "random"} for param in params]
        optimizer = cls(groups, **BASE[cls], seed=seed)
        for _ in range(3):
            for param in params:
                param.grad = torch.ones(12, 8)
            optimizer.step()
            found += [tuple(basis_of(optimizer, param).flatten().tolist()) for param in params]
    assert len(set(found)) == 2 * 2 * 2  # the second of the three steps is no refresh


@each_class
def test_late_random_is_randomized_and_then_random(cls):
    """Refreshes in steps 0, 4, 8 and 12; the last two are at or after step 5."""

    def run(steps, **options):
        task, optimizer = started(cls, Row(options, {}))
        train(task, optimizer, steps)
        return task.weights(), [basis_of(optimizer, param) for param, *_ in projected(optimizer)]

    late = {"subspace": "late_random", "random_from": 5}
    for steps in (1, 5, 8):
        assert_same(run(steps, **late), run(steps, subspace="randomized"))
    for steps in (9, 13):
        assert_same(run(steps, **late)[1], run(steps, subspace="random")[1])
    assert_same(run(13, subspace="late_random", random_from=0), run(13, subspace="random"))
    assert_same(run(5, subspace="late_random", random_from=4)[1], run(5, subspace="random")[1])


# When refreshes come.


@each_class
@pytest.mark.parametrize("gap", [1, 3, 5])
@pytest.mark.parametrize("stagger", [False, True])
def test_staggered_refreshes(cls, gap, stagger):
    """All in step 0; then matrix i of the L of its group in the steps ≡ −⌊i·T/L⌋ (mod T)."""
    sizes = (3, 2)
    groups = [
        {
            "params": [Parameter(torch.randn(12, 8)) for _ in range(count)],
            "rank": 2,
            "update_proj_gap": gap,
            "stagger": stagger,
        }
        for count in sizes
    ]
    optimizer = cls(groups, **BASE[cls])
    seen = record(optimizer)
    for _ in range(14):
        for group in groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        optimizer.step()
    for count, group in zip(sizes, groups, strict=True):
        for i, param in enumerate(group["params"]):
            early = i * gap // count if stagger else 0
            assert steps_of(seen, param) == [step for step in range(14) if step == 0 or (step + early) % gap == 0]


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"moments": "rotate"}, {"basis_dtype": "int4"}, {"proj_type": "full"}], ids=str
)
@each_class
def test_lazy_refreshes(cls, options, stagger):
    """A gradient that stays gives the same basis again, with either sign; random ones give bases that turn."""
    still, moving = (Parameter(torch.zeros(64, 32)) for _ in range(2))
    group = {"params": [moving, still], "rank": 4, "update_proj_gap": 2, "lazy": True, "stagger": stagger, **options}
    optimizer = cls([group], **BASE[cls])
    seen, steady = record(optimizer), torch.randn(64, 32)
    for step in range(40):
        still.grad = steady * (-1) ** step
        moving.grad = torch.randn(64, 32)
        optimizer.step()
    assert steps_of(seen, moving) == list(range(0, 40, 2))
    early = int(stagger)  # matrix 1 of 2: T/2
    assert steps_of(seen, still) == [0, *(step - early for step in (2, 4, 6, 8, 10, 14, 18, 22, 26, 30, 38))]
    assert optimizer.state[still]["refresh_schedule"].tolist() == [46 - early, 8, 1]


def test_a_matrix_without_a_gradient_waits():
    """Its refreshes count its own steps, and its place among the staggered ones stays."""
    params = [Parameter(torch.randn(12, 8)) for _ in range(2)]
    optimizer = GaLoreAdamW([{"params": params, "rank": 2, "update_proj_gap": 4, "stagger": True}])
    seen = record(optimizer)
    for step in range(12):
        params[0].grad = torch.randn(12, 8)
        params[1].grad = torch.randn(12, 8) if step % 2 else None
        optimizer.step()
    assert steps_of(seen, params[0]) == [0, 4, 8]
    assert steps_of(seen, params[1]) == [0, 2]  # of six steps


# Refusals.


@each_wrong_option
@each_class
def test_a_wrong_option_is_refused_before_anything_changes(cls, options, kind, regex):
    group = {"params": [Parameter(torch.ones(4, 4))], "rank": 2, **options}
    with pytest.raises(kind, match=regex):
        cls([group], **WITH_MOMENTS[cls])
    task, optimizer = started(cls, ROWS["default"])
    train(task, optimizer, 1)
    before = contents(optimizer)
    with pytest.raises(kind, match=regex):
        optimizer.add_param_group(group)
    assert_same(contents(optimizer), before)
    train(task, optimizer, 1)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor_has_no_average_of_gradients(beta1):
    """With beta1 it averages its updates."""
    group = {"params": [Parameter(torch.ones(4, 4))], "rank": 2, "source": "moment"}
    with pytest.raises(ValueError, match=r"source='moment': GaLoreAdafactor.*source='gradient'"):
        GaLoreAdafactor([group], **BASE[GaLoreAdafactor], beta1=beta1)
