"""The real Trainer and TRL's SFTTrainer on a model whose linear layers BitLinear has made ternary through peft."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from trainer_cases import Run, assert_same, build, in_groups, llama, logged, projected_names, state_of, tokens, weights

from hf_galore.nn.convert import bitlinears

peft = pytest.importorskip("peft")
from hf_galore.integrations.peft import BitLinearConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("ours")

OPTIMIZERS = {
    "adamw_torch": {"optim_target_modules": None, "optim_args": None},
    "galore_adamw": {},
    "galore_adamw_8bit": {},
    "galore_adamw_layerwise": {},
}
BASES = {
    "llama-float32": llama,
    "qwen2-bfloat16": lambda: build(transformers.Qwen2Config, torch.bfloat16, num_key_value_heads=2),
}

# The weights under the ternary ones have two dtypes, and the optimizer does not know.
PAIRS = [(base, optim) for base in BASES for optim in OPTIMIZERS]
FAST = {("qwen2-bfloat16", "galore_adamw"), *(("llama-float32", optim) for optim in OPTIMIZERS)}


def on_bases(without=()):
    """Every base with every optimizer, but for `without`; in the fast run the second base has one."""
    chosen = [pair for pair in PAIRS if pair[1] not in without]
    marked = [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in chosen]
    return pytest.mark.parametrize(("base", "optim"), marked)


def adapted(base="llama-float32", **config):
    return peft.get_peft_model(BASES[base](), BitLinearConfig(task_type="CAUSAL_LM", **config))


@functools.cache
def unasked(base, optim):
    """The adapted base after three steps that nothing came between."""
    with tempfile.TemporaryDirectory() as folder:
        return Run(optim, Path(folder)).train(adapted(base), **OPTIMIZERS[optim]).model


def trained(model):
    return {name: value for name, value in weights(model).items() if "_proj" in name}


def codes(model):
    return torch.cat([layer.ternary().codes.flatten() for layer in bitlinears(model).values()])


@on_bases(without=["adamw_torch"])
def test_galore_projects_the_ternary_weights(base, optim, tmp_path):
    model = adapted(base)
    before, codes_before = weights(model), codes(model)
    trainer = Run(optim, tmp_path).train(model, tokens(4) * 16, max_steps=10, learning_rate=1e-2)
    layers = {f"{path}.weight" for path in bitlinears(model)}
    assert projected_names(trainer) == layers
    assert set(in_groups(trainer)) == set(trained(model))
    states = state_of(trainer)
    if not optim.endswith("layerwise"):  # whose states belong to small parameters
        assert {name for name, state in states.items() if "basis" in state} == layers
    after = weights(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(trained(model))
    assert {after[name].dtype for name in trained(model)} == {torch.float32}
    assert not torch.equal(codes(model), codes_before)
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.1


@on_bases()
def test_a_resumed_run_is_the_run_that_went_on(base, optim, tmp_path):
    settings = OPTIMIZERS[optim] | {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    whole = Run(optim, tmp_path).train(adapted(base), **settings)
    resumed = Run(optim, tmp_path / "resumed").trainer(adapted(base), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_the_checkpoint_is_an_adapter_and_the_base_is_the_original(tmp_path):
    original = llama()
    trainer = Run("galore_adamw", tmp_path).train(adapted(), save_strategy="steps", save_steps=3)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-3")
    assert_same(weights(loaded), weights(trainer.model))
    assert_same(weights(trainer.model.unload()), weights(original))


class Reference(transformers.TrainerCallback):
    """Asks for the logits of the original after each step, as preference training does."""

    def __init__(self, ids):
        self.ids, self.logits = ids, []

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **kwargs):
        trains = {name for name, param in model.named_parameters() if param.requires_grad}
        with model.disable_adapter():
            self.logits.append(model(self.ids).logits)
        assert trains == {name for name, param in model.named_parameters() if param.requires_grad}


@on_bases()
def test_the_original_can_be_asked_between_steps(base, optim, tmp_path):
    ids = torch.stack([sample["input_ids"] for sample in tokens(2)])
    expected = BASES[base]()(ids).logits
    reference = Reference(ids)
    asked = Run(optim, tmp_path).train(adapted(base), trainer={"callbacks": [reference]}, **OPTIMIZERS[optim])
    assert len(reference.logits) == 3
    assert all(torch.equal(logits, expected) for logits in reference.logits)
    assert_same(weights(asked.model), weights(unasked(base, optim)))


@pytest.mark.parametrize(
    ("base", "use_reentrant"),
    [("llama-float32", False), ("qwen2-bfloat16", True), pytest.param("llama-float32", True, marks=pytest.mark.slow)],
)
def test_gradient_checkpointing_changes_nothing(base, use_reentrant, tmp_path):
    settings = OPTIMIZERS["adamw_torch"]
    checkpointed = Run("adamw_torch", tmp_path / "checkpointed").train(
        adapted(base),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        **settings,
    )
    assert_same(weights(checkpointed.model), weights(unasked(base, "adamw_torch")))


def test_bfloat16_autocast_trains_float32_masters(tmp_path):
    model = adapted()
    before = codes(model)
    Run("galore_adamw", tmp_path).train(model, bf16=True, learning_rate=1e-2)
    assert {layer.weight.dtype for layer in bitlinears(model).values()} == {torch.float32}
    assert not torch.equal(codes(model), before)


def test_training_a_loaded_adapter_goes_on_from_it(tmp_path):
    model = Run("galore_adamw", tmp_path).train(adapted()).model
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True)
    trainer = Run("galore_adamw", tmp_path).train(loaded)
    assert set(in_groups(trainer)) == set(trained(loaded))
    assert not torch.equal(codes(loaded), codes(model))


# TRL.


@pytest.fixture
def chats(monkeypatch, tmp_path):
    """A dataset of texts, and a tokenizer of their characters."""
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [f"{a} + {b} = {a + b}" for a in range(8) for b in range(8)]
    characters = ["<|pad|>", "<|eos|>", *sorted(set("".join(texts)))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>", unk_token="<|pad|>"
    )
    return datasets.Dataset.from_dict({"text": texts}), fast


@pytest.mark.parametrize(
    ("base", "optim"),
    [
        ("llama-float32", "galore_adamw"),
        pytest.param("llama-float32", "adamw_torch", marks=pytest.mark.slow),
        pytest.param("qwen2-bfloat16", "adamw_torch", marks=pytest.mark.slow),
        pytest.param("qwen2-bfloat16", "galore_adamw", marks=pytest.mark.slow),
    ],
)
def test_sft_trainer_makes_the_adapter_and_trains_it(base, optim, chats, tmp_path):
    trl = pytest.importorskip("trl")
    data, tokenizer = chats
    original = BASES[base]()
    galore = {"optim_target_modules": "all-linear", "optim_args": "rank=8, update_proj_gap=4, scale=1.0"}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        optim=optim,
        learning_rate=1e-2,
        max_steps=10,
        logging_steps=1,
        save_steps=5,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **(galore if optim.startswith("galore") else {}),
    )

    def trainer():
        return trl.SFTTrainer(
            BASES[base](), arguments, train_dataset=data, processing_class=tokenizer, peft_config=BitLinearConfig()
        )

    first = trainer()
    first.train()
    layers = {f"{path}.weight" for path in bitlinears(first.model)}
    assert layers == {name for name in weights(first.model) if name.endswith("_proj.weight")}
    assert projected_names(first) == (layers if optim.startswith("galore") else set())
    losses = logged(first, "loss")
    assert losses[-1] < losses[0] - 0.2
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same(weights(resumed.model), weights(first.model))
    assert_same(weights(first.model.unload()), weights(original))
