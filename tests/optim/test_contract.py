"""What torch's test/test_optim.py holds torch's own optimizers to, held against ours.

Rows: every optimizer, with groups without `rank`, with it, and mixed. Columns: the behaviours below.
"""

import copy
import pickle

import pytest
import torch
from optimizer_cases import (
    ADAFACTOR,
    BASE,
    LOW_RANK,
    assert_same,
    contents,
    each_class,
    each_layout,
    make,
    problem,
    saved,
    train,
)
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.subspace import SUBSPACES


def adam_inputs(device, dtype=None):
    return [
        OptimizerInput(params=None, kwargs={}, desc="default"),
        OptimizerInput(params=None, kwargs={"lr": 0.01}, desc="non-default lr"),
        OptimizerInput(params=None, kwargs={"lr": torch.tensor(0.001)}, desc="Tensor lr"),
        OptimizerInput(params=None, kwargs={"weight_decay": 0.1}, desc="nonzero weight_decay"),
        OptimizerInput(params=None, kwargs={"betas": (0.0, 0.0), "eps": 0.1}, desc="no averages"),
        OptimizerInput(params=None, kwargs={"state_dtype": "bfloat16", "seed": 3}, desc="bfloat16 states"),
    ]


def adamw_inputs(device, dtype=None):
    return [*adam_inputs(device), OptimizerInput(params=None, kwargs={"correct_bias": False}, desc="uncorrected")]


def adamw8bit_inputs(device, dtype=None):
    return [*adam_inputs(device), OptimizerInput(params=None, kwargs=BASE[GaLoreAdamW8bit], desc="all in 8 bits")]


def adafactor_inputs(device, dtype=None):
    return [
        OptimizerInput(params=None, kwargs={}, desc="default"),
        OptimizerInput(params=None, kwargs=ADAFACTOR, desc="lr"),
        OptimizerInput(params=None, kwargs={**ADAFACTOR, "lr": torch.tensor(0.001)}, desc="Tensor lr"),
        OptimizerInput(params=None, kwargs={**ADAFACTOR, "weight_decay": 0.1}, desc="nonzero weight_decay"),
        OptimizerInput(params=None, kwargs={**ADAFACTOR, "beta1": 0.9, "clip_threshold": 1.5}, desc="first moment"),
        OptimizerInput(params=None, kwargs={"warmup_init": True, "decay_rate": -0.5}, desc="warm-up"),
        OptimizerInput(params=None, kwargs={"state_dtype": "bfloat16"}, desc="bfloat16 states"),
    ]


SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10),
    "LinearLR and ExponentialLR": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4), lr_scheduler.ExponentialLR(opt, gamma=0.99)]
    ),
    "warm-up, then cosine": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.ConstantLR(opt, factor=0.4, total_iters=4), lr_scheduler.CosineAnnealingLR(opt, T_max=30)],
        milestones=[4],
    ),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.01, total_steps=30, cycle_momentum=False),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.95**epoch),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=2),
}

INFOS = [
    OptimizerInfo(cls, optim_inputs_func=inputs, supported_impls=(), supports_complex=False)
    for cls, inputs in (
        (GaLoreAdamW, adamw_inputs),
        (GaLoreAdamW8bit, adamw8bit_inputs),
        (GaLoreAdafactor, adafactor_inputs),
    )
]


each_input = pytest.mark.parametrize(
    ("cls", "options"),
    [
        pytest.param(info.optim_cls, given.kwargs, id=f"{info.name}-{given.desc}")
        for info in INFOS
        for given in _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info)
    ],
)


# The direction of a step.


@each_layout
@each_input
def test_loss_falls(cls, options, layout):
    task, optimizer = make(cls, layout, options=copy.deepcopy(options))
    before = task.loss().item()
    train(task, optimizer, 20)
    assert task.loss().item() < before


@each_layout
@each_class
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_loss_falls_in_every_dtype(cls, layout, dtype, contiguous):
    task, optimizer = make(cls, layout, dtype, contiguous=contiguous)
    before = task.loss().item()
    train(task, optimizer, 20)
    assert all(param.dtype == dtype and param.isfinite().all() for param in task.params.values())
    assert task.loss().item() < before


