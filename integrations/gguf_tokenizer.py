"""A tokenizer of transformers in the metadata of a GGUF file.

llama.cpp makes tokens by code of its own, which has names for the ways in which text is split, two flags, and nothing
for the rest of what a tokenizer.json can say. A tokenizer that it would not follow is refused.
"""

import json
import warnings
from collections.abc import Iterator
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

# How text is split before merges are looked up: patterns of tokenizer.json, and llama.cpp's names of the same.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    None: "gpt-2",
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
WHOLE_WORDS_FIRST = ("llama-bpe",)  # where llama.cpp looks for a word among the tokens before it merges
BYTES = 256
TEXT = "text"


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, config: Any) -> None:
    """Adds tokens, merges, special tokens, flags and the chat template; without a tokenizer, that there is none.

    Raises:
        ValueError: llama.cpp would make other tokens of a text than the tokenizer does.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")  # llama.cpp then works with token ids
        return
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} is not backed by the library tokenizers")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = split_name(description)
    check_tokenizer(description, pre)
    begins, ends = added_around(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens, types = token_list(tokenizer, config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = description["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(begins)  # llama.cpp has defaults of its own, by the name of the split
    writer.add_add_eos_token(ends)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def split_name(description: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which the tokenizer splits text.

    Raises:
        ValueError: it is not known here, or no byte-level BPE.
    """
    first = description["pre_tokenizer"] or {}
    parts = first.get("pretokenizers", [first])
    *splits, level = parts
    pattern = splits[0].get("pattern", {}).get("Regex") if splits else None
    is_plain = (
        description["model"]["type"] == "BPE"
        and level.get("type") == "ByteLevel"
        and not level["add_prefix_space"]
        and level["use_regex"] == (not splits)  # GPT-2's pattern is the level's own
        and len(splits) <= 1
        and all(part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] for part in splits)
    )
    if not is_plain or pattern not in SPLITS or (pattern is None and splits):
        raise ValueError(
            "tokenizer: a GGUF file gets one that is a byte-level BPE with the splits of GPT-2, Llama 3 or Qwen2 and "
            "no space in front. Write it without (tokenizer=None), and add this one with llama.cpp's converter"
        )
    return SPLITS[pattern]


def check_tokenizer(description: dict[str, Any], pre: str) -> None:
    """Raises ValueError for what a byte-level BPE may do besides that llama.cpp does not; warns of NFC."""
    model, added = description["model"], description["added_tokens"]
    problems = [*_problems_of_model(model), *_problems_of_added(added)]
    kinds = _kinds(description["normalizer"])
    problems += [f"the normalizer {kind}" for kind in kinds if kind != "NFC"]
    if bool(model.get("ignore_merges")) != (pre in WHOLE_WORDS_FIRST) and not _merges_make_every_token(description):
        problems.append(f"ignore_merges={bool(model.get('ignore_merges'))} with the split {pre}")
    if problems:
        raise ValueError(f"tokenizer: llama.cpp would make other tokens, for it does not know {', '.join(problems)}")
    if "NFC" in kinds:
        warnings.warn(
            "tokenizer: it normalizes text to NFC and llama.cpp does not, which makes other tokens of text that is "
            "not NFC already",
            stacklevel=2,
        )


def _problems_of_model(model: dict[str, Any]) -> Iterator[str]:
    """What the merges do that llama.cpp's do not."""
    if model.get("dropout"):
        yield f"dropout={model['dropout']}"
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            yield f"{name}={model[name]!r}"
    found = sum(len(token) == 1 for token in model["vocab"])
    if found < BYTES:
        yield f"a vocabulary with {found} of {BYTES} bytes"


def _problems_of_added(added: list[dict[str, Any]]) -> Iterator[str]:
    """Where added tokens are found in a text by rules that llama.cpp has not."""
    for token in added:
        for name in ("lstrip", "rstrip", "single_word"):
            if token[name]:
                yield f"{name}=True of {token['content']!r}"
    contents = [token["content"] for token in added]
    ends = {content[start:]: content for content in contents for start in range(1, len(content))}
    for content in contents:
        for end in range(1, len(content)):
            other = ends.get(content[:end])
            if other is not None and len(other) <= len(content) and len({*other, *content}) > 1 and other != content:
                yield f"that {other!r} comes before {content!r} where they overlap"


def _kinds(normalizer: dict[str, Any] | None) -> list[str]:
    """The kinds of the normalizers that are one after another in this one."""
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [kind for part in normalizer["normalizers"] for kind in _kinds(part)]
    return [normalizer["type"]]


def _merges_make_every_token(description: dict[str, Any]) -> bool:
    """Whether it is all the same if words are looked for among the tokens first."""
    plain = json.loads(json.dumps(description))
    plain["model"]["ignore_merges"] = False
    merge = Tokenizer.from_str(json.dumps(plain)).model.tokenize
    added = {token["content"] for token in description["added_tokens"]}
    return all(len(merge(token)) == 1 for token in description["model"]["vocab"] if token not in added)


def added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer begins a text with bos, and ends it with eos, as it is seen to do.

    Raises:
        ValueError: it adds anything else.
    """
    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    whole = tokenizer(TEXT)["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            if whole == [tokenizer.bos_token_id] * begins + text + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise ValueError(
        f"tokenizer: it makes {tokenizer.convert_ids_to_tokens(whole)} of {TEXT!r}, and llama.cpp adds bos "
        f"({tokenizer.bos_token}) in front and eos ({tokenizer.eos_token}) at the end, or neither"
    )


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
