"""The real Trainer on models that bitsandbytes has quantized: they train, are saved and resume like any other."""

import inspect

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from trainer_cases import LAYERWISE, METHODS, VOCABULARY, Run, assert_same, layers_of, llama, logged, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments

import hf_galore

CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
PURELY_QUANTIZED = "purely quantized models. Please attach trainable adapters"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved Llama; blocks of 64 end where its rows do, which bitsandbytes needs on a CPU."""
    folder = tmp_path_factory.mktemp("llama")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def quantized(checkpoint, config, **options):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=BitsAndBytesConfig(**config), **options
    )


def state(model):
    """A copy of the state dict: codes and scales as well as weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def ids():
    return torch.stack([sample["input_ids"] for sample in tokens(4)])


@each_config
def test_trains_is_saved_and_loads_again(config, checkpoint, ours, tmp_path):
    """Every matrix moves, the loss falls, and what save_pretrained writes computes the same."""
    model = quantized(checkpoint, config)
    start = state(model)
    trainer = Run("galore_adamw_layerwise", tmp_path).train(
        model, tokens(4), max_steps=12, learning_rate=1e-2, eval_strategy="no"
    )
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0]
    assert len(layers_of(trainer)) == 14
    trained = state(model)
    assert list(trained) == list(start)
    constant = ("quant_map", "quant_state", "weight_format", "bias")  # biases of quantized layers are frozen
    still = [name for name in start if torch.equal(start[name], trained[name])]
    assert [name for name in still if not any(part in name for part in constant)] == []
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(state(again), trained)
    model.eval()
    assert torch.equal(model(ids()).logits, again.eval()(ids()).logits)
    assert model.generate(ids()[:1], max_new_tokens=3).shape == (1, ids().shape[1] + 3)


@pytest.mark.parametrize(
    ("config", "optim"),
    [*((config, LAYERWISE[0]) for config in CONFIGS), *(("nf4", optim) for optim in LAYERWISE[1:])],
)
def test_resumes_to_the_bit(config, optim, checkpoint, ours, tmp_path):
    """Weights, codes and scales of an interrupted run are those of a whole one."""
    config = CONFIGS[config]
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    whole = quantized(checkpoint, config)
    Run(optim, tmp_path).train(whole, **settings)
    rest = quantized(checkpoint, config)
    Run(optim, tmp_path).trainer(rest, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(state(rest), state(whole))


@pytest.mark.parametrize("config", [CONFIGS["nf4 nested"], CONFIGS["int8"]], ids=["nf4 nested", "int8"])
def test_the_best_model_is_loaded_at_the_end(config, checkpoint, ours, tmp_path):
    """Also when it was evaluated before, after which int8 layers keep their scales elsewhere."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "learning_rate": 0.3, "max_steps": 3}  # it gets worse soon
    model = quantized(checkpoint, config)
    trainer = Run("galore_adamw_layerwise", tmp_path).trainer(model, trainer={"eval_dataset": tokens(4)}, **settings)
    trainer.evaluate()
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert trainer.state.best_model_checkpoint != str(tmp_path / "checkpoint-3")
    assert_same(state(model), state(best))


def test_a_bfloat16_model_trains(checkpoint, ours, tmp_path):
    model = quantized(checkpoint, CONFIGS["nf4"] | {"bnb_4bit_compute_dtype": torch.bfloat16}, dtype=torch.bfloat16)
    trainer = Run("galore_adamw_layerwise", tmp_path).train(model, tokens(4), max_steps=12, learning_rate=1e-2)
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0]
    assert {layer.update.dtype for layer in layers_of(trainer).values()} == {torch.bfloat16}


# Who may train a quantized model without adapters.


@each_config
@pytest.mark.parametrize("optim", [*METHODS, "adamw_torch"])
def test_only_the_layerwise_names_may(config, optim, checkpoint, ours, tmp_path):
    with pytest.raises(ValueError, match=PURELY_QUANTIZED):
        Run(optim, tmp_path).trainer(quantized(checkpoint, config))


def test_arguments_are_needed_to_say_so(checkpoint, ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=PURELY_QUANTIZED):
        Trainer(quantized(checkpoint, CONFIGS["nf4"]))


def test_a_failed_trainer_leaves_no_permission_behind(checkpoint, ours, tmp_path):
    with pytest.raises(RuntimeError, match="requires either a `model` or `model_init`"):
        Run("galore_adamw_layerwise", tmp_path).trainer(None)
    with pytest.raises(ValueError, match=PURELY_QUANTIZED):
        Run("adamw_torch", tmp_path).trainer(quantized(checkpoint, CONFIGS["nf4"]))


def test_other_quantizations_are_refused_as_before(ours, tmp_path):
    """Whatever else calls itself quantized, and a compiled model."""
    model = llama()
    model.is_quantized = True
    with pytest.raises(ValueError, match=PURELY_QUANTIZED):
        Run("galore_adamw_layerwise", tmp_path).trainer(model)


def test_a_compiled_quantized_model_is_refused_as_before(checkpoint, ours, tmp_path):
    model = quantized(checkpoint, CONFIGS["nf4"])
    object.__setattr__(model, "_orig_mod", model)
    with pytest.raises(ValueError, match=r"cannot fine-tune quantized model with `torch\.compile"):
        Run("galore_adamw_layerwise", tmp_path).trainer(model)


def test_after_unregister_nobody_may(checkpoint, tmp_path):
    hf_galore.register()
    hf_galore.unregister()
    with pytest.raises(ValueError, match=PURELY_QUANTIZED):
        Run("galore_adamw_layerwise", tmp_path).trainer(quantized(checkpoint, CONFIGS["nf4"]))


def test_the_trainer_keeps_its_signature():
    before = inspect.signature(Trainer)
    hf_galore.register()
    try:
        assert inspect.signature(Trainer) == before
        assert Trainer(llama(), TrainingArguments(report_to=[], use_cpu=True)).args is not None
    finally:
        hf_galore.unregister()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("config", ["nf4", "int8"])
def test_under_trl(config, checkpoint, ours, tmp_path):
    """SFTTrainer, which knows of quantized models only with adapters, trains the codes."""
    trl = pytest.importorskip("trl")
    model = quantized(checkpoint, CONFIGS[config])
    start = state(model)
    words = {str(number): number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="2")), pad_token="0", eos_token="1"
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        optim="galore_adamw_layerwise",
        optim_target_modules="all-linear",
        optim_args="rank=8, update_proj_gap=2, scale=1.0",
        learning_rate=1e-2,
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    data = Dataset.from_list([{"input_ids": sample["input_ids"].tolist()} for sample in tokens(16)])
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert len(layers_of(trainer)) == 14
    codes = [name for name in start if name.endswith("_proj.weight")]
    assert len(codes) == 14
    trained = state(model)
    assert not any(torch.equal(start[name], trained[name]) for name in codes)