@each_class
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_loss_falls_with_a_scheduler(cls, tensor_lr, scheduler):
    options = {**BASE[cls], "lr": torch.tensor(0.01) if tensor_lr else 0.01}
    task, optimizer = make(cls, "mixed", options=options)
    schedule = SCHEDULERS[scheduler](optimizer)
    before = task.loss().item()
    rates = set()
    for _ in range(20):
        loss = task.backward()
        optimizer.step()
        schedule.step(*([loss.item()] if scheduler == "ReduceLROnPlateau" else []))
        rates.add(float(optimizer.param_groups[-1]["lr"]))
    assert task.loss().item() < before
    assert len(rates) > 1 or scheduler == "ReduceLROnPlateau"  # whose rate falls only when the loss stops falling


@each_layout
@each_class
def test_a_scheduled_rate_is_the_rate_of_the_step(cls, layout):
    """A schedule over steps equals a fresh assignment of lr before each step."""
    task, optimizer = make(cls, layout)
    other, manual = make(cls, layout)
    schedule = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for _ in range(4):
        train(task, optimizer, 1)
        for group, mine in zip(optimizer.param_groups, manual.param_groups, strict=True):
            mine["lr"] = group["lr"]
        train(other, manual, 1)
        schedule.step()
    assert_same(task.weights(), other.weights())


@each_class
def test_every_group_has_its_own_lr_and_weight_decay(cls):
    """lr = 0 freezes a group; in another, gradient zero leaves the decay alone: W ← (1 − lr·weight_decay)·W."""
    task = problem("mixed")
    options = {**BASE[cls], "weight_decay": 0.5}
    tall, wide, bias = (task.params[name] for name in ("tall", "wide", "bias"))
    groups = [
        {"params": [tall], "lr": 0.0},
        {"params": [wide], **LOW_RANK, "weight_decay": 0.0},
        {"params": [bias], "lr": 0.25},
    ]
    optimizer = cls(groups, **options)
    before = task.weights()
    task.backward()
    bias.grad.zero_()
    optimizer.step()
    assert_same(tall.detach(), before["tall"])
    assert (wide != before["wide"]).all()
    # 1 − 0.25·0.5 is exact in binary; the product is rounded once.
    assert_same(bias.detach(), before["bias"] * 0.875)


@each_layout
@each_class
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_tensor_lr_equals_float_lr(cls, layout, dims):
    """Bit for bit: 2⁻⁷ is the same number in both."""
    task, optimizer = make(cls, layout, options={**BASE[cls], "lr": 2**-7, "weight_decay": 0.1})
    lr = torch.full((1,) * dims, 2**-7)
    other, tensor = make(cls, layout, options={**BASE[cls], "lr": lr, "weight_decay": 0.1})
    train(task, optimizer, 5)
    train(other, tensor, 5)
    assert_same(task.weights(), other.weights())
    assert isinstance(tensor.param_groups[0]["lr"], torch.Tensor)
    lr.fill_(0.0)  # what a schedule does
    before = other.weights()
    train(other, tensor, 1)
    assert_same(other.weights(), before)


# Steps that do nothing.


@each_layout
@each_class
def test_no_gradient_is_no_step(cls, layout):
    task, optimizer = make(cls, layout, options={**BASE[cls], "weight_decay": 0.1})
    before = task.weights()
    optimizer.step()
    assert_same(task.weights(), before)
    assert len(optimizer.state) == 0


@each_layout
@each_class
def test_a_parameter_without_gradient_is_left_alone(cls, layout):
    task, optimizer = make(cls, layout)
    train(task, optimizer, 2)
    skipped = optimizer.param_groups[0]["params"][0]
    before, state = skipped.detach().clone(), copy.deepcopy(optimizer.state[skipped])
    task.backward()
    skipped.grad = None
    optimizer.step()
    assert_same(skipped.detach(), before)
    assert_same(optimizer.state[skipped], state)


@each_layout
@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_zero_gradients_move_nothing_but_the_decay(cls, layout, dtype, decay):
    task, optimizer = make(cls, layout, dtype, options={**BASE[cls], "weight_decay": decay})
    before = task.weights()
    for _ in range(3):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        if layout == "full rank" or optimizer.state:
            optimizer.step()
        else:  # there is no basis yet, and a zero gradient gives none
            with pytest.warns(UserWarning, match="gradient is zero or not finite"):
                optimizer.step()
    trained = {name for name, param in task.params.items() if param.requires_grad}
    for name, param in task.params.items():
        assert param.isfinite().all()
        if decay and name in trained:
            # Three factors of 1 − 0.01·0.1, each product rounded (stochastically, hence by one spacing, to bfloat16).
            expected = before[name].double() * (1 - 0.001) ** 3
            assert ((param - expected).abs() <= 3 * torch.finfo(dtype).eps * expected.abs()).all()
        else:
            assert_same(param.detach(), before[name])
    assert decay == 0.0 or any((param != before[name]).any() for name, param in task.params.items())


