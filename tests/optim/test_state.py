"""The contract of the optimizers' state: lazy, plain tensors, dtypes that stay, no global random numbers."""

import pytest
import torch
from optimizer_cases import BASE, assert_same, contents, each_class, each_layout, make, problem, saved, train
from torch.utils._python_dispatch import TorchDispatchMode

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, native

PARAM_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MOMENTS = {
    GaLoreAdamW: {"exp_avg", "exp_avg_sq"},
    GaLoreAdamW8bit: {"exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"},
    GaLoreAdafactor: {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
}
WITH_MOMENTS = {cls: {**options, "beta1": 0.9} if cls is GaLoreAdafactor else options for cls, options in BASE.items()}


@each_layout
@each_class
@pytest.mark.parametrize("dtype", PARAM_DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32, "bfloat16"], ids=str)
def test_state_is_lazy_plain_and_of_the_right_dtype(cls, layout, dtype, state_dtype):
    task, optimizer = make(cls, layout, dtype, options={**WITH_MOMENTS[cls], "state_dtype": state_dtype})
    assert len(optimizer.state) == 0
    assert optimizer.state_dict()["state"] == {}
    train(task, optimizer, 2)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    kept = {None: work, torch.float32: torch.float32, "bfloat16": torch.bfloat16}[state_dtype]
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            assert set(state) <= {"step", "basis", *MOMENTS[cls]}
            assert ("basis" in state) is ("rank" in group)
            assert (state["step"].dtype, state["step"].shape, float(state["step"])) == (torch.float32, (), 2.0)
            for name, value in state.items():
                assert type(value) is torch.Tensor
                assert not value.requires_grad
                assert value.is_contiguous()
                assert value.untyped_storage().nbytes() == value.numel() * value.itemsize, name
                if cls is GaLoreAdamW8bit and name in MOMENTS[cls] and dtype != torch.float64:
                    assert value.dtype == (torch.float32 if name.endswith("absmax") else torch.uint8)
                elif name != "step":
                    assert value.dtype == kept, name


