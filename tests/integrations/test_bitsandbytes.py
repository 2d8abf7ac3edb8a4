"""Layers that bitsandbytes has quantized, one by one: formats by what the projected backward must do with them.

The Trainer on whole models: test_bitsandbytes_trainer.py.
"""

import copy
import math
from typing import Any, NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from parts import slow
from test_projected_linear import Recorder
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import hf_galore.integrations
from hf_galore import GaLoreAdamW, galore_param_groups
from hf_galore.frozen_weight import QUANTIZED, frozen_weight
from hf_galore.integrations import bitsandbytes as ours
from hf_galore.lowrank_backward import disable, enable
from hf_galore.rounding import RoundingKey

M, N = 128, 192
KEY = RoundingKey(0, 1, 2)


@pytest.fixture(autouse=True)
def _registered():
    ours.register()
    yield
    ours.unregister()


class Format(NamedTuple):
    """How a layer is quantized."""

    kind: str
    options: dict[str, Any]
    blocksize: int = 64

    def quantized(self, weight, bias=None):
        """A layer of bitsandbytes with this weight (m, n)."""
        m, n = weight.shape
        if self.kind == "int8":
            layer = bnb.nn.Linear8bitLt(n, m, bias=bias is not None, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(n, m, bias=bias is not None, quant_type=self.kind, **self.options)
            layer.weight.blocksize = self.blocksize
        layer.weight.data = weight.clone()
        if bias is not None:
            layer.bias.data = bias.clone()
        return layer.to("cpu")

    def layer(self, m=M, n=N, dtype=torch.float32):
        generator = torch.Generator().manual_seed(3)
        # Sixteen bits hold these: bitsandbytes makes int8 of float16.
        weight = torch.randn(m, n, generator=generator).div_(8).half().to(dtype)
        return self.quantized(weight, torch.randn(m, generator=generator).to(dtype))

    def gap(self, layer):
        """The largest distance of two levels, as an absolute value for each weight, (m, n)."""
        m, n = frozen_weight(layer).shape
        if self.kind == "int8":
            return frozen_weight(layer).scales[:, None].expand(m, n) / 127
        levels = layer.weight.quant_state.code.sort().values
        return spread(frozen_weight(layer).scales(), self.blocksize, (m, n)) * (levels[1:] - levels[:-1]).max()


FOUR_BITS = {
    "nf4": Format("nf4", {"compress_statistics": False}),
    "fp4": Format("fp4", {"compress_statistics": False}),
    "nf4 nested": Format("nf4", {"compress_statistics": True}),
    "fp4 nested": Format("fp4", {"compress_statistics": True}),
    "nf4 stored as bfloat16": Format("nf4", {"compress_statistics": False, "quant_storage": torch.bfloat16}),
    "nf4 in blocks of 128": Format("nf4", {"compress_statistics": False}, 128),
}
FORMATS = {**FOUR_BITS, "int8": Format("int8", {})}
each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
each_4bit = pytest.mark.parametrize("form", FOUR_BITS.values(), ids=FOUR_BITS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def spread(scales, size, shape):
    """Each block's scale at its weights."""
    return scales.repeat_interleave(size)[: math.prod(shape)].view(shape)


def decoded(layer):
    """W (m, n) in float32 by the formats' definitions."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return layer.weight.data.float() * scales[:, None] / 127
    state, codes = layer.weight.quant_state, layer.weight.data.view(torch.uint8).view(-1)
    scales = state.absmax
    if state.nested:
        inner = state.state2
        scales = inner.code[scales.long()] * inner.absmax.repeat_interleave(inner.blocksize)[: len(scales)]
        scales = scales + state.offset
    levels = state.code[torch.stack([codes >> 4, codes & 15], 1).view(-1).long()]
    return levels[: math.prod(state.shape)].view(state.shape) * spread(scales, state.blocksize, state.shape)


def tensors(layer):
    """What the layer's codes and scales are stored in."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return [layer.weight, frozen_weight(layer).scales]
    state = layer.weight.quant_state
    inner = [state.offset, state.state2.absmax] if state.nested else []
    return [layer.weight, state.absmax, *inner]


def assert_same(left, right):
    """State dicts equal to the bit; codes may be stored as floats, and be NaN as such."""
    assert list(left) == list(right)
    for name in left:
        one, other = (side[name].reshape(-1).view(torch.uint8) for side in (left, right))
        assert torch.equal(one, other), name


def saved(model):
    """A copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def factors(m=M, n=N, size=0.05):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(m, 4, generator=generator) * size, torch.randn(4, n, generator=generator)


def fold(layer, key=KEY, alpha=0.5, beta=0.9, size=0.05):
    """What W should be after the fold, having done it."""
    left, right = factors(*frozen_weight(layer).shape, size)
    expected = beta * decoded(layer) + alpha * left @ right
    frozen_weight(layer).add_lowrank_(left, right, alpha=alpha, beta=beta, key=key)
    return expected


def set_weight(layer, weight):
    """Quantizes another weight into the layer, to nearest: the fold with beta = 0."""
    frozen_weight(layer).add_lowrank_(weight, torch.eye(weight.shape[1]), alpha=1.0, beta=0.0, key=None)


# The formats.


@each_dtype
@each_format
@pytest.mark.parametrize("shape", [(M, N), (6, 64), (7, 5), (9, 66), (4, 1000)], ids=str)
def test_decodes_as_the_format_says(form, dtype, shape):
    """To the roundings of the product and of the weight's dtype; also where blocks end within rows."""
    if form.options.get("quant_storage") and math.prod(shape) % 4:
        pytest.skip("bitsandbytes cannot store that")
    layer = form.layer(*shape, dtype=dtype)
    weight = frozen_weight(layer)
    assert weight.shape == shape
    assert weight.dtype == (torch.float32 if form.kind == "int8" else dtype)
    exact = decoded(layer)
    eps = 2 * torch.finfo(weight.dtype).eps
    torch.testing.assert_close(weight.decode(weight.stored).float(), exact, rtol=eps, atol=eps * 1e-3)


@each_4bit
def test_rounding_to_nearest_is_bitsandbytes_own(form):
    """Codes and scales bit for bit, through the fold; fp4 has two zeros, and even those agree."""
    layer = form.layer()
    target = torch.randn(M, N)
    set_weight(layer, target)
    nested = form.options["compress_statistics"]
    storage = form.options.get("quant_storage", torch.uint8)
    codes, state = functional.quantize_4bit(target, None, None, form.blocksize, nested, form.kind, storage)
    assert torch.equal(layer.weight.data.view(torch.uint8), codes.view(torch.uint8))
    mine = layer.weight.quant_state
    assert torch.equal(mine.absmax, state.absmax)
    if nested:
        assert torch.equal(mine.offset, state.offset)
        assert torch.equal(mine.state2.absmax, state.state2.absmax)


def test_rounding_to_nearest_is_bitsandbytes_own_in_int8():
    layer = FORMATS["int8"].layer()
    target = torch.randn(M, N).half()
    set_weight(layer, target.float())
    codes, scales, _ = functional.int8_vectorwise_quant(target)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer.weight.SCB, scales)


@each_format
@pytest.mark.parametrize("shape", [(M, N), (7, 5), (9, 66)], ids=str)
@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
def test_a_fold_writes_in_place_and_is_within_a_gap(form, shape, key):
    if form.options.get("quant_storage") and math.prod(shape) % 4:
        pytest.skip("bitsandbytes cannot store that")
    layer = form.layer(*shape)
    before = [(id(one), one.data_ptr(), one.dtype, one.shape) for one in tensors(layer)]
    codes = frozen_weight(layer).stored
    version = codes._version
    expected = fold(layer, key)
    assert [(id(one), one.data_ptr(), one.dtype, one.shape) for one in tensors(layer)] == before
    assert codes._version > version
    share = 0.5 if key is None else 1.0
    nested = form.options.get("compress_statistics", False)  # scales are then up to a 64th of their range off
    slack = decoded(layer).abs() * 0.02 if nested else 1e-6
    assert ((decoded(layer) - expected).abs() <= share * form.gap(layer) * (1 + 1e-4) + slack).all()


@each_format
def test_folds_are_unbiased(form):
    """The mean over 300 keys is within six standard errors, with the largest variance a gap allows."""
    keys, layer = 300, form.layer(16, N)
    mean = torch.zeros(16, N, dtype=torch.float64)
    for step in range(keys):
        one = copy.deepcopy(layer)
        expected = fold(one, RoundingKey(0, step, 0))
        mean += decoded(one).double() / keys
    variance = (form.gap(one) / 2) ** 2
    if form.options.get("compress_statistics"):
        state = one.weight.quant_state.state2
        variance += (state.absmax.max() * (state.code[1:] - state.code[:-1]).max() / 2) ** 2
        # The least scale of a group is beyond its book, by at most 0.7 % of its distance from the mean.
        clamped = 0.0071 * state.absmax.max()
    else:
        clamped = 1e-6
    error = (mean - expected).abs()
    assert (error <= 6 * (variance / keys) ** 0.5 + clamped).all()
    assert abs(float((mean - expected).mean())) <= 6 * float((variance.mean() / keys / mean.numel()) ** 0.5) + clamped


@each_format
def test_small_updates_survive_only_stochastic_rounding(form):
    """A hundred updates of a hundredth of a gap each; to nearest, nearly nothing of them arrives."""
    moved = {}
    for name, key in (("nearest", None), ("stochastic", KEY)):
        layer = form.layer(16, N)
        start, ones = decoded(layer), torch.ones(16, N)
        step = float(form.gap(layer).mean()) / 100
        for number in range(100):
            left, right = ones[:, :1] * step, ones[:1]
            frozen_weight(layer).add_lowrank_(left, right, alpha=1.0, beta=1.0, key=key and key._replace(step=number))
        moved[name] = float((decoded(layer) - start).mean()) / (100 * step)
    assert moved["stochastic"] == pytest.approx(1.0, abs=0.1)
    assert abs(moved["nearest"]) < 0.5


@pytest.mark.parametrize("form", [FORMATS[n] for n in ("nf4", "fp4", "int8")], ids=["nf4", "fp4", "int8"])
def test_weight_decay_alone_moves_scales_and_no_code(form):
    layer = form.layer()
    codes, start = layer.weight.data.clone(), decoded(layer)
    left, right = factors()
    frozen_weight(layer).add_lowrank_(left, right, alpha=0.0, beta=0.5, key=KEY)
    assert torch.equal(decoded(layer), start / 2)
    same = layer.weight.data == codes
    assert same.all() or form.kind == "fp4"  # either of its zeros


@each_format
def test_bits_depend_on_the_key_and_the_element_alone(form, monkeypatch):
    """Equal keys give equal codes, however many rows are worked on at a time; other keys give others."""
    results = {}
    for name, key, rows in (
        ("first", KEY, M),
        ("again", KEY, M),
        ("two rows at a time", KEY, 2),
        ("other step", KEY._replace(step=9), M),
        ("other seed", KEY._replace(seed=9), M),
        ("other layer", KEY._replace(parameter=9), M),
    ):
        monkeypatch.setattr(
            ours, "_row_blocks", lambda m, *_, rows=rows: (slice(i, min(i + rows, m)) for i in range(0, m, rows))
        )
        layer = form.layer()
        fold(layer, key)
        results[name] = decoded(layer)
    for name, value in results.items():
        same = torch.equal(value, results["first"])
        # A GEMM of other rows may round otherwise, which moves a block's scale by some ulp (the decoded values of a
        # 4-bit or 8-bit block are apart by a hundredth at least) and can tip a value next to its threshold.
        tipped = ~torch.isclose(value, results["first"], rtol=1e-5, atol=0.0)
        close = name == "two rows at a time" and tipped.float().mean() < 1e-3
        assert (same or close) == (not name.startswith("other")), name


@each_format
def test_zeros_stay_and_nan_is_seen(form):
    layer = form.layer(8, 256)
    set_weight(layer, torch.zeros(8, 256))
    left, right = torch.zeros(8, 1), torch.zeros(1, 256)
    for key in (None, KEY):
        frozen_weight(layer).add_lowrank_(left, right, alpha=1.0, beta=1.0, key=key)
        assert not decoded(layer).any()
    if form.options.get("compress_statistics"):
        return  # the mean of the scales is in every scale: one NaN is everywhere
    layer = form.layer(8, 256)
    left[2] = float("nan")
    frozen_weight(layer).add_lowrank_(left, right + 1, alpha=1.0, beta=1.0, key=KEY)
    found = decoded(layer).isnan()
    assert found[2].all()
    assert not found[[0, 1, 3, 4, 5, 6, 7]].any()


# In a model, with the projected backward.


def stack(form, n=64, hidden=128, dtype=torch.float32):
    layers = nn.Sequential(form.layer(hidden, n, dtype), nn.Tanh(), form.layer(n, hidden, dtype))
    layers[0].bias.requires_grad_(False)
    return layers


def training(model, **options):
    """(optimizer, engine), of a rank below the tokens of a batch, so that gradients have it."""
    engine = enable(model, rank=4, update_proj_gap=3, **options)
    optimizer = GaLoreAdamW(engine.param_groups(model), lr=2e-2)
    engine.attach(optimizer)
    return optimizer, engine


def batch(n=64):
    return torch.randn(16, n, generator=torch.Generator().manual_seed(5))


def take_steps(model, optimizer, count, loss=None):
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        value = (model(batch()) - batch().flip(-1)).square().mean() if loss is None else loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@each_dtype
@each_format
def test_forward_and_gradients_are_the_decoded_layers(form, dtype):
    """y, gx, the bias's gradient and R = G Q of a plain layer with the decoded weight."""
    layer = form.layer(dtype=dtype)
    plain = nn.Linear(N, M).to(dtype)
    weight = frozen_weight(layer)
    plain.load_state_dict({"weight": weight.decode(weight.stored).to(dtype), "bias": layer.bias})
    model = nn.Sequential(layer)
    engine = enable(model, rank=8)
    (small,) = engine.layers.values()
    x, gy = (torch.randn(5, size).to(dtype) for size in (N, M))
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, expected = model(mine), plain(theirs)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    y.backward(gy)
    expected.backward(gy)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=4 * eps * float(theirs.grad.abs().max()))
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    low = plain.weight.grad.float() @ small.basis.matrix.float()
    torch.testing.assert_close(
        small.update.grad.float(), low, rtol=0, atol=16 * eps * float(plain.weight.grad.float().norm(dim=1).max())
    )
    assert small.update.dtype == weight.dtype