@each_class
def test_empty_parameters_are_allowed(cls):
    """Zero elements, as in torch: nothing to do, and the others step."""
    full, projected, other = Parameter(torch.empty(0)), Parameter(torch.empty(0, 6)), Parameter(torch.ones(3))
    optimizer = cls([{"params": [full, other]}, {"params": [projected], **LOW_RANK}], **BASE[cls])
    for param in (full, projected, other):
        param.grad = torch.ones_like(param)
    optimizer.step()
    cls([full, other], **BASE[cls]).load_state_dict(cls([full, other], **BASE[cls]).state_dict())
    assert (other < 1).all()
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([], **BASE[cls])


@each_class
def test_a_number_is_a_parameter_too(cls):
    """A parameter without dimensions (a learnt temperature) trains at full rank."""
    param = Parameter(torch.tensor(1.0))
    optimizer = cls([param], **BASE[cls])
    param.grad = torch.tensor(2.0)
    optimizer.step()
    assert 0.9 < param.item() < 1.0


@each_layout
@each_class
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(cls, layout, set_to_none):
    task, optimizer = make(cls, layout)
    task.backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
    assert all(grad is None if set_to_none else not grad.any() for grad in grads)
    train(task, optimizer, 1)
    assert len(optimizer.state) == len(grads)


# Saving, loading, copies.


@pytest.mark.parametrize(
    ("layout", "subspace"),
    [("full rank", "svd"), *((layout, name) for layout in ("low rank", "mixed") for name in SUBSPACES)],
)
@each_input
def test_save_and_load_continues_bit_for_bit(cls, options, layout, subspace):
    """Whatever the basis method: its seed is a function of the step, and its start the basis that was saved."""
    changes = {"subspace": subspace, "size": 4}  # large enough for `randomized` to be itself
    task, optimizer = make(cls, layout, torch.bfloat16, options=copy.deepcopy(options), **changes)
    train(task, optimizer, 4)  # the next refresh is at step 6
    other, resumed = make(cls, layout, torch.bfloat16, options=copy.deepcopy(options), seed=1, **changes)
    with torch.no_grad():
        for name, param in other.params.items():
            param.copy_(task.params[name])
    other = other._replace(inputs=task.inputs)
    resumed.load_state_dict(saved(optimizer))
    assert_same(contents(resumed), contents(optimizer))
    train(task, optimizer, 5)
    train(other, resumed, 5)
    assert_same(other.weights(), task.weights())
    assert_same(contents(resumed), contents(optimizer))


@each_layout
@each_class
def test_state_dict_is_deterministic(cls, layout):
    task, optimizer = make(cls, layout)
    train(task, optimizer, 2)
    first = optimizer.state_dict()
    assert_same(first, optimizer.state_dict())
    assert list(first["state"]) == list(range(len(first["state"])))
    again, other = make(cls, layout)
    train(again, other, 2)
    assert_same(other.state_dict(), first)


@each_layout
@each_class
def test_loading_leaves_the_state_dict_alone(cls, layout):
    task, optimizer = make(cls, layout)
    train(task, optimizer, 2)
    given = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(given)
    optimizer.load_state_dict(given)
    assert_same(given, kept)


@each_layout
@each_class
def test_a_number_as_step_loads(cls, layout):
    """torch: a `step` that is a Python number (an older state dict) becomes the tensor that is kept today."""
    task, optimizer = make(cls, layout)
    train(task, optimizer, 4)
    older = copy.deepcopy(optimizer.state_dict())
    for state in older["state"].values():
        state["step"] = int(state["step"])
    resumed = cls(task.groups, **BASE[cls])
    resumed.load_state_dict(older)
    assert_same(contents(resumed), contents(optimizer))


