"""TRL's trainers with the reference model in the adapter "ref": a frozen copy of the adapter that they train."""

import math
from contextlib import nullcontext

import pytest
import torch
from parts import slow
from safetensors.torch import load_file
from trainer_cases import assert_same, logged, weights
from transformers import AutoModelForCausalLM, Qwen2Config
from trl_cases import GALORE, SAVED, SHAPE, save_model, trl_trainer

from hf_galore.integrations.bitnet import save_bitnet
from hf_galore.nn.convert import bitlinears
from hf_galore.nn.warmup import set_lambdas

peft = pytest.importorskip("peft")
from hf_galore import AttentionBiasConfig, BitLinearConfig, RegisterTokensConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("ours")

# A trainer, what it trains with, and what it logs in its first step if the reference is the policy.
RUNS = {
    "DPO": ({"optim": "galore_adamw_layerwise", **GALORE}, {"loss": math.log(2)}),
    "KTO": ({"optim": "galore_adamw", **GALORE}, {"loss": 0.5, "kl": 0.0}),
    "GRPO": ({"optim": "adamw_torch"}, {"kl": 0.0}),
    "RLOO": ({"optim": "adamw_torch"}, {"kl": 0.0}),
}
METHODS = {
    "bitlinear": lambda: BitLinearConfig(task_type="CAUSAL_LM", use_sub_norm=True, modules_to_save=["lm_head"]),
    "attention_bias": lambda: AttentionBiasConfig(task_type="CAUSAL_LM"),
    "register_tokens": lambda: RegisterTokensConfig(task_type="CAUSAL_LM"),
}
X = torch.arange(3, 35).view(2, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with biases, of which an adapter with norms of its own is made."""
    return save_model(tmp_path_factory.mktemp("model"), Qwen2Config(**SHAPE, num_key_value_heads=2))


def adapted(folder, method="bitlinear"):
    """The model with an adapter that has learned something before the trainer is made."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), METHODS[method]())
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param), alpha=0.05)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=X).logits


def with_reference(model):
    """The model after what TRL's trainers do to it."""
    model.add_adapter("ref", model.peft_config["default"])
    return model


def trains(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("DPO", "bitlinear"),
        *(slow(name, "bitlinear") for name in RUNS if name != "DPO"),
        ("DPO", "attention_bias"),
        ("DPO", "register_tokens"),
    ],
)
def test_the_reference_is_the_policy_of_the_start_through_a_run_and_a_resume(name, method, folder, tmp_path):
    settings, expected = RUNS[name]
    if method != "bitlinear":
        settings = {"optim": "adamw_torch"}
    first = trl_trainer(name, adapted(folder, method), folder, tmp_path, **settings)
    model, policy = first.model, logits(first.model)
    first.train()
    for key, value in expected.items():
        assert logged(first, key)[0] == pytest.approx(value, abs=1e-4)  # logged with four digits
    trained = logits(model)
    assert not torch.equal(trained, policy)
    model.set_adapter("ref")
    assert torch.equal(logits(model), policy)
    model.set_adapter("default")
    assert torch.equal(logits(model), trained)

    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    base = AutoModelForCausalLM.from_pretrained(folder)
    for start in (adapted(folder, method), peft.PeftModel.from_pretrained(base, checkpoint, is_trainable=True)):
        resumed = trl_trainer(name, start, folder, tmp_path / "resumed", **settings)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_same(weights(resumed.model), weights(model))
        resumed.model.set_adapter("ref")
        assert torch.equal(logits(resumed.model), policy)


def test_a_copy_is_two_bits_a_weight_and_leaves_the_policy_alone(folder):
    """Each layer's matrix has a quarter of a byte a weight, and its vectors are as they were."""
    model = adapted(folder)
    before, expected, trained = dict(model.state_dict()), trains(model), logits(model)
    with_reference(model)
    layers = bitlinears(model).values()
    vectors = sum(p.nbytes for layer in layers for n, p in layer.named_parameters() if n != "weight") + 4 * len(layers)
    held = sum(value.nbytes for layer in layers for value in layer.frozen["ref"].values().values())
    assert held == vectors + sum(layer.weight.numel() for layer in layers) // 4
    assert_same({name: value for name, value in model.state_dict().items() if ".ref." not in name}, before)
    model.set_adapter("ref")
    assert torch.equal(logits(model), trained)
    assert not trains(model) & expected
    model.set_adapter("default")
    assert torch.equal(logits(model), trained)
    assert trains(model) == expected


