"""Models that accelerate has spread over devices: its hooks stand in for every module's forward."""

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from trainer_cases import LAYERWISE, METHODS, Run, assert_same, layers_of, llama, logged, projected_names, weights

from hf_galore.lowrank_backward import disable, enable


def spread() -> nn.Module:
    """The model with hooks as on several devices, all of which are the CPU here."""
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    return dispatch_model(llama(), dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("method", [*METHODS, *LAYERWISE])
def test_trains_as_the_model_without_hooks(method, ours, tmp_path):
    plain, hooked = (Run(method, tmp_path).train(model) for model in (llama(), spread()))
    assert_same(weights(hooked.model), weights(plain.model))
    assert logged(hooked, "loss") == logged(plain, "loss")
    assert len(projected_names(hooked)) == 14


def test_layers_are_swapped_below_the_hooks(ours, tmp_path):
    """The hooks still see the layers' inputs, and the model is the user's own again after training."""
    model = spread()
    hooked = model.model.layers[0].mlp.up_proj.forward
    trainer = Run(LAYERWISE[0], tmp_path).train(model)
    assert len(layers_of(trainer)) == 14
    assert model.model.layers[0].mlp.up_proj.forward is hooked
    remove_hook_from_submodules(model)
    own = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(module.forward.__func__ is nn.Linear.forward for module in own)
    assert all(param.requires_grad for param in model.parameters())


def test_disable_gives_back_what_the_hooks_call():
    model = spread()
    before, x = model(torch.arange(8)[None]).logits, torch.arange(8)[None]
    enable(model, rank=4)
    assert torch.equal(model(x).logits, before)
    disable(model)
    assert torch.equal(model(x).logits, before)
    assert not [name for name, _ in model.named_parameters() if "lowrank" in name]


def test_an_offloaded_weight_is_not_swapped():
    """It is on no device between forward passes: neither a fold nor an optimizer could write to it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    add_hook_to_module(model[1], AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.warns(UserWarning, match="1 of 2 target weights keep their full gradients"):
        engine = enable(model, rank=4)
    assert len(engine.layers) == 1
