"""Matrices, and what every basis of one must be: shared by the tests of the subspaces."""

import torch

from hf_galore.subspace import SUBSPACES, refresh, resolve_side

TALL, WIDE, SQUARE = (24, 12), (12, 24), (16, 16)
ROOMY = (48, 32)  # rank 4 and the oversampling of `randomized` are less than its sides


def take(grad, rank, proj_type="std", method="svd", previous=None, seed=0):
    """(basis, reason, side) of a refresh."""
    side = resolve_side(proj_type, grad.shape)
    return *refresh(grad, rank, side, SUBSPACES[method], previous, seed), side


def blocks(basis, side, shape):
    return basis.split(list(side.sizes(*shape[-2:])), dim=-2)


def assert_orthonormal(basis, side, shape, bound=1e-5):
    for block in blocks(basis, side, shape):
        gram = block.mT @ block
        assert (gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).abs().max() <= bound


def assert_not_axis_aligned(basis):
    """No column is (nearly) a coordinate axis: its largest entry carries less than 98 % of its norm."""
    assert basis.abs().amax(dim=-2).max() < 0.99


def low_rank_matrix(shape, k, seed=0):
    torch.manual_seed(seed)
    return torch.randn(*shape[:-1], k) @ torch.randn(*shape[:-2], k, shape[-1])