@each_4bit
def test_computes_in_the_layers_compute_dtype(form):
    """As bitsandbytes does: inputs are cast to it and outputs back; autocast goes first."""
    layer = form.layer()
    layer.compute_dtype = torch.bfloat16
    model = nn.Sequential(layer)
    weight = frozen_weight(layer)
    expected = linear(batch(n=N).bfloat16(), weight.decode(weight.stored).bfloat16(), layer.bias.bfloat16()).float()
    enable(model, rank=8)
    assert torch.equal(model(batch(n=N)), expected)
    with torch.no_grad():
        assert torch.equal(model(batch(n=N)), expected)
    layer.compute_dtype = torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(batch(n=N)).float(), expected)


TRAINING = [{}, {"refresh": "exact"}, {"fold_every": 3}, {"proj_type": "left"}, {"stochastic_rounding": False}]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        pytest.param(
            form,
            options,
            id=f"{name}-{options}",
            marks=() if name in ("nf4 nested", "int8") or not options else pytest.mark.slow,
        )
        for name, form in FORMATS.items()
        for options in TRAINING
    ],
)
def test_training_lowers_the_loss(form, options):
    model = stack(form)
    start = [decoded(layer).clone() for layer in model if isinstance(layer, nn.Linear)]
    optimizer, _ = training(model, **options)
    losses = take_steps(model, optimizer, 30)
    assert losses[-1] < 0.8 * losses[0]
    disable(model)
    for layer, old in zip((one for one in model if isinstance(one, nn.Linear)), start, strict=True):
        assert not torch.equal(decoded(layer), old)
        assert not layer.weight.requires_grad
        assert "lowrank_update" not in dict(layer.named_parameters())


