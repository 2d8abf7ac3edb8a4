"""A run of the projected backward goes on from a checkpoint bit for bit."""

import pytest
import torch
from lowrank_cases import (
    STACK,
    adafactor,
    adamw,
    adamw8bit,
    assert_equal_states,
    assert_same,
    backward,
    each_refresh,
    on_engine,
    saved,
    torch_adamw,
    train,
    weights,
)

# Resume.

RESUMED = {
    "AdamW": (adamw, torch.float32),
    "AdamW, bf16 weights": (adamw, torch.bfloat16),
    "AdamW, bf16 states": (lambda groups: adamw(groups, state_dtype="bfloat16"), torch.bfloat16),
    "8-bit AdamW": (adamw8bit, torch.float32),
    "Adafactor": (adafactor(), torch.float32),
    "torch AdamW": (torch_adamw, torch.float32),
    "torch AdamW, bf16 weights": (torch_adamw, torch.bfloat16),
    "torch SGD": (lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9), torch.float32),
}


@each_refresh
@pytest.mark.parametrize("fold_every", [1, 3])
@pytest.mark.parametrize("stop", [3, 4, 5], ids=["before a refresh", "at a refresh", "after a refresh"])
@pytest.mark.parametrize(("make", "dtype"), RESUMED.values(), ids=RESUMED)
def test_resume_is_bit_identical(make, dtype, stop, fold_every, how):
    """The refresh is the fifth step, number 4: the run stops after 3, 4 or 5 steps.

    Saving folds. So with fold_every > 1 the resumed run is the bits of the run that saved, and equals one that never
    saved to rounding (TestStateDict).
    """
    options = {"refresh": how, "fold_every": fold_every, "update_proj_gap": 4, "stagger": False}
    model, optimizer, _ = on_engine(STACK, dtype, make, **options)
    train(STACK, model, optimizer, range(stop))
    checkpoint = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(STACK, model, optimizer, range(stop, stop + 6))

    resumed, again, _ = on_engine(STACK, dtype, make, seed=1, **options)
    resumed.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    train(STACK, resumed, again, range(stop, stop + 6))
    assert_same(weights(resumed), weights(model))
    assert_equal_states(saved(again.state_dict()), saved(optimizer.state_dict()))


@each_refresh
@pytest.mark.parametrize("fold_every", [1, 3])
@pytest.mark.parametrize("used", [1, 4, 5])
def test_going_back_to_a_checkpoint_in_a_used_pair(how, fold_every, used):
    """A loss that went wrong: the last checkpoint is loaded into the pair at hand, after a backward pass."""
    options = {"refresh": how, "fold_every": fold_every, "update_proj_gap": 4}
    model, optimizer, _ = on_engine(STACK, **options)
    train(STACK, model, optimizer, range(3))
    checkpoint = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(STACK, model, optimizer, range(3, 8))

    other, again, _ = on_engine(STACK, seed=1, **options)
    train(STACK, other, again, range(20, 20 + used))
    backward(STACK, other, 30)
    other.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    train(STACK, other, again, range(3, 8))
    assert_same(weights(other), weights(model))
