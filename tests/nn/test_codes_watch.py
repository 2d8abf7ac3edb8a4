"""What the codes do, against counting them one by one."""

import pytest
import torch

from hf_galore.nn.bitlinear import BitLinear
from hf_galore.nn.statistics import CodesWatch


@pytest.mark.parametrize("rows", [(8, 12), (7, 5)])  # codes of 7 rows are kept without packing
def test_shares_are_those_of_all_weights(rows):
    layers = [BitLinear(6, m) for m in rows]
    watch = CodesWatch(layers)
    before = [layer.ternary().codes.clone() for layer in layers]
    first = watch.look()
    size = 6 * sum(rows)
    zeros = sum(int((codes == 0).sum()) for codes in before)
    assert first == pytest.approx((zeros / size, 0.0, zeros / size))
    with torch.no_grad():
        for layer in layers:
            layer.weight.add_(torch.randn_like(layer.weight) * 0.1)
    after = [layer.ternary().codes for layer in layers]
    second = watch.look()
    pairs = list(zip(before, after, strict=True))
    flipped = sum(int((one != other).sum()) for one, other in pairs)
    dead = sum(int(((one == 0) & (other == 0)).sum()) for one, other in pairs)
    assert second == pytest.approx(
        (sum(int((codes == 0).sum()) for codes in after) / size, flipped / size, dead / size)
    )
    assert 0 < flipped < size
    assert watch.look().flipped == 0.0