@each_format
def test_training_repeats_to_the_bit(form):
    states = []
    for _ in range(2):
        model = stack(form)
        take_steps(model, training(model)[0], 5)
        states.append(model.state_dict())
    assert list(states[0]) == list(stack(form).state_dict())
    assert_same(*states)


@each_format
def test_weight_decay_acts_on_the_weight(form):
    model = stack(form)
    engine = enable(model, rank=8)
    optimizer = GaLoreAdamW(engine.param_groups(model, weight_decay=0.5), lr=0.1)
    engine.attach(optimizer)
    before = decoded(model[0]).norm()
    with pytest.warns(UserWarning, match="zero or not finite"):
        take_steps(model, optimizer, 5, lambda: (model(batch()) * 0).sum())
    assert float(decoded(model[0]).norm() / before) == pytest.approx(0.95**5, rel=0.02)


@each_format
def test_a_fold_between_forward_and_backward_is_detected(form):
    model = stack(form)
    optimizer, _ = training(model)
    take_steps(model, optimizer, 1)
    loss = model(batch()).sum()
    take_steps(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_format
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(form, reentrant):
    states = []
    for checkpointed in (False, True):
        model = stack(form)
        optimizer, _ = training(model)

        def loss(model=model, checkpointed=checkpointed):
            x = batch().requires_grad_()
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            return y.square().mean()

        take_steps(model, optimizer, 4, loss)
        states.append(model.state_dict())
    assert_same(*states)


@each_format
def test_a_deep_copy_trains_on_its_own(form):
    model = stack(form)
    enable(model, rank=4)
    other = copy.deepcopy(model)
    before = saved(model)
    engine = other._hf_galore_lowrank_backward
    optimizer = GaLoreAdamW(engine.param_groups(other), lr=2e-2)
    engine.attach(optimizer)
    take_steps(other, optimizer, 2)
    assert not torch.equal(decoded(other[0]), decoded(model[0]))
    assert_same(model.state_dict(), before)


class Attention(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.q_proj, self.k_proj = form.layer(64, 64), form.layer(32, 64)

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x)], -1)


