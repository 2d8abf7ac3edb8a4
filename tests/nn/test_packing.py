"""Codes in two bits: the round trip, and the layout of transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_galore.nn.packing import pack_ternary, unpack_ternary


@given(quarter=st.integers(1, 9), columns=st.integers(1, 17), seed=st.integers(0, 2**31))
def test_codes_come_back(quarter, columns, seed):
    codes = random_codes(4 * quarter, columns, seed)
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (quarter, columns)
    assert torch.equal(unpack_ternary(packed), codes)
    assert unpack_ternary(packed).dtype == torch.int8


@settings(deadline=None)  # the first example imports transformers
@given(quarter=st.integers(1, 9), columns=st.integers(1, 17), seed=st.integers(0, 2**31))
def test_layout_is_that_of_transformers(quarter, columns, seed):
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    codes = random_codes(4 * quarter, columns, seed)
    packed = pack_ternary(codes)
    assert torch.equal(packed, bitnet.pack_weights(codes.clone()))
    with torch.compiler.set_stance("force_eager"):  # theirs is compiled, which takes long and changes nothing
        assert torch.equal(bitnet.unpack_weights(packed, torch.int8), codes)


def test_a_byte_by_hand():
    codes = torch.tensor([[-1], [0], [1], [1]], dtype=torch.int8)
    assert pack_ternary(codes).item() == 0b10_10_01_00


def test_rows_that_4_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 rows cannot be packed"):
        pack_ternary(torch.zeros(6, 3, dtype=torch.int8))


def random_codes(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
