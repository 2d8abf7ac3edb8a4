"""Bases as integers: half a level off at most, of the bytes that are promised, and nearly the same subspace."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_galore.basis_store import BASIS_DTYPES, Float, Integer, basis_format

LEVELS = {8: 127, 4: 7}
BLOCK = 128

KINDS = {
    "normal": lambda shape, generator: torch.randn(shape, generator=generator),
    "orthonormal": lambda shape, generator: torch.linalg.qr(torch.randn(shape, generator=generator))[0],
    "zeros": lambda shape, generator: torch.zeros(shape),
    "ones": lambda shape, generator: torch.ones(shape),
    "one number in a hundred": lambda shape, generator: (torch.rand(shape, generator=generator) < 0.01).float(),
    "of all sizes": lambda shape, generator: torch.randn(shape, generator=generator).mul_(3).exp_(),
}


def peaks(basis):
    """The largest magnitude among the 128 values of each element's block, in the basis's shape."""
    blocks = basis.flatten().split(BLOCK)
    return torch.cat([block.abs().max().expand(len(block)) for block in blocks]).view(basis.shape)


def unpacked(codes, bits, rows):
    """The codes, written literally: number by number."""
    if bits == 8:
        return codes.tolist()
    if codes.dim() > 2:
        return [unpacked(part, bits, rows) for part in codes]
    signed = [value - 16 if value >= 8 else value for value in range(16)]
    low = [[signed[byte % 16] for byte in row] for row in codes.tolist()]
    high = [[signed[byte // 16] for byte in row] for row in codes.tolist()]
    return (low + high)[:rows]


any_basis = given(
    bits=st.sampled_from([8, 4]),
    batch=st.sampled_from([(), (1,), (3,), (2, 3)]),
    rows=st.integers(1, 45),
    cols=st.integers(1, 20),
    kind=st.sampled_from(list(KINDS)),
    scale=st.sampled_from([1.0, 1e-30, 1e30]),
    work=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)


def made(batch, rows, cols, kind, scale, work, seed):
    generator = torch.Generator().manual_seed(seed)
    return KINDS[kind]((*batch, rows, cols), generator).to(work) * scale


@settings(max_examples=300, deadline=None, derandomize=True)
@any_basis
def test_property_half_a_level_of_the_blocks_peak(bits, batch, rows, cols, kind, scale, work, seed):
    """The division, the kept scale and the product are rounded in float32 besides: five roundings of up to L levels.

    10 · 127 · 2⁻²⁴ < 1e-4 of half a level.
    """
    basis = made(batch, rows, cols, kind, scale, work, seed)
    kept = Integer(bits, basis.shape[-2], work)
    found = kept.decode(kept.encode(basis))
    assert (found.dtype, found.shape, found.is_contiguous()) == (work, basis.shape, True)
    assert ((found - basis).abs() <= peaks(basis) / (2 * LEVELS[bits]) * (1 + 1e-4)).all()
    at_peak = basis.abs() == peaks(basis)
    torch.testing.assert_close(found[at_peak], basis[at_peak], rtol=1e-6, atol=0)
    assert torch.equal(kept.decode(kept.encode(-basis)), -found)


@settings(max_examples=200, deadline=None, derandomize=True)
@any_basis
def test_property_bytes_and_codes(bits, batch, rows, cols, kind, scale, work, seed):
    """A byte or half a byte for each value and nothing behind it; the codes are what an even rounding gives."""
    basis = made(batch, rows, cols, kind, scale, work, seed)
    rows, cols = basis.shape[-2:]
    state = Integer(bits, rows, work).encode(basis)
    assert list(state) == ["basis", "basis_scale"]
    height = rows if bits == 8 else math.ceil(rows / 2)
    assert state["basis"].dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert state["basis"].shape == (*batch, height, cols)
    assert state["basis_scale"].dtype == torch.float32
    assert state["basis_scale"].shape == (math.ceil(basis.numel() / BLOCK),)
    for value in state.values():
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.numel() * value.itemsize
    codes = torch.tensor(unpacked(state["basis"], bits, rows)).view(basis.shape)
    exact = basis.double() / peaks(basis).double().clamp(min=1e-300) * LEVELS[bits]
    assert codes.abs().max() <= LEVELS[bits]
    assert ((codes - exact).abs() <= 0.5 + 1e-4).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@any_basis
def test_property_what_was_decoded_is_encoded_to_the_same(bits, batch, rows, cols, kind, scale, work, seed):
    """The same codes; a scale L·s/L may be off by its two roundings."""
    basis = made(batch, rows, cols, kind, scale, work, seed)
    kept = Integer(bits, basis.shape[-2], work)
    once = kept.encode(basis)
    again = kept.encode(kept.decode(once))
    assert torch.equal(again["basis"], once["basis"])
    if basis.any():
        torch.testing.assert_close(again["basis_scale"], once["basis_scale"], rtol=2**-22, atol=1e-37)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([8, 4]),
    m=st.integers(4, 60),
    n=st.integers(4, 60),
    decay=st.floats(0.0, 3.0),
    share=st.floats(0.1, 1.0),
    seed=st.integers(0, 2**31),
)
def test_property_captured_energy(bits, m, n, decay, share, seed):
    """‖G Q'‖ differs from ‖G Q‖ by ‖G‖₂·‖Q' − Q‖ at most, and each entry of Q' − Q is half a level of its block."""
    generator = torch.Generator().manual_seed(seed)
    size = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(k, size, generator=generator).double())[0] for k in (m, n))
    grad = left * torch.arange(1, size + 1, dtype=torch.float64) ** -decay @ right.mT
    basis = torch.linalg.svd(grad, full_matrices=False)[2][: max(1, int(share * size))].mT.contiguous()
    kept = Integer(bits, n, torch.float64)
    rough = kept.decode(kept.encode(basis))
    bound = torch.linalg.matrix_norm(grad, 2) * (peaks(basis) / (2 * LEVELS[bits])).norm() * (1 + 1e-4)
    assert ((grad @ rough).norm() - (grad @ basis).norm()).abs() <= bound
    if bits == 8:  # what the bound comes to: peaks are below 1, so 1/254 for each of n·r entries, at most
        assert (grad @ rough).norm() / (grad @ basis).norm() == pytest.approx(1.0, abs=math.sqrt(n * size) / 254)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_floats_are_rounded_once_and_kept_in_their_dtype(dtype):
    basis = torch.randn(7, 3, dtype=torch.float64)
    state = Float(dtype).encode(basis)
    assert list(state) == ["basis"]
    assert torch.equal(state["basis"], basis.to(dtype))
    assert state["basis"].dtype == dtype
    assert Float(dtype).decode(state) is state["basis"]


@pytest.mark.parametrize("work", [torch.float32, torch.float64], ids=str)
def test_which_format(work):
    """`basis_dtype` goes first, then `state_dtype`, then the working precision."""
    for state_dtype in (None, torch.float32, torch.bfloat16):
        assert basis_format(None, state_dtype, 7, work) == Float(state_dtype or work)
        assert basis_format("float32", state_dtype, 7, work) == Float(torch.float32)
        assert basis_format("bfloat16", state_dtype, 7, work) == Float(torch.bfloat16)
        assert basis_format("int8", state_dtype, 7, work) == Integer(8, 7, work)
        assert basis_format("int4", state_dtype, 7, work) == Integer(4, 7, work)
    assert list(BASIS_DTYPES) == ["float32", "bfloat16", "int8", "int4"]
