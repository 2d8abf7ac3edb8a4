"""Generates without an end, in constant memory and at a constant speed, and shows both as it goes.

    python examples/streaming.py                                  # a small random Llama: no text, only figures
    python examples/streaming.py --model DIRECTORY --prompt "Once upon a time"
    python examples/streaming.py --cache dynamic                  # what transformers does: slower, larger, and an end

All that a script of yours needs is the cache:

    cache = hf_galore.SinkCache(model, n_sink=4, window=1020)
    model.generate(input_ids, past_key_values=cache, max_new_tokens=100_000)
"""

import argparse

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_galore import SinkCache
from hf_galore.integrations.streaming import Meter, load, stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="a directory or a model of the Hub (default: random weights)")
    parser.add_argument("--prompt", default="Once upon a time", help="how the text begins (%(default)r)")
    parser.add_argument("--cache", choices=["sink", "dynamic"], default="sink", help="which cache (%(default)s)")
    parser.add_argument("--n_sink", type=int, default=4, help="first tokens that stay (%(default)s)")
    parser.add_argument("--window", type=int, default=252, help="last tokens that stay (%(default)s)")
    parser.add_argument("--tokens", type=int, default=5000, help="tokens to generate; 0: until Ctrl-C (%(default)s)")
    parser.add_argument("--every", type=int, default=250, help="tokens from one line of figures to the next")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.model:
        model, tokenizer = load(options.model)
        ids = tokenizer(options.prompt, return_tensors="pt").input_ids.to(model.device)
    else:
        model, tokenizer = random_llama(), None
        ids = torch.randint(model.config.vocab_size, (1, 8))
    cache = DynamicCache(config=model.config)
    if options.cache == "sink":
        cache = SinkCache(model, options.n_sink, options.window)
    stream(model, ids, Meter(cache, tokenizer, options.every), options.tokens, do_sample=True)


def random_llama() -> LlamaForCausalLM:
    """About 7 million parameters that were never trained, with positions for 512 tokens."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    main()
