"""The CUDA kernels on a GPU: HF_GALORE_CUDA_KERNELS=native python -m pytest tests/gpu

They are held to their references on the same GPU and to the CPU. tests/test_cuda_kernels.py tests the same sources
without a GPU, by an emulation.
"""

import pytest
import torch
from torch.nn import Parameter

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit, native, ops
from hf_galore.rounding import RoundingKey

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA"),
    pytest.mark.skipif(
        torch.cuda.is_available() and not native.has_cuda_kernels(),
        reason=f"the CUDA kernels are not loaded: {native.reasons_for_none().get('cuda')}",
    ),
]

KEY = RoundingKey(2**63 + 5, 3, 2**64 - 9)
SHAPES = [(1, 1, 1), (130, 37, 70), (256, 384, 128), (1000, 513, 33)]
KEYS = pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])


def whole_numbers(*shape: int, limit: int = 3) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, shape, device="cuda").float()


@KEYS
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_add_lowrank_has_the_bits_of_the_cpu(m, n, k, transposed, key):
    """Of small whole numbers, whose sums are exact."""
    torch.manual_seed(m)
    left, right, weight = whole_numbers(m, k), whole_numbers(k, n) / 8, whole_numbers(m, n).bfloat16()
    if transposed:
        left, right = left.mT.contiguous().mT, right.mT.contiguous().mT
    expected = weight.cpu()
    with native.references_only():
        ops.add_lowrank_(expected, left.cpu(), right.cpu(), alpha=0.5, beta=0.75, key=key, first_row=5)
    ops.add_lowrank_(weight, left, right, alpha=0.5, beta=0.75, key=key, first_row=5)
    assert torch.equal(weight.cpu(), expected)


@KEYS
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_elementwise_has_the_bits_of_the_cpu(m, n, k, delta_dtype, key):
    torch.manual_seed(m)
    weight, delta = whole_numbers(m, n).bfloat16(), (whole_numbers(m, n) / 1024).to(delta_dtype)
    added, rounded, values = weight.cpu(), weight.cpu(), torch.randn(m, n, device="cuda")
    with native.references_only():
        ops.add_(added, delta.cpu(), alpha=0.5, beta=0.75, key=key, first_row=k)
        ops.round_into_(rounded, values.cpu(), key, k)
    once = weight.clone()
    ops.add_(once, delta, alpha=0.5, beta=0.75, key=key, first_row=k)
    ops.round_into_(weight, values, key, k)
    assert torch.equal(once.cpu(), added)
    assert torch.equal(weight.cpu(), rounded)


def stepped(cls: type, dtype: torch.dtype, references: bool, shape: tuple[int, int], steps: int = 5, **group: object):
    """A weight after some steps of an optimizer on the same gradients, natively or by the references."""
    torch.manual_seed(0)
    weight = Parameter(torch.randn(shape).to(dtype).cuda())
    optimizer = cls([{"params": [weight], **group}], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        weight.grad = torch.randn(shape).to(dtype).cuda()
        if references:
            with native.references_only():
                optimizer.step()
        else:
            optimizer.step()
    return weight.detach().double()


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proj_type", ["right", "left", None])
@pytest.mark.parametrize("shape", [(300, 200), (512, 1376)])
def test_steps_are_those_of_the_references(shape, proj_type, dtype, cls):
    """Up to what a last bit of a moment or of a weight can do: a hundredth of the way that the weights go."""
    group = {} if proj_type is None else {"rank": 16, "proj_type": proj_type, "update_proj_gap": 2, "subspace": "gram"}
    native_run, reference = (stepped(cls, dtype, references, shape, **group) for references in (False, True))
    start = stepped(cls, dtype, True, shape, steps=0, **group)
    assert (native_run - reference).norm() <= 0.01 * (reference - start).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_allocates_no_matrix(dtype):
    weight = Parameter(torch.randn(2048, 2048, device="cuda").to(dtype))
    weight.grad = torch.randn_like(weight)
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 32, "update_proj_gap": 100}], lr=1e-3, weight_decay=0.1)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < weight.numel()


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_many_matrices_take_few_launches(cls):
    """A product of each, the copy of its basis in bfloat16, and a few launches for all 48 together."""
    weights = [Parameter(torch.randn(256, 128 + 64 * (index % 2), device="cuda").bfloat16()) for index in range(48)]
    optimizer = cls([{"params": weights, "rank": 16, "update_proj_gap": 100, "proj_type": "right"}], lr=1e-3)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if event.self_device_time_total > 0) <= 2 * 48 + 20