def test_what_is_frozen_stays_frozen_and_the_original_is_known_whatever_is_switched(folder):
    """Weights of the layers are frozen, as by the projected backward: they are so again after each way around."""
    model = with_reference(adapted(folder))
    for layer in bitlinears(model).values():
        layer.weight.requires_grad_(False)
    expected, policy = trains(model), logits(model)
    with torch.no_grad():
        for layer in bitlinears(model).values():
            layer.weight.neg_()
    after = logits(model)
    model.set_adapter("ref")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert torch.equal(logits(model), policy)
    with model.disable_adapter():
        model.set_adapter("default")
    assert trains(model) == expected
    assert torch.equal(logits(model), after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_copy_keeps_its_precision(dtype, folder):
    model = with_reference(adapted(folder))
    model.set_adapter("ref")
    expected = logits(model)
    with pytest.warns(UserWarning, match="keeps its weight in float32") if dtype == torch.bfloat16 else nullcontext():
        model.base_model.to(dtype)
    layer = bitlinears(model)["base_model.model.model.layers.0.mlp.down_proj"]
    assert {value.dtype for value in layer.frozen["ref"].values().values()} == {torch.uint8, torch.float32}
    model.base_model.float()
    assert dtype == torch.bfloat16 or torch.equal(logits(model), expected)


def test_files_of_policy_and_reference_are_told_apart(folder, tmp_path):
    model = with_reference(adapted(folder))
    with torch.no_grad():
        for layer in bitlinears(model).values():
            layer.weight.neg_()
    policy = logits(model)
    model.save_pretrained(tmp_path)
    model.set_adapter("ref")
    reference = logits(model)

    def base():
        return AutoModelForCausalLM.from_pretrained(folder)

    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(loaded), policy)
    loaded.load_adapter(tmp_path / "ref", "start")
    assert torch.equal(logits(loaded), policy)
    loaded.set_adapter("start")
    assert torch.equal(logits(loaded), reference)
    with pytest.raises(ValueError, match="'default': the file has a frozen copy, and no weights"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "ref")
    with pytest.raises(ValueError, match="'start' is a frozen copy here, and the file has weights"):
        loaded.load_adapter(tmp_path, "start")


def test_exports_and_merges_are_those_of_the_policy(folder, tmp_path):
    alone, beside = (
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), BitLinearConfig(task_type="CAUSAL_LM"))
        for _ in range(2)
    )
    with_reference(beside)
    for name, model in {"alone": alone, "beside": beside}.items():
        save_bitnet(model, tmp_path / name)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "beside")]
    assert_same(files[1], files[0])
    beside.set_adapter("ref")
    with pytest.raises(ValueError, match="'ref' is a frozen copy, which is not merged"):
        beside.merge_and_unload()
    with pytest.raises(ValueError, match="'default' has the frozen copy 'ref': delete that adapter first"):
        beside.delete_adapter("default")
    beside.delete_adapter("ref")
    assert beside.active_adapter == "default"
    assert not any(layer.frozen for layer in bitlinears(beside).values())
    merged = with_reference(beside).merge_and_unload(weights="packed")
    assert_same(merged.state_dict(), alone.merge_and_unload(weights="packed").state_dict())


def test_a_policy_that_is_partly_quantized_has_its_reference_beside_it(folder, tmp_path):
    """Refused, and the remedies that the error names."""
    model, second = adapted(folder), adapted(folder)
    for one in (model, second):
        set_lambdas(one, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"weight_lambda=0.5, .* Set these \(set_lambdas\), or .* ref_model=second"):
        trl_trainer("DPO", model, folder, tmp_path)
    assert list(model.peft_config) == ["default"]
    trainer = trl_trainer("DPO", model, folder, tmp_path, {"ref_model": second.get_base_model()}, optim="adamw_torch")
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    set_lambdas(second, 1.0, 1.0)
    assert list(with_reference(second).peft_config) == ["default", "ref"]


def test_ranks_without_weights_make_no_copy(folder, monkeypatch):
    model = adapted(folder)
    monkeypatch.setattr("hf_galore.integrations.peft.is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="FSDP_CPU_RAM_EFFICIENT_LOADING: ranks other than the first"):
        with_reference(model)


def test_data_parallel_ranks_do_not_send_copies(folder):
    model = with_reference(adapted(folder))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        sent = {id(buffer) for buffer in wrapped.modules_buffers}
    finally:
        torch.distributed.destroy_process_group()
    names = [name for name, buffer in model.named_buffers() if id(buffer) not in sent]
    assert len(names) == 38  # 14 codes, 14 scales, 6 biases, 4 norms
    assert all(".copies.ref." in name for name in names)
