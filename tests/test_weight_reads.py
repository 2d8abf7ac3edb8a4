"""Layers whose weight a model reads in place of calling them."""

import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_galore import replace_linear
from hf_galore.lowrank_backward import disable, enable
from hf_galore.nn.convert import bitlinears
from hf_galore.optim.adamw import GaLoreAdamW
from hf_galore.weight_reads import read_weights

STATES = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "state_size": 4}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32, "intermediate_size": 24}
BLOOM = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32}
ALTUP = {
    **TEXT,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "layer_types": ["full_attention"],
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0],
    "laurel_rank": 2,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 32,
}
READ = {
    "Mamba": ({**STATES, "time_step_rank": 2}, {"x_proj", "dt_proj", "out_proj"}),  # the first and last by a kernel
    "FalconMamba": ({**STATES, "time_step_rank": 2}, {"x_proj", "dt_proj", "out_proj"}),
    "Mamba2": ({**STATES, "num_heads": 4, "head_dim": 8, "n_groups": 1}, {"out_proj"}),
    "Jamba": ({**TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2, "attn_layer_offset": 1}, {"dt_proj"}),
    "Gemma3n": (ALTUP, {"correction_coefs", "prediction_coefs"}),
    "Bloom": (BLOOM, set()),
    "Bloom, in slices": ({**BLOOM, "pretraining_tp": 2, "slow_but_exact": True}, {"dense", "dense_4h_to_h"}),
    "Llama": (TEXT, set()),
    "Reformer": ({"is_decoder": True, "attn_layers": ["local", "lsh"]}, {"query_key", "value"}),
    "Bart": ({"encoder_layers": 1, "decoder_layers": 1}, set()),
}


def causal_lm(name):
    family, options = name.partition(",")[0], READ[name][0]
    kinds = {"Reformer": "ReformerModelWithLMHead"}
    config = getattr(transformers, family + ("TextConfig" if family == "Gemma3n" else "Config"))
    torch.manual_seed(0)
    return getattr(transformers, kinds.get(family, family + "ForCausalLM"))(config(**options))


def read_layers(model):
    read = read_weights(model)
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {path.rpartition(".")[2] for path, module in linear if id(module.weight) in read}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name):
    with torch.device("meta"):
        assert read_layers(causal_lm(name)) == READ[name][1]


class Branches(nn.Module):
    """Reads in branches of every kind."""

    def __init__(self, flag):
        super().__init__()
        self.flag = flag
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.first, self.second, self.third, self.fourth, self.asked = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        x = x.to(self.asked.weight.dtype) if isinstance(self.asked.weight, torch.Tensor) else x
        x = x @ self.first.weight if self.flag and not self.training else self.first(x)
        x = self.second(x) if self.flag else x @ self.second.weight
        if not self.flag:
            x = x @ self.fourth.weight
        return self.part(x)

    def part(self, x):
        x = x @ self.third.weight
        return self.asked(x @ self.layers[0].weight)


@pytest.mark.parametrize(
    ("flag", "read"), [(True, {"first", "third", "0", "1"}), (False, {"second", "third", "fourth", "0", "1"})]
)
def test_branches_that_attributes_switch_off_do_not_count(flag, read):
    assert read_layers(Branches(flag)) == read


def test_what_others_do_to_weights_does_not_count():
    """peft's layers read theirs to merge them, in methods and branches that a forward pass does not take."""
    model = get_peft_model(causal_lm("Llama"), LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    assert read_weights(model) == set()


def test_attention_of_torch_reads_its_output_projection():
    """And BitLinear leaves it out."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    assert read_layers(layer) == {"out_proj"}
    with pytest.warns(UserWarning, match="reads the weight of 'self_attn.out_proj'"):
        replace_linear(layer)
    assert set(bitlinears(layer)) == {"linear1", "linear2"}


def losses(model, optimizer):
    tokens, found = torch.randint(0, 32, (2, 8)), []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", ["FalconMamba", "Bloom, in slices", "Mamba2"])
def test_the_projected_backward_leaves_them_to_the_optimizer(name):
    """With a warning before training; and all of them train."""
    model = causal_lm(name)
    with pytest.warns(UserWarning, match="reads the weight in place of calling the module"):
        engine = enable(model, "all-linear", rank=2)
    assert {path.split(".")[-2] for path in engine.unswapped if path.endswith("weight")} == READ[name][1]
    optimizer = GaLoreAdamW(engine.param_groups(model), lr=1e-2)
    engine.attach(optimizer)
    before = {path: param.detach().clone() for path, param in model.named_parameters() if path in engine.unswapped}
    losses(model, optimizer)
    now = dict(model.named_parameters())
    assert [path for path, value in before.items() if torch.equal(value, now[path])] == []
    disable(model)


@pytest.mark.parametrize("name", ["FalconMamba", "Gemma3n", "Mamba2"])
def test_bitlinear_leaves_them_out(name):
    """With one warning from "all-linear"; an error where they are named."""
    model, read = causal_lm(name), READ[name][1]
    named = next(path for path, module in model.named_modules() if path.rpartition(".")[2] in read)
    with pytest.raises(ValueError, match=f"{named}.*leave it out"):
        replace_linear(model, [named])
    with pytest.warns(UserWarning, match="reads the weight"):
        replace_linear(model)
    made = {path.rpartition(".")[2] for path in bitlinears(model)}
    assert made
    assert not made & read


def test_models_without_reads_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_linear(causal_lm("Llama"))
