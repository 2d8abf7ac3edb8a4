"""One layer's projected backward: its gradients against autograd's, what it allocates, and what it runs under."""

import itertools

import pytest
import torch
from lowrank_cases import (
    CASES,
    GAP,
    STACK,
    Case,
    adamw,
    backward,
    bases,
    full_gradients,
    layer_of,
    on_engine,
    relative,
    train,
    weights,
)
from parts import in_part, slow
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hf_galore import ops
from hf_galore.lowrank_backward import enable
from hf_galore.projected_linear import ProjectedLinear

N, M, R = 7, 5, 3

each_side = pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
each_pending = pytest.mark.parametrize("pending", [False, True], ids=["folded", "pending"])
each_shape = pytest.mark.parametrize("shape", [(4, N), (2, 3, N), (2, 1, 3, N)], ids=["2-D", "3-D", "4-D"])
each_refresh = pytest.mark.parametrize("how", ["exact", "streaming"])


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


class Pieces:
    """The arguments of a ProjectedLinear in float64, and the plain layer that it stands for."""

    def __init__(self, right, pending, shape, bias="trained", x_grad=True):
        torch.manual_seed(0)
        self.right, self.pending = right, pending
        self.x, self.weight = double(*shape).requires_grad_(x_grad), double(M, N)
        self.bias = None if bias == "none" else double(M).requires_grad_(bias == "trained")
        self.basis = torch.linalg.qr(double(N if right else M, R))[0]
        self.update = double(M, R) if right else double(R, N)
        self.decay, self.scale = (0.9, 0.25) if pending else (1.0, 0.25)
        if not pending:
            self.update.zero_()
        self.update.requires_grad_()

    def __call__(self, x, bias, update):
        numbers = (self.right, self.decay, self.scale, self.pending)
        kept = x.detach() @ self.basis if self.right else x.detach()
        return ProjectedLinear.apply(x, self.weight, None, bias, update, kept, self.basis, *numbers)

    def plain(self):
        """(y, W) of nn.functional.linear with the weight that the layer has by its docstring."""
        back = self.update @ self.basis.mT if self.right else self.basis @ self.update
        weight = (self.decay * self.weight + self.scale * back).detach().requires_grad_()
        return nn.functional.linear(self.x, weight, self.bias), weight

    def low(self, grad):
        return grad @ self.basis if self.right else self.basis.mT @ grad


class Recorder(TorchDispatchMode):
    """Every operation's name, the shape of every tensor with new storage, and how many large ones live at once."""

    def __init__(self, large=float("inf")):
        super().__init__()
        self.large, self.names, self.created = large, [], []
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.names.append(func.overloadpacket.__name__)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.created.append((self.names[-1], elements))
                if elements >= self.large:
                    self.alive[len(self.created)] = StorageWeakRef(tensor.untyped_storage())
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, len(self.alive))
        return result

    @property
    def big(self):
        """Operations that made a tensor of `large` elements or more."""
        return [entry for entry in self.created if entry[1] >= self.large]


@each_pending
@each_side
@each_shape
@pytest.mark.parametrize("bias", ["none", "trained", "frozen"])
@pytest.mark.parametrize("x_grad", [True, False], ids=["x with grad", "x without"])
def test_gradients_are_autograds(right, pending, shape, bias, x_grad):
    """y, gx and gbias are those of the plain layer, and B's gradient is G Q or PᵀG; ten sums of float64: 1e-12."""
    pieces = Pieces(right, pending, shape, bias, x_grad)
    gy = double(*shape[:-1], M)
    mine = pieces(pieces.x, pieces.bias, pieces.update)
    theirs, weight = pieces.plain()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    inputs = [t for t in (pieces.x, pieces.bias) if t is not None and t.requires_grad]
    *got, low = torch.autograd.grad(mine, [*inputs, pieces.update], gy)
    *expected, full = torch.autograd.grad(theirs, [*inputs, weight], gy)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(low, pieces.low(full), rtol=0, atol=1e-12)


@each_pending
@each_side
def test_gradcheck(right, pending):
    """Finite differences for x and bias. B's gradient is R and not scale·R by design: the test above holds that."""
    pieces = Pieces(right, pending, (2, 3, N))
    assert torch.autograd.gradcheck(lambda x, bias: pieces(x, bias, pieces.update), (pieces.x, pieces.bias))