@each_class
@pytest.mark.parametrize("key", ["subspace", "state_dtype", "stochastic_rounding", "seed"])
def test_a_state_dict_from_before_an_option_loads(cls, key):
    """torch: a group saved before the option was there gets its default (`__setstate__`)."""
    task, optimizer = make(cls, "mixed")
    train(task, optimizer, 2)
    older = copy.deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        group.pop(key, None)
    optimizer.load_state_dict(older)
    train(task, optimizer, 2)
    assert all(param.isfinite().all() for param in task.params.values())


@each_class
def test_a_state_dict_of_other_groups_is_refused(cls):
    _, full = make(cls, "full rank")
    _, mixed = make(cls, "mixed")
    with pytest.raises(ValueError, match="different number of parameter groups"):
        full.load_state_dict(mixed.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        cls([Parameter(torch.zeros(2))], **BASE[cls]).load_state_dict(full.state_dict())


@each_layout
@each_class
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_steps_as_the_original(cls, layout, copier):
    task, optimizer = make(cls, layout, torch.bfloat16)
    train(task, optimizer, 2)
    other, twin = copier((task, optimizer))  # in one call: the copied optimizer holds the copied parameters
    assert {name for name in vars(twin) if name[0] != "_"} == {name for name in vars(optimizer) if name[0] != "_"}
    train(task, optimizer, 5)
    train(other, twin, 5)
    assert_same(other.weights(), task.weights())
    assert_same(contents(twin), contents(optimizer))


@each_class
def test_an_optimizer_copied_before_its_first_step_works(cls):
    task, optimizer = copy.deepcopy(make(cls, "mixed"))
    before = task.loss().item()
    train(task, optimizer, 10)
    assert task.loss().item() < before
    assert repr(optimizer).startswith(cls.__name__)


# Hooks.


@each_class
@pytest.mark.parametrize("prepend", [False, True])
def test_state_dict_hooks(cls, prepend):
    def pre_hook(optimizer):
        optimizer.state["test"] = 1

    def post_hook(optimizer, state_dict):
        state_dict["seen"] = state_dict["state"].pop("test", None)

    task, optimizer = make(cls, "mixed")
    train(task, optimizer, 1)
    order = []
    optimizer.register_state_dict_pre_hook(lambda _: order.append("first"))
    optimizer.register_state_dict_pre_hook(lambda _: order.append("second"), prepend=prepend)
    handle = optimizer.register_state_dict_pre_hook(pre_hook)
    assert optimizer.state_dict()["state"]["test"] == 1
    optimizer.register_state_dict_post_hook(post_hook)
    assert optimizer.state_dict()["seen"] == 1
    handle.remove()
    del optimizer.state["test"]
    assert optimizer.state_dict()["seen"] is None
    assert order[:2] == (["second", "first"] if prepend else ["first", "second"])


@each_class
def test_load_state_dict_pre_hooks(cls):
    def halve(optimizer, state_dict):
        state_dict["param_groups"][0]["lr"] = 0.002

    def replace(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.003
        return state_dict

    task, optimizer = make(cls, "mixed")
    train(task, optimizer, 1)
    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.002
    handle = optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.003
    handle.remove()
    optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.002
    train(task, optimizer, 1)


@each_class
def test_load_state_dict_post_hooks(cls):
    """They run once, at the end, when the state is what it will be; and may put things of their own into it."""

    def post_hook(optimizer):
        seen.append(copy.deepcopy({param: optimizer.state[param] for param in task.params.values()}))
        optimizer.state["ran"] = True

    task, optimizer = make(cls, "mixed")
    train(task, optimizer, 2)
    seen = []
    optimizer.register_load_state_dict_post_hook(post_hook)
    expected = copy.deepcopy(optimizer.state_dict())["state"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(seen) == 1
    assert_same(sorted(map(list, seen[0].values())), sorted(map(list, expected.values())))
    for state in seen[0].values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert optimizer.state["ran"] is True


@each_class
def test_step_hooks(cls):
    order = []
    task, optimizer = make(cls, "mixed")
    handles = [
        register_optimizer_step_pre_hook(lambda *_: order.append("global before")),
        optimizer.register_step_pre_hook(lambda *_: order.append("before")),
        optimizer.register_step_post_hook(lambda *_: order.append("after")),
        register_optimizer_step_post_hook(lambda *_: order.append("global after")),
    ]
    task.backward()
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert order == ["global before", "before", "after", "global after"]


@each_class
def test_a_step_pre_hook_may_replace_the_closure(cls):
    _, optimizer = make(cls, "mixed")
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7.0), {}))
    assert optimizer.step(lambda: 3.0) == 7.0


