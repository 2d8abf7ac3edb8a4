"""GGUF files of ternary models, read by the package gguf and by transformers."""

import json

import llama_cpp
import numpy as np
import pytest
import torch
from gguf_tokenizers import TEXTS, WRITTEN, bpe, sentencepiece
from parts import in_part
from tokenizers import AddedToken, Tokenizer, normalizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hf_galore
from hf_galore.integrations.bitnet import save_bitnet
from hf_galore.nn.convert import bitlinears

gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 320,  # so that 256 does not divide the inputs of down_proj
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def ternary(model):
    torch.manual_seed(0)
    for name, param in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            nn.init.normal_(param, mean=float("norm" in name), std=0.2)
    return hf_galore.replace_linear(model).eval()


def llama(**config):
    return ternary(LlamaForCausalLM(LlamaConfig(**SIZES | config)))


MODELS = {
    "llama": llama,
    "qwen2": lambda **config: ternary(Qwen2ForCausalLM(Qwen2Config(**SIZES | config))),
    "qwen3": lambda **config: ternary(
        Qwen3ForCausalLM(Qwen3Config(**SIZES | config, head_dim=128, tie_word_embeddings=True))
    ),
}


@pytest.mark.parametrize("gguf_type", ["tq2_0", "tq1_0"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_model(tmp_path, name, gguf_type):
    model = MODELS[name]()
    report = save_bitnet(model, tmp_path / "out", "gguf", gguf_type=gguf_type)
    assert report.codes_equal
    assert report.unconverted["model.layers.0.mlp.down_proj"] == "256 does not divide in_features"
    assert ("lm_head" in report.unconverted) == (name != "qwen3")
    assert "codes equal, logits not computed" in str(report)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").eval()
    state, layers = loaded.state_dict(), bitlinears(model)
    for path, layer in layers.items():
        codes, scale = layer.ternary()
        assert torch.equal(state[f"{path}.weight"], codes * scale.half().float())
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] not in layers or key.endswith("bias"):
            assert torch.equal(state[key], value.half().float() if value.dim() > 1 else value)

    for layer in layers.values():
        layer.quantize_activations = False
    tokens = torch.arange(32).view(2, 16)
    expected = model(tokens).logits
    assert (loaded(tokens).logits - expected).norm() <= 5e-3 * expected.norm()


def test_biases_of_rotated_heads_move_with_their_rows(tmp_path):
    model = llama(attention_bias=True)
    save_bitnet(model, tmp_path / "out", "gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", attention_bias=True)
    for name in ("q_proj", "k_proj", "v_proj"):
        expected = getattr(model.model.layers[0].self_attn, name).bias
        assert torch.equal(getattr(loaded.model.layers[0].self_attn, name).bias, expected)


def test_matrices_are_two_bits_a_weight(tmp_path):
    save_bitnet(llama(), tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_up.weight"].n_bytes == 320 * 66
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "TQ2_0"
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["token_embd.weight"].tensor_type.name == "F16"
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert reader.fields["tokenizer.ggml.model"].contents() == "none"
    assert reader.fields["llama.attention.head_count_kv"].contents() == 1


def gguf_of(tokenizer, tmp_path):
    """The file of a small model with the tokenizer."""
    save_bitnet(llama(vocab_size=448), tmp_path / "out", "gguf", tokenizer=tokenizer)
    return tmp_path / "out" / "model.gguf"


def test_tokenizer_comes_back(tmp_path):
    written = bpe(vocab_size=300)
    written.chat_template = "{{ messages }}"
    save_bitnet(llama(), tmp_path / "out", "gguf", tokenizer=written)
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 320
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[written.convert_tokens_to_ids("<s>")] == gguf.TokenType.CONTROL
    assert kinds[written.convert_tokens_to_ids("<tool>")] == gguf.TokenType.USER_DEFINED
    assert kinds[319] == gguf.TokenType.UNUSED
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "the quick dog jumps"
    assert read.encode(text, add_special_tokens=False) == written.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", WRITTEN)
def test_flags_say_what_the_tokenizer_does(tmp_path, name):
    make, begins, ends = WRITTEN[name]
    written = make()
    file = gguf_of(written, tmp_path)
    fields = gguf.GGUFReader(file).fields
    flags = [fields[f"tokenizer.ggml.add_{kind}_token"].contents() for kind in ("bos", "eos")]
    assert flags == [begins, ends]
    assert fields["tokenizer.ggml.pre"].contents() in name.replace("llama 3", "llama-bpe")


@llama_cpp.needed
@pytest.mark.parametrize("name", in_part(WRITTEN, "gpt-2 with bos", "qwen2", "llama 3"))
def test_llama_cpp_makes_the_same_tokens(tmp_path, name):
    make, begins, ends = WRITTEN[name]
    written = make()
    answer = llama_cpp.ask(gguf_of(written, tmp_path), TEXTS)
    assert (answer["begins"], answer["ends"]) == (begins, ends)
    for text, found in zip(TEXTS, answer["texts"], strict=True):
        around = [written.bos_token_id] * begins, [written.eos_token_id] * ends
        assert [*around[0], *found, *around[1]] == written(text)["input_ids"], text


def changed(part, **values):
    """The tokenizer of GPT-2's kind with other values in a part of its description."""
    return remade(bpe(), lambda description: description[part].update(values))


def remade(tokenizer, change):
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    change(description)
    backend = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def with_a_word(split, ignore_merges):
    """A tokenizer with a word that no merges lead to."""

    def change(description):
        description["model"]["vocab"]["zqzq"] = len(description["model"]["vocab"]) + 10

    return remade(bpe(split, ignore_merges=ignore_merges), change)


def splitting_twice():
    """Qwen2's pattern, and GPT-2's after it."""
    return remade(bpe("qwen2"), lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True))


CASES = {
    "type": (llama, {"gguf_type": "q4_0"}, "gguf_type='q4_0' is not one of tq2_0, tq1_0"),
    "dtype": (llama, {"dtype": "float32"}, "dtype=float32 is not for target='gguf'"),
    "architecture": (
        lambda: ternary(MistralForCausalLM(MistralConfig(**SIZES))),
        {},
        "model_type='mistral' is not one of llama, qwen2, qwen3",
    ),
    "rope": (
        lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        {},
        "rope_type='linear'",
    ),
    "activation": (lambda: llama(hidden_act="relu2"), {}, "hidden_act='relu2'"),
    "norms": (
        lambda: hf_galore.replace_linear(LlamaForCausalLM(LlamaConfig(**SIZES)), use_rms_norm=True),
        {},
        "its layers have an RMSNorm of their own",
    ),
    "space": (llama, {"tokenizer": bpe(prefix=True)}, "tokenizer: .* no space in front"),
    "split": (llama, {"tokenizer": bpe(r"\d")}, "tokenizer: a GGUF file gets one that is a byte-level BPE"),
    "sentencepiece": (llama, {"tokenizer": sentencepiece()}, "tokenizer: a GGUF file gets one that is a byte-level"),
    "lowercase": (llama, {"tokenizer": bpe(normalizer=normalizers.Lowercase())}, "the normalizer Lowercase"),
    "strips": (llama, {"tokenizer": bpe(added=[AddedToken("<m>", lstrip=True)])}, "know lstrip=True of '<m>'"),
    "overlap": (
        llama,
        {"tokenizer": bpe(added=[AddedToken("<ab"), AddedToken("abcd>")])},
        "that '<ab' comes before 'abcd>' where they overlap",
    ),
    "template": (llama, {"tokenizer": bpe(template="</s> $A")}, r"it makes \['</s>', .*\] of 'text'"),
    "dropout": (llama, {"tokenizer": changed("model", dropout=0.1)}, "does not know dropout=0.1"),
    "bytes": (llama, {"tokenizer": bpe(alphabet=["a"])}, "a vocabulary with .* of 256 bytes"),
    "words": (llama, {"tokenizer": with_a_word("llama-bpe", False)}, "ignore_merges=False with the split llama-bpe"),
    "merges": (llama, {"tokenizer": with_a_word("qwen2", True)}, "ignore_merges=True with the split qwen2"),
    "regex twice": (llama, {"tokenizer": splitting_twice()}, "tokenizer: a GGUF file gets one that is a byte-level"),
    "tokens": (
        lambda: llama(vocab_size=256),
        {"tokenizer": bpe()},
        "it has .* tokens, the model 256",
    ),
    "slow": (llama, {"tokenizer": object()}, "tokenizer: object is not backed by the library tokenizers"),
}


def test_nfc_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="it normalizes text to NFC and llama.cpp does not"):
        gguf_of(bpe("qwen2", normalizer=normalizers.NFC()), tmp_path)