@each_class
@pytest.mark.parametrize("dtype", PARAM_DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("through", ["plain", "accelerate"])
def test_loading_keeps_every_dtype(cls, dtype, state_dtype, through, accelerator):
    """torch alone would cast float32 states to the parameter's dtype and 8-bit codes to floats."""
    options = {**WITH_MOMENTS[cls], "state_dtype": state_dtype}
    task, optimizer = make(cls, "mixed", dtype, options=options)
    train(task, optimizer, 2)
    expected = contents(optimizer)
    resumed = cls(task.groups, **options)
    (accelerator.prepare(resumed) if through == "accelerate" else resumed).load_state_dict(saved(optimizer))
    assert_same(contents(resumed), expected)
    for state in resumed.state.values():
        assert all(value.untyped_storage().nbytes() == value.numel() * value.itemsize for value in state.values())


@pytest.fixture
def accelerator(request):
    if request.node.callspec.params["through"] == "plain":
        yield None
        return
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@each_class
@pytest.mark.parametrize("through", ["accelerate"])
def test_accelerate_changes_no_bit(cls, through, accelerator):
    """Preparing loads the optimizer's own state dict, also when it has stepped already."""
    task, optimizer = make(cls, "mixed", torch.bfloat16)
    other, plain = make(cls, "mixed", torch.bfloat16)
    train(task, optimizer, 2)
    train(task, accelerator.prepare(optimizer), 3)
    train(other, plain, 5)
    assert_same(task.weights(), other.weights())


@each_class
def test_a_galore_torch_state_is_refused(cls):
    """Its projector is a Python object. Loading says what to do instead, and leaves the optimizer as it was."""
    galore_torch = pytest.importorskip("galore_torch")
    task = problem("mixed", proj_type="std")
    theirs = galore_torch.GaLoreAdamW(task.groups, lr=0.01, no_deprecation_warning=True)
    train(task, theirs, 1)
    state_dict = theirs.state_dict()
    assert any("projector" in state for state in state_dict["state"].values())
    _, ours = make(cls, "mixed")
    with pytest.raises(ValueError, match=r"galore-torch.*weights instead"):
        ours.load_state_dict(state_dict)
    assert len(ours.state) == 0


@pytest.mark.parametrize(("theirs", "mine"), [(GaLoreAdamW8bit, GaLoreAdamW), (GaLoreAdamW, GaLoreAdamW8bit)])
def test_a_state_in_the_other_format_is_refused_or_understood(theirs, mine):
    """8-bit codes must not be taken for moments, nor moments for codes."""
    task, optimizer = make(theirs, "mixed")
    train(task, optimizer, 2)
    other, resumed = make(mine, "mixed")
    with pytest.raises((ValueError, KeyError)):  # noqa: PT012 - at loading, or at the latest in the first step
        resumed.load_state_dict(saved(optimizer))
        train(other, resumed, 1)


@each_layout
@each_class
@pytest.mark.parametrize("grads", ["real", "zero"])
def test_steps_leave_the_global_generator_alone(cls, layout, grads):
    """Rounding to bfloat16, refreshes, and the random directions that stand in for a zero gradient's."""
    task, optimizer = make(cls, layout, torch.bfloat16, options={**BASE[cls], "state_dtype": "bfloat16"})
    task.backward()
    if grads == "zero":
        for param in task.params.values():
            param.grad = torch.zeros_like(param)
    before = torch.get_rng_state()
    if grads == "zero" and layout != "full rank":
        with pytest.warns(UserWarning, match="seeded random directions"):
            optimizer.step()
    for _ in range(4):
        optimizer.step()
    assert_same(torch.get_rng_state(), before)


@each_class
def test_the_seed_decides_the_rounding(cls):
    """Two seeds, two roundings; one seed, one: bfloat16 weights and nothing else differ."""

    def weights(seed):
        task, optimizer = make(cls, "mixed", torch.bfloat16, options={**BASE[cls], "seed": seed})
        train(task, optimizer, 2)
        return task.weights()

    first, again, other = weights(0), weights(0), weights(1)
    assert_same(first, again)
    assert any((first[name] != other[name]).any() for name in first)


@pytest.mark.parametrize("shape", [(40, 33), (40, 96), (3, 20, 24), (1, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_a_step_in_blocks_of_rows_is_the_whole_step(cls, dtype, shape, monkeypatch):
    """Bit for bit: weights and states, stochastic rounding and blocks of 256 codes included."""
    runs = []
    for elements in (10**9, 600):
        monkeypatch.setattr("hf_galore.optim.optimizer.BLOCK_ELEMENTS", elements)
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        optimizer = cls([param], weight_decay=0.1, state_dtype="bfloat16", **BASE[cls])
        for _ in range(4):
            param.grad = torch.randn(shape, generator=generator).to(dtype)
            optimizer.step()
        runs.append((param.detach(), optimizer.state[param]))
    assert torch.equal(runs[0][0], runs[1][0])
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_a_full_rank_step_makes_no_copy_of_the_parameter(cls, monkeypatch):
    """A bfloat16 matrix of 64 blocks is stepped with temporaries of a few blocks, whatever the states are kept in.

    By the references of the native ops; tests/test_native.py has the ops.
    """
    monkeypatch.setattr("hf_galore.optim.optimizer.BLOCK_ELEMENTS", 1024)
    param = torch.nn.Parameter(torch.randn(256, 256).bfloat16())
    optimizer = cls([param], state_dtype="bfloat16", **BASE[cls])
    largest = 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view and out.untyped_storage().data_ptr() not in known:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    for _ in range(2):
        param.grad = torch.randn(256, 256).bfloat16()
        state = list(optimizer.state[param].values())
        known = {tensor.untyped_storage().data_ptr() for tensor in (param, param.grad, *state)}
        largest = 0
        with native.references_only(), Recorder():
            optimizer.step()
    assert 0 < largest <= 1024 * 8