# Closure, groups.


@each_layout
@each_class
@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_closure_runs_with_gradients_and_its_loss_is_returned(cls, layout, outside):
    task, optimizer = make(cls, layout)
    before = task.weights()
    enabled = []

    def closure():
        enabled.append(torch.is_grad_enabled())
        return task.backward()

    with outside():
        loss = optimizer.step(closure)
        assert torch.is_grad_enabled() is (outside is torch.enable_grad)
    assert enabled == [True]
    other, plain = make(cls, layout)
    assert_same(loss, other.backward())
    assert plain.step() is None
    assert_same(task.weights(), other.weights())
    assert (task.params["wide"] != before["wide"]).any()


@each_class
@pytest.mark.parametrize("rank", [None, 2])
def test_a_group_added_later_trains(cls, rank):
    task, optimizer = make(cls, "mixed")
    train(task, optimizer, 2)
    late = Parameter(torch.randn(5, 4))
    optimizer.add_param_group({"params": late, "lr": 0.05, "rank": rank})  # rank None is no rank
    group = optimizer.param_groups[-1]
    assert (group["lr"], group["weight_decay"]) == (0.05, 0.0)
    late.grad = torch.randn(5, 4)
    before = late.detach().clone()
    optimizer.step()
    assert (late != before).all()
    assert ("basis" in optimizer.state[late]) is (rank is not None)
    resumed = cls([*task.groups, {"params": [late], "rank": rank}], **BASE[cls])
    resumed.load_state_dict(saved(optimizer))
    assert_same(contents(resumed), contents(optimizer))


@each_class
def test_a_refused_group_is_not_kept(cls):
    _, optimizer = make(cls, "mixed")
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="only matrices"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(5))], **LOW_RANK})
    with pytest.raises(ValueError, match="rank"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(5, 5))], "rank": 0})
    assert_same(optimizer.state_dict(), before)


@each_class
def test_named_parameters(cls):
    """Names are kept in the groups and in state dicts, and change nothing else."""
    task, optimizer = make(cls, "full rank")
    other = problem("full rank")
    named = cls(list(other.params.items()), **BASE[cls])
    assert named.param_groups[0]["param_names"] == list(other.params)
    train(task, optimizer, 3)
    train(other, named, 3)
    assert_same(task.weights(), other.weights())
    named.load_state_dict(saved(optimizer))  # without names: those of the optimizer stay
    assert named.param_groups[0]["param_names"] == list(other.params)
    optimizer.load_state_dict(saved(named))  # with names: they are taken over
    assert optimizer.param_groups[0]["param_names"] == list(other.params)
    group = {"params": [("late", Parameter(torch.ones(4, 4)))], **LOW_RANK}
    named.add_param_group(group)
    assert named.param_groups[-1]["param_names"] == ["late"]


@each_class
def test_params_may_be_any_iterable(cls):
    task = problem("full rank")
    assert len(cls((param for param in task.params.values()), **BASE[cls]).param_groups[0]["params"]) == 3
    groups = [{"params": (task.params[name] for name in ("tall", "wide")), **LOW_RANK}]
    optimizer = cls(groups, **BASE[cls])
    train(task, optimizer, 1)
    assert len(optimizer.state) == 2


@each_class
def test_defaults_are_not_shared(cls):
    """Neither between instances nor with the groups that were given."""
    given = [{"params": [Parameter(torch.ones(4, 4))], **LOW_RANK}]
    kept = dict(given[0])
    first, second = cls(given, **BASE[cls]), cls([Parameter(torch.ones(4))], **BASE[cls])
    first.param_groups[0]["lr"] = first.defaults["lr"] = 5.0
    first.param_groups[0]["update_proj_gap"] = 7
    third = cls([{"params": [Parameter(torch.ones(4, 4))], "rank": 2}], **BASE[cls])
    assert second.defaults["lr"] == second.param_groups[0]["lr"] == third.param_groups[0]["lr"] == 0.01
    assert third.param_groups[0]["update_proj_gap"] == 200
    assert {key: value for key, value in given[0].items() if key in kept} == kept