@llama_cpp.needed
@pytest.mark.parametrize("name", in_part(MODELS, "llama"))
def test_llama_cpp_goes_on_as_the_model_does(tmp_path, name):
    """Greedy decoding. All inputs of ternary layers are 256 wide, of which llama.cpp has one scale, as the layer."""
    model = MODELS[name](intermediate_size=256, vocab_size=448)
    save_bitnet(model, tmp_path / "out", "gguf", tokenizer=bpe())
    prompts = torch.randint(3, 400, (3, 12))
    answer = llama_cpp.ask(tmp_path / "out" / "model.gguf", [], prompts.tolist(), 8)
    expected = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert answer["prompts"] == expected[:, 12:].tolist()


@pytest.mark.parametrize("case", CASES)
def test_refused(case, tmp_path):
    make, arguments, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        save_bitnet(make(), tmp_path / "out", "gguf", **arguments)
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_compared(tmp_path, monkeypatch):
    quantize = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda value, kind: quantize(np.flip(value, 0), kind))
    with pytest.raises(RuntimeError, match=r"model\.gguf has other values of"):
        save_bitnet(llama(), tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())
    save_bitnet(llama(), tmp_path / "out", "gguf", verify=False)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_galore.integrations.bitnet.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf_galore\[gguf\]'"):
        save_bitnet(llama(), tmp_path / "out", "gguf")
