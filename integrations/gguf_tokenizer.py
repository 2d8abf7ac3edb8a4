"""A tokenizer of transformers in the metadata of a GGUF file."""

import json
from typing import Any

from gguf import GGUFWriter, TokenType

# How text is split before merges are looked up: patterns of tokenizer.json, and llama.cpp's names of the same.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    None: "gpt-2",
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, config: Any) -> None:
    """Adds tokens, merges, special tokens and the chat template; without a tokenizer, that there is none.

    Raises:
        ValueError: it is not a byte-level BPE of the kinds that are known here.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")  # llama.cpp then works with token ids
        return
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} is not backed by the library tokenizers")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(description))
    tokens, types = token_list(tokenizer, config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = description["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def split_name(description: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which the tokenizer splits text.

    Raises:
        ValueError: it is not known here, or no byte-level BPE.
    """
    first = description["pre_tokenizer"] or {}
    parts = first.get("pretokenizers", [first])
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    pattern = patterns[0] if patterns else None
    plain = len(levels) == 1 and len(parts) == len(patterns) + 1 and len(patterns) <= 1
    if description["model"]["type"] != "BPE" or not plain or levels[0]["add_prefix_space"] or pattern not in SPLITS:
        raise ValueError(
            "tokenizer: a GGUF file gets one that is a byte-level BPE with the splits of GPT-2, Llama 3 or Qwen2 and "
            "no space in front. Write it without (tokenizer=None), and add this one with llama.cpp's converter"
        )
    return SPLITS[pattern]


def token_list(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """The tokens by number, up to the size of the embedding, and their kinds.

    Raises:
        ValueError: there are more tokens than embeddings.
    """
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_number) >= size:
        raise ValueError(f"tokenizer: it has {max(by_number) + 1} tokens, the model {size}")
    kinds = dict.fromkeys(by_number, TokenType.NORMAL)
    for number, token in tokenizer.added_tokens_decoder.items():
        kinds[number] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    tokens = [by_number.get(number, f"[PAD{number}]") for number in range(size)]
    return tokens, [int(kinds.get(number, TokenType.UNUSED)) for number in range(size)]