@each_class
def test_groups_of_several_dtypes(cls):
    """One optimizer, parameters of four dtypes, each stepping as it would alone (float32 and float64: no key)."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    torch.manual_seed(0)
    start = [torch.randn(8, 5) for _ in dtypes]
    grads = [torch.randn(8, 5) for _ in dtypes]

    def run(chosen):
        params = [Parameter(start[i].to(dtypes[i])) for i in chosen]
        optimizer = cls([{"params": params, **LOW_RANK}], **BASE[cls], stochastic_rounding=False)
        for _ in range(3):
            for i, param in zip(chosen, params, strict=True):
                param.grad = grads[i].to(dtypes[i])
            optimizer.step()
        return [param.detach() for param in params]

    assert_same(run(range(4)), [run([i])[0] for i in range(4)])


# Refusals.


def error_inputs():
    """The malformed arguments, as torch describes its own, for all optimizers and for some."""
    cases = [(cls, error) for cls in BASE for error in get_error_inputs_for_all_optims("cpu", torch.float32)]

    def add(classes, error_type, regex, desc, group=(), **kwargs):
        given = OptimizerInput(params=dict(group) or None, kwargs=kwargs, desc=desc)
        for cls in classes:
            cases.append((cls, ErrorOptimizerInput(given, error_type=error_type, error_regex=regex)))

    every, adam, eight, factor = list(BASE), [GaLoreAdamW, GaLoreAdamW8bit], [GaLoreAdamW8bit], [GaLoreAdafactor]
    nan, inf = float("nan"), float("inf")
    for value in (-0.1, nan, inf, torch.tensor(-1.0), torch.tensor([nan])):
        add(every, ValueError, "learning rate", f"lr {value}", lr=value)
    for value in (-0.1, nan, inf):
        add(every, ValueError, "weight_decay", f"weight_decay {value}", weight_decay=value)
    for value in ("0.1", True, [0.1]):
        add(every, TypeError, "learning rate", f"lr {value!r}", lr=value)
        add(every, TypeError, "weight_decay", f"weight_decay {value!r}", weight_decay=value)
    for value in ("int8", "float8", torch.float16, torch.int8, 32):
        add(every, ValueError, "state_dtype.*float32, bfloat16", f"state_dtype {value!r}", state_dtype=value)
    add(every, ValueError, "seed", "negative seed", seed=-1)
    for value in (1.5, "1", True, None):
        add(every, TypeError, "seed", f"seed {value!r}", seed=value)
    for value in ("yes", 1, None):
        add(every, TypeError, "stochastic_rounding", f"stochastic_rounding {value!r}", stochastic_rounding=value)

    for value in (0, -1):
        add(every, ValueError, "rank", f"rank {value}", {"rank": value})
        add(every, ValueError, "update_proj_gap", f"gap {value}", {"rank": 2, "update_proj_gap": value})
    for value in (1.5, "8", True):
        add(every, TypeError, "rank", f"rank {value!r}", {"rank": value})
        add(every, TypeError, "update_proj_gap", f"gap {value!r}", {"rank": 2, "update_proj_gap": value})
    for value in (-0.25, nan, inf):
        add(every, ValueError, "scale", f"scale {value}", {"rank": 2, "scale": value})
    for value in ("0.25", True):
        add(every, TypeError, "scale", f"scale {value!r}", {"rank": 2, "scale": value})
    sides = "std, reverse_std, right, left, full"
    for value in ("standard", "STD", None, 1):
        add(every, ValueError, f"proj_type.*{sides}", f"proj_type {value!r}", {"rank": 2, "proj_type": value})
        add(every, ValueError, r"subspace.*\bsvd\b", f"subspace {value!r}", {"rank": 2, "subspace": value})

    for betas in ((1.0, 0.0), (-0.1, 0.9), (nan, 0.9)):
        add(adam, ValueError, "beta parameter at index 0", f"betas {betas}", betas=betas)
    for betas in ((0.9, 1.0), (0.9, -0.5), (0.9, inf)):
        add(adam, ValueError, "beta parameter at index 1", f"betas {betas}", betas=betas)
    for betas in (0.9, (0.9,), "0.9,0.99", ("0.9", 0.99), (True, 0.99), None):
        add(adam, TypeError, "beta", f"betas {betas!r}", betas=betas)
    for value in (-1e-8, nan, inf):
        add(adam, ValueError, "epsilon", f"eps {value}", eps=value)
    for value in ("1e-8", True, (1e-30, 1e-3), None):
        add(adam, TypeError, "epsilon", f"eps {value!r}", eps=value)
    add(adam[:1], TypeError, "correct_bias", "correct_bias 'no'", correct_bias="no")
    add(eight, ValueError, "min_8bit_size", "min_8bit_size -1", min_8bit_size=-1)
    add(eight, TypeError, "min_8bit_size", "min_8bit_size '4096'", min_8bit_size="4096")

    for eps in ((-1e-30, 1e-3), (1e-30, nan)):
        add(factor, ValueError, "epsilon", f"eps {eps}", eps=eps)
    for eps in (1e-3, ("a", 1e-3), (1e-30,)):
        add(factor, TypeError, "eps", f"eps {eps!r}", eps=eps)
    for value in (0.0, -1.0, nan):
        add(factor, ValueError, "clip_threshold", f"clip_threshold {value}", clip_threshold=value)
    for value in (0.8, -1.5, nan):
        add(factor, ValueError, "decay_rate", f"decay_rate {value}", decay_rate=value)
    add(factor, TypeError, "decay_rate", "decay_rate '-0.8'", decay_rate="-0.8")
    for value in (1.0, -0.1, nan):
        add(factor, ValueError, "beta1", f"beta1 {value}", beta1=value)
    add(factor, TypeError, "scale_parameter", "scale_parameter 'no'", scale_parameter="no")
    add(factor, TypeError, "relative_step", "relative_step 'no'", relative_step="no", lr=None)
    add(factor, ValueError, "lr", "lr and relative_step", relative_step=True)
    add(factor, ValueError, "lr is required", "no lr", lr=None)
    add(factor, ValueError, "warmup_init", "warmup_init alone", warmup_init=True)
    return [
        pytest.param(cls, error, id=f"{cls.__name__}-{error.optimizer_error_input.desc}".replace("\\", ""))
        for cls, error in cases
    ]


@pytest.mark.parametrize(("cls", "error"), error_inputs())
def test_malformed_arguments_are_refused(cls, error):
    given = error.optimizer_error_input
    params = given.params
    if params is None or isinstance(params, dict):  # a dict: keys of a group
        params = [{"params": [Parameter(torch.ones(4, 4))], **(params or {})}]
    expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expect(error.error_type, match=error.error_regex):
        cls(params, **{**BASE[cls], **given.kwargs})


@each_class
@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_only_matrices_can_be_projected(cls, shape):
    with pytest.raises(ValueError, match=r"shape \(.*only matrices .* and batches"):
        cls([{"params": [Parameter(torch.ones(shape))], **LOW_RANK}], **BASE[cls])


@each_class
@pytest.mark.parametrize("rank", [None, 2])
def test_complex_parameters_are_refused(cls, rank):
    with pytest.raises(ValueError, match="complex"):
        cls([{"params": [Parameter(torch.ones(4, 4, dtype=torch.complex64))], "rank": rank}], **BASE[cls])


@each_class
@pytest.mark.parametrize("rank", [None, 2])
def test_sparse_gradients_are_refused(cls, rank):
    """Before anything is changed: no state is left behind."""
    param = Parameter(torch.ones(5, 4))
    optimizer = cls([{"params": [param], "rank": rank}], **BASE[cls])
    param.grad = torch.eye(5, 4).to_sparse()
    with pytest.raises(RuntimeError, match=f"{cls.__name__} does not support sparse gradients"):
        optimizer.step()
    assert (param == 1).all()
    assert optimizer.state_dict()["state"] == {}


# GradScaler.


@each_layout
@each_class
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_grad_scaler_skips_a_bad_step(cls, layout, bad):
    task, optimizer = make(cls, layout)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(task.loss() * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    step(bad)
    assert scaler.get_scale() == 4.0
    assert len(optimizer.state) == 0  # a first step that was skipped has made no state
    step(1.0)
    weights, state = task.weights(), copy.deepcopy(optimizer.state_dict())
    step(bad)
    assert scaler.get_scale() == 2.0
    assert_same(task.weights(), weights)
    assert_same(optimizer.state_dict(), state)
    before = task.loss().item()
    step(1.0)
    assert task.loss().item() < before


@each_layout
@each_class
def test_grad_scaler_changes_no_bit(cls, layout):
    """Scales are powers of two: scaling up and down again is exact."""
    task, optimizer = make(cls, layout)
    other, plain = make(cls, layout)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale(task.loss()).backward()
        scaler.step(optimizer)
        scaler.update()
    train(other, plain, 4)
    assert_same(task.weights(), other.weights())