@each_format
def test_siblings_share_a_basis(form):
    model = Attention(form)
    optimizer, engine = training(model, share_inputs=True)
    assert len(engine.bases) == 1
    losses = take_steps(model, optimizer, 20, lambda: (model(batch()) - 1).square().mean())
    assert losses[-1] < 0.9 * losses[0]


@each_format
@pytest.mark.parametrize("fold_every", [slow(1), 2])
def test_at_most_one_layer_is_decoded_at_a_time(form, fold_every):
    """In whole steps, a refresh and folds included, one tensor as large as a layer's weight is alive at most."""
    model = stack(form, 512, 1024)  # more elements than a fold works on at a time
    optimizer, _ = training(model, fold_every=fold_every)
    codes = {one.data_ptr() for layer in model if isinstance(layer, nn.Linear) for one in tensors(layer)}
    recorder = Recorder(large=512 * 1024)
    for _ in range(4):
        with recorder:
            (model(batch(n=512)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert recorder.big
    assert recorder.peak == 1
    assert codes == {one.data_ptr() for layer in model if isinstance(layer, nn.Linear) for one in tensors(layer)}


def test_the_cpu_format_of_evaluation_is_unpacked(recwarn):
    """On processors with AVX512-BF16 bitsandbytes' forward in evaluation packs the codes in another order."""
    for form in (FORMATS["nf4"], FORMATS["nf4 nested"]):
        layer = form.layer(64, 128)
        weight = frozen_weight(layer)
        before = decoded(layer)
        layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        # Packing rounds the scales to bfloat16, and the nested ones are quantized once more after that.
        torch.testing.assert_close(weight.decode(weight.stored), before, rtol=0.03, atol=1e-3)
        fold(layer)
        state = layer.weight.quant_state
        fresh = form.layer(64, 128).weight.quant_state
        assert state.absmax.shape == fresh.absmax.shape
        assert state.absmax.dtype == fresh.absmax.dtype


# State dicts.


@each_format
def test_scales_are_loaded_with_their_codes(form):
    trained, fresh = stack(form), stack(form)
    optimizer, _ = training(trained)
    take_steps(trained, optimizer, 4)
    state = saved(trained)
    assert list(state) == list(fresh.state_dict())
    for model in (fresh, trained):  # as it is, and with the projected backward in it
        if model is trained:
            take_steps(trained, optimizer, 1)
        with ours.loading_scales(model):
            model.load_state_dict(state, strict=True)
        assert_same(model.state_dict(), state)
    assert [len(module._load_state_dict_pre_hooks) for module in fresh] == [
        len(module._load_state_dict_pre_hooks) for module in stack(form)
    ]


def test_scales_are_loaded_from_shards_in_any_order():
    form = FORMATS["nf4 nested"]
    trained, fresh = stack(form), stack(form)
    take_steps(trained, training(trained)[0], 4)
    with ours.loading_scales(fresh):
        for name, value in reversed(trained.state_dict().items()):
            fresh.load_state_dict({name: value}, strict=False)
    assert_same(fresh.state_dict(), trained.state_dict())


def test_int8_scales_are_loaded_after_the_layer_was_used():
    """bitsandbytes moves the scales at the first use of a layer, and then refuses to load any."""
    form = FORMATS["int8"]
    other = stack(form)
    set_weight(other[0], torch.randn(128, 64))
    used = stack(form)
    used.train()(batch())
    with ours.loading_scales(used):
        used.load_state_dict(other.state_dict())
    assert torch.equal(decoded(used[0]), decoded(other[0]))
    assert torch.equal(used(batch()), other.train()(batch()))


@pytest.mark.parametrize("other", ["fp4", "nf4 nested", "nf4 in blocks of 128"])
def test_a_state_dict_quantized_in_another_way_is_refused(other):
    model = stack(FORMATS["nf4"])
    with ours.loading_scales(model), pytest.raises(ValueError, match="quantized in another way than the model"):
        model.load_state_dict(stack(FORMATS[other]).state_dict(), strict=False)


# Who is registered, and what is refused.


def test_register_and_unregister(monkeypatch):
    """Through the door of the package; and without bitsandbytes, or with one too old, only the Trainer is."""
    layers = {bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4, bnb.nn.Linear8bitLt}
    ours.unregister()
    hf_galore.unregister()
    before = dict(QUANTIZED)
    for installed, expected in ((True, layers), (False, set())):
        monkeypatch.setattr(hf_galore.integrations, "is_bitsandbytes_available", lambda installed=installed: installed)
        hf_galore.register()
        hf_galore.register()
        assert QUANTIZED.keys() - before.keys() == expected
        hf_galore.unregister()
        assert before == QUANTIZED
        hf_galore.unregister()


@each_format
def test_unregistered_layers_are_refused(form):
    ours.unregister()
    assert not any(kind.__module__.startswith("bitsandbytes") for kind in QUANTIZED)
    with pytest.raises(ValueError, match=r"'0' is quantized \(Linear.*\)\. Call hf_galore\.register\(\) first"):
        enable(stack(form), rank=8)
    mixed = nn.Sequential(nn.Linear(64, 64), *stack(form))
    with pytest.raises(ValueError, match=r"'1' is quantized"):
        enable(mixed, rank=8)
    enable(mixed, ["0"], rank=8)


@each_format
def test_disable_works_after_unregister(form):
    model = stack(form)
    enable(model, rank=8)
    ours.unregister()
    disable(model)
    assert not model[0].weight.requires_grad


@each_format
def test_the_optimizer_path_refuses_codes(form):
    with pytest.raises(ValueError, match=r"leaves 0 parameters to project.*quantized"):
        galore_param_groups(stack(form), "all-linear")


@each_format
def test_a_forward_of_its_own_is_refused(form):
    model = stack(form)
    model[2].forward = model[2].forward
    with pytest.raises(ValueError, match=r"'2' is quantized .* its forward has been replaced"):
        enable(model, rank=8)


@pytest.mark.parametrize(
    "layer", [bnb.nn.LinearNF4(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)], ids=["nf4", "int8"]
)
def test_a_layer_that_is_not_quantized_yet_is_refused(layer):
    with pytest.raises(ValueError, match="is not quantized yet: move the model to its device first"):
        enable(nn.Sequential(layer), rank=8)


def test_int8_layers_with_float_weights_stay_with_the_optimizer():
    """They quantize in every forward and train like any weight."""
    model = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear8bitLt(64, 64))
    with pytest.warns(UserWarning, match="1 of 2 target weights keep their full gradients"):
        engine = enable(model, rank=8)
    assert engine.unswapped == {"1.weight"}