@each_side
@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 0, 20)], ids=str)
def test_a_vector_or_no_tokens_at_all(right, shape):
    """nn.Linear takes them, and so does the layer; without tokens R is zero, not missing."""
    model, _, engine = on_engine(STACK, proj_type="right" if right else "left", refresh="exact")
    engine.layers[model.wide.lowrank_update].basis.tapping = False
    plain = STACK.model()
    x = torch.randn(shape)
    y, expected = model.wide(x), plain.wide(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    layer = layer_of(engine, model.wide)
    torch.testing.assert_close(
        model.wide.lowrank_update.grad,
        layer.side.project(plain.wide.weight.grad, layer.basis.matrix),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("proj_type", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_the_small_gradients_of_a_model(name, proj_type):
    """Every B's gradient over two micro-batches against autograd's G of the plain model; stored side of Conv1D too."""
    case = CASES[name]
    model, optimizer, engine = on_engine(case, torch.float64, proj_type=proj_type)
    train(case, model, optimizer, range(2))
    plain = full_gradients(case, model, [2, 3])
    optimizer.zero_grad()
    backward(case, model, 2)
    backward(case, model, 3)
    for layer in engine.layers.values():
        (key,) = {key for key, module in model.named_modules() if module is layer.module}
        full = plain[f"{key}.weight"]
        full = full.mT if layer.transposed else full
        byhand = layer.side.project(full, layer.basis.matrix)
        assert byhand.norm() > 0
        torch.testing.assert_close(layer.update.grad, byhand, rtol=0, atol=1e-12)


def test_eval_under_no_grad_costs_a_plain_linear():
    """The same operations on the same shapes as the unpatched model, and bit for bit its answer."""
    model, optimizer, _ = on_engine(STACK)
    train(STACK, model, optimizer, range(2))
    plain = STACK.model()
    plain.load_state_dict(model.state_dict())
    x = STACK.batch(90)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            with Recorder() as mine:
                y = model(x)
            with Recorder() as theirs:
                expected = plain(x)
        assert torch.equal(y, expected)
        assert mine.created == theirs.created  # the same operations, the same sizes
        assert len(mine.created) >= 3


# What is allocated. W is 48 x 40 or 40 x 48, 1,920 elements; 6 tokens and rank 3 make 288 at most.

TOKENS, WIDE, NARROW = 6, 48, 40
LARGEST = TOKENS * WIDE


class Pair(nn.Module):
    """A wide and a tall layer, with a function between them that keeps its output."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDE, NARROW), nn.Linear(NARROW, WIDE)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Transposed(nn.Module):
    """A layer of the name and the layout of transformers' Conv1D."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.first, self.second = Conv1D(NARROW, WIDE), Conv1D(WIDE, NARROW)

    forward = Pair.forward


def one_step(model, optimizer, step, micro_batches, large=LARGEST + 1):
    """A recorder of the whole step: forward, backward, optimizer, fold."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    batches = [torch.randn(TOKENS, WIDE, generator=generator).to(dtype) for _ in range(micro_batches)]
    optimizer.zero_grad()
    with Recorder(large) as recorder:
        for x in batches:
            model(x).square().mean().backward()
        optimizer.step()
    return recorder


def small_pair(build=Pair, dtype=torch.float32, make=adamw, **options):
    case = Case(build, None)
    return on_engine(case, dtype, make, **{"rank": R, "update_proj_gap": 4, **options})


@pytest.mark.parametrize("build", [Pair, Transposed], ids=["linear", "conv1d"])
@pytest.mark.parametrize("proj_type", ["right", "left"])
@pytest.mark.parametrize("micro_batches", [1, 2])
class TestAllocations:
    def test_the_recorder_sees_full_gradients(self, build, proj_type, micro_batches):
        model = build()
        recorder = one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0, micro_batches)
        assert recorder.peak >= 2

    @pytest.mark.parametrize("fold_every", [1, 3])
    @pytest.mark.parametrize("stagger", [False, True])
    def test_streaming_never_makes_a_large_tensor(self, build, proj_type, micro_batches, fold_every, stagger):
        """Not in a normal step, not in a refresh, not in the step before one."""
        model, optimizer, engine = small_pair(build, proj_type=proj_type, fold_every=fold_every, stagger=stagger)
        refreshed = 0
        for step in range(6):
            before = bases(engine)
            assert one_step(model, optimizer, step, micro_batches).big == []
            refreshed += sum(not torch.equal(a, b) for a, b in zip(bases(engine), before, strict=True))
        assert refreshed == (3 if stagger else 4)  # two layers: steps 0 and 4, with stagger 2 for the second

    def test_exact_makes_one_only_in_a_refresh(self, build, proj_type, micro_batches):
        """One G at a time; with accumulation they live until the step. A decomposition has a copy and two factors."""
        options = {"refresh": "exact", "subspace": "svd", "micro_batches": micro_batches}
        model, optimizer, _ = small_pair(build, proj_type=proj_type, **options)
        for step in range(6):
            recorder = one_step(model, optimizer, step, micro_batches)
            products = [entry for entry in recorder.big if "mm" in entry[0]]
            assert len(products) == (2 * micro_batches if step % 4 == 0 else 0)
            assert (recorder.big == []) is (step % 4 != 0)
            assert recorder.peak <= micro_batches + 4
            assert recorder.alive == {}  # nothing large is left after the step

    def test_exact_staggered_makes_one_layers_at_a_time(self, build, proj_type, micro_batches):
        options = {"refresh": "exact", "subspace": "svd", "stagger": True, "micro_batches": micro_batches}
        model, optimizer, _ = small_pair(build, proj_type=proj_type, **options)
        one_step(model, optimizer, 0, micro_batches)
        for step in range(1, 9):
            recorder = one_step(model, optimizer, step, micro_batches)
            products = [entry for entry in recorder.big if "mm" in entry[0]]
            assert len(products) == (micro_batches if step % 2 == 0 else 0)
            assert recorder.peak <= 1 + 4


@pytest.mark.parametrize("build", [Pair, Transposed], ids=["linear", "conv1d"])
def test_a_bfloat16_fold_allocates_blocks_only(build, monkeypatch):
    """The write-back rounds a block of rows at a time: with blocks of four rows, nothing is larger than those."""
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", 4 * NARROW)
    model, optimizer, _ = small_pair(build, torch.bfloat16)
    for step in range(6):
        assert one_step(model, optimizer, step, 1).big == []


@pytest.mark.parametrize("kept", ["right", "left"])
def test_what_a_layer_keeps_for_the_backward_pass(kept):
    """x Q (tokens, r) and W on the right; x on the left: nothing else, and not x on the right."""
    model, optimizer, _ = on_engine(STACK, proj_type=kept)
    train(STACK, model, optimizer, range(1))
    shapes = []
    x = torch.randn(6, 20)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model.wide(x)
    weight = (12, 20)
    assert sorted(shapes) == sorted([(6, 4), weight] if kept == "right" else [(6, 20), weight, (12, 4)])


# What it runs under.


@pytest.mark.parametrize(
    ("name", "fold_every", "how"),
    in_part(
        itertools.product(["linear", "gpt-neox", "gpt2"], [1, 3], ["exact", "streaming"]),
        *(("linear", 1, "exact"), ("linear", 3, "streaming"), ("gpt-neox", 3, "streaming"), ("gpt2", 3, "streaming")),
    ),
)
def test_autocast(name, fold_every, how):
    """bfloat16 products, float32 weights and gradients; as close to the float32 run as plain autocast is, times K.

    Compared are the gradients of one step, before Adam divides small ones by themselves. The low-rank product rounds
    once more than the plain one does (x Q), hence K = 4 and not 1.
    """

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    case = CASES[name]
    model, optimizer, engine = on_engine(case, fold_every=fold_every, refresh=how)
    train(case, model, optimizer, range(2), context=autocast)
    with autocast():
        assert (
            _first_layer(engine).module(torch.randn(2, _first_layer(engine).weight.shape[1])).dtype == torch.bfloat16
        )
    plain = case.model()
    plain.load_state_dict(model.state_dict())
    reference = case.model()
    reference.load_state_dict(model.state_dict())
    optimizer.zero_grad()
    backward(case, model, 2, context=autocast)
    backward(case, plain, 2, context=autocast)
    backward(case, reference, 2)
    error = own = 0.0
    for layer in engine.layers.values():
        (key,) = {key for key, module in model.named_modules() if module is layer.module}
        assert layer.update.grad.dtype == torch.float32
        low = [
            layer.side.project(grad.mT if layer.transposed else grad, layer.basis.matrix)
            for grad in (net.get_submodule(key).weight.grad for net in (plain, reference))
        ]
        own += (low[0] - low[1]).square().sum().item()
        error += (layer.update.grad - low[1]).square().sum().item()
    assert 0 < error <= 4**2 * own


def _first_layer(engine):
    return next(iter(engine.layers.values()))


class Checkpointed(nn.Module):
    """Two blocks, recomputed in the backward pass."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 20)) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = x.clone().requires_grad_()  # reentrant checkpoints need an input that wants a gradient
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


@each_refresh
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("fold_every", [slow(1), 3])
def test_gradient_checkpointing_changes_no_bit(use_reentrant, how, fold_every):
    runs = []
    for kind in (None, use_reentrant):
        case = Case(lambda kind=kind: Checkpointed(kind), STACK.loss)
        model, optimizer, _ = on_engine(case, refresh=how, fold_every=fold_every, update_proj_gap=3, micro_batches=2)
        train(case, model, optimizer, range(8), micro_batches=2)
        runs.append(weights(model))
    assert relative(runs[1], runs[0]) == 0.0


@pytest.mark.parametrize("how", [slow("exact"), "streaming"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["gpt-neox", "gpt2"])
def test_gradient_checkpointing_of_transformers(name, use_reentrant, how):
    case, runs = CASES[name], []
    for recompute in (False, True):
        model, optimizer, _ = on_engine(case, refresh=how, update_proj_gap=3, micro_batches=2)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        train(case, model, optimizer, range(5), micro_batches=2)
        runs.append(weights(model))
    assert relative(runs[1], runs[0]) == 0.0


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("proj_type", "fold_every"), [("right", 3), ("left", 1), slow("right", 1), slow("left", 3)]
    )
    def test_no_graph_break_between_refreshes(self, proj_type, fold_every):
        """fullgraph=True raises at a break; gradients are the eager ones, to rounding."""
        model, optimizer, engine = on_engine(STACK, proj_type=proj_type, fold_every=fold_every)
        train(STACK, model, optimizer, range(2))
        x = STACK.batch(90)
        grads = []
        for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            optimizer.zero_grad()
            STACK.loss(forward, x).backward()
            grads.append([param.grad.clone() for param in engine.parameters(model) if param.grad is not None])
        assert len(grads[0]) == 3 + 1
        for mine, eager in zip(*reversed(grads), strict=True):
            torch.testing.assert_close(mine, eager)

    @pytest.mark.parametrize(("how", "fold_every"), [slow("exact", 1), ("streaming", 3)])
    def test_a_whole_run(self, how, fold_every):
        """With refreshes, where the graph may break, but not the result."""
        runs = []
        for compiled in (False, True):
            model, optimizer, _ = on_engine(
                STACK, torch.float64, fold_every=fold_every, refresh=how, update_proj_gap=3
            )
            forward = torch.compile(model, backend="aot_eager") if compiled else model
            for step in range(7):
                optimizer.zero_grad()
                STACK.loss(forward, STACK.batch(step).double()).backward()
                optimizer.step()
            runs.append(weights(model))
        assert relative(runs[1], runs[0]) <= 1e-12

    def test_does_not_compile_anew_at_every_step(self):
        """A step counter or a decay factor in the graph would make a new one of every step."""
        model, optimizer, _ = on_engine(STACK, fold_every=3, update_proj_gap=GAP, weight_decay=0.1)
        train(STACK, model, optimizer, range(1))
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        forward = torch.compile(model, backend=backend)
        for step in range(1, GAP):
            optimizer.zero_grad()
            STACK.loss(forward, STACK.batch(step)).backward()
            optimizer.step()
        # With and without pending updates, and once more for a number that turned out to change.
        assert 1 <= len(graphs) <= 3


def test_frozen_after_the_fact():
    """A layer whose small parameter is frozen gives its input the plain gradient, and keeps its weight."""
    model = STACK.model()
    enable(model, rank=R)
    for name, param in model.named_parameters():
        param.requires_grad_("wide" in name)
    STACK.loss(model, STACK.batch(0)).backward()
    assert model.wide.lowrank_update.grad is not None
    assert model.tall.lowrank_update.grad is None
