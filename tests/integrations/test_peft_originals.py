"""What parameters were before they were trained: kept in a file, or known for as long as they have not changed."""

import copy
import gc
import os
import pickle
import tempfile
import warnings

import pytest
import torch

from hf_galore.nn.originals import TensorFile, UnkeptOriginal

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def tensors():
    """Of many dtypes and shapes, not contiguous, with NaN and infinity."""
    values = torch.randn(7, 5)
    values[0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
    each = [values.to(dtype) for dtype in DTYPES]
    return [*each, values.t(), values[0], values[:, 1:3], torch.tensor(3.0), torch.empty(0, 5), torch.randn(300, 300)]


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_kept(originals, expected):
    for original, tensor in zip(originals, expected, strict=True):
        value = original.of(torch.zeros(1))
        assert (value.dtype, value.shape, original.dtype) == (tensor.dtype, tensor.shape, tensor.dtype)
        assert torch.equal(bits(value), bits(tensor))


def test_what_is_written_is_read_bit_for_bit():
    file = TensorFile()
    expected = tensors()
    originals = []
    for tensor in expected:
        originals.append(file.original(tensor))
        assert_kept(originals, expected[: len(originals)])  # reading between writes


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda originals: pickle.loads(pickle.dumps(originals))])
def test_copies_hold_the_same_and_outlive_the_first(copied):
    file = TensorFile()
    expected = tensors()
    originals = [file.original(tensor) for tensor in expected]
    copies = copied(originals)
    assert len({id(original.file) for original in copies}) == 1
    del file, originals
    gc.collect()
    assert_kept(copies, expected)


def test_copies_share_the_file_and_pickles_have_their_own():
    original = TensorFile().original(torch.ones(3))
    assert copy.deepcopy(original).file is original.file
    assert pickle.loads(pickle.dumps(original)).file is not original.file


def test_a_write_to_what_was_read_does_not_reach_the_file():
    file = TensorFile()
    original = file.original(torch.ones(3))
    original.of(torch.zeros(1)).fill_(2.0)
    file.original(torch.ones(1))  # the next read maps the file again
    assert torch.equal(original.of(torch.zeros(1)), torch.ones(3))


def test_the_file_has_no_name_and_is_closed_with_its_last_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = TensorFile()
    original = file.original(torch.ones(1000))
    value, descriptor = original.of(torch.zeros(1)), file._file.fileno()
    assert not list(tmp_path.iterdir())
    assert os.fstat(descriptor).st_size == 4000
    del file
    gc.collect()
    assert torch.equal(original.of(torch.zeros(1)), torch.ones(1000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del original
        gc.collect()
    assert not caught
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert torch.equal(value, torch.ones(1000))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk_is_an_error_when_it_is_written():
    file = TensorFile()
    file._file.close()
    file._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        file.original(torch.ones(3))
    file._file.close()


def test_tensor_subclasses_are_refused():
    class Subclass(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="a Subclass has no values of its own"):
        TensorFile().original(torch.ones(2).as_subclass(Subclass))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unkept_it_is_known_until_it_changes(dtype):
    first = torch.randn(6, 8).to(dtype)
    original = UnkeptOriginal(first)
    now = first.to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(bits(original.of(now)), bits(first))
    for change in (
        lambda w: w[2, 3].neg_(),
        lambda w: w.neg_(),
        lambda w: w.copy_(w.flip(0)),
        lambda w: w.copy_(w.flip(1)),
        lambda w: w[1, 1].fill_(torch.nan),
    ):
        changed = now.clone()
        change(changed)
        with pytest.raises(ValueError, match="the weight has changed and its original was not kept"):
            original.of(changed)
    assert torch.equal(bits(original.of(now)), bits(first))


def test_a_change_below_the_precision_of_the_original_is_none():
    first = torch.randn(4, 4, dtype=torch.bfloat16)
    now = first.float() * (1 + 2**-12)
    assert torch.equal(UnkeptOriginal(first).of(now), first)


@pytest.mark.parametrize("keep", [UnkeptOriginal, lambda tensor: TensorFile().original(tensor)])
def test_a_tensor_on_the_meta_device_has_no_original(keep):
    original = keep(torch.empty(3, 4, dtype=torch.bfloat16, device="meta"))
    value = original.of(torch.empty(3, 4, device="meta"))
    assert (value.is_meta, value.dtype) == (True, torch.bfloat16)
    with pytest.raises(ValueError, match="was on the meta device at first"):
        original.of(torch.ones(3, 4))
