"""Tokenizers made offline, and texts on which tokenizers differ: shared by the tests of GGUF files."""

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from hf_galore.integrations.gguf_tokenizer import SPLITS

CORPUS = [
    "the lazy dog and the quick fox, the fox's den; they'll say it's 12345 or 2024",
    "Ünïcödé naïve café 東京 привет мир 🙂🙂 ½ ² ٣",
    "  indented\n\n\tcode = value + 10  # comment\r\n",
] * 4
TEXTS = [
    "the quick dog jumps over 1234567 lazy foxes",
    " leading space, and trailing  ",
    "It's THEY'LL we'Re don't 'tis",
    "tabs\tand\n\nnew lines\r\n  \n   indented   runs of    space",
    "Ünïcödé naïve café 東京 привет мир",
    "🙂👩‍👩‍👧 ½² ٣٤ \U0001d7d8\U0001d7d9",
    "no\u00a0break\u3000wide\u2009thin\u200bzero\u2028line",
    "x<s>y</s> <s> and <tool>z<tool> <|im_end|>",
    "a_b-c==d!!! (e) [f] {g}...\n",
    "12 345 6789 1.5e-10 0x1F",
    "\n",
    " ",
    "\u0000\u0001\x7f",
]
PATTERNS = {name: pattern for pattern, name in SPLITS.items()}


def bpe(
    split="gpt-2",
    *,
    prefix=False,
    template=None,
    ignore_merges=None,
    normalizer=None,
    added=(),
    vocab_size=400,
    alphabet=None,
):
    """A byte-level BPE that is trained on the corpus, with bos `<s>`, eos `</s>` and the added token `<tool>`.

    Args:
        split: a name of llama.cpp, or a regular expression.
        prefix: a space in front of text.
        template: what is around a text, as in `TemplateProcessing`.
        ignore_merges: whether words are looked for among the tokens first; None: as Llama 3 does it.
        normalizer, added: as the library tokenizers has them.
        alphabet: the bytes that it has in any case; None: all.
    """
    pattern = PATTERNS.get(split, split)
    if ignore_merges is None:
        ignore_merges = split == "llama-bpe"
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    if pattern is not None:
        level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    backend.pre_tokenizer = level
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False), *added])
    if template is not None:
        numbers = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def sentencepiece():
    """A BPE with byte fallback and a space in front, as that of Llama 2."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    numbers = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *numbers], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


IM_END = AddedToken("<|im_end|>", special=True)
# Tokenizers that are written, and whether text begins with bos and ends with eos.
WRITTEN = {
    "gpt-2": (lambda: bpe("gpt-2"), False, False),
    "gpt-2 with bos": (lambda: bpe("gpt-2", template="<s> $A"), True, False),
    "llama 3": (lambda: bpe("llama-bpe", template="<s> $A"), True, False),
    "llama 3 without bos": (lambda: bpe("llama-bpe"), False, False),
    "llama 3, merges first": (lambda: bpe("llama-bpe", ignore_merges=False, template="<s> $A </s>"), True, True),
    "qwen2": (lambda: bpe("qwen2", added=[IM_END]), False, False),
    "qwen2 with eos": (lambda: bpe("qwen2", template="$A </s>", added=[IM_END]), False, True),
}
