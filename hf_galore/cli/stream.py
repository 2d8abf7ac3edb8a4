"""python -m hf_galore stream MODEL: text without an end from any model with rotary embeddings."""

import argparse
import sys

DESCRIPTION = """\
Generate text from MODEL for ever, with a cache of sink tokens and a rolling window (hf_galore.SinkCache). The text
goes to standard output; tokens per second and memory, which stay what they are, to standard error. Ctrl-C ends it.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `stream` to the command line."""
    parser = subparsers.add_parser(
        "stream",
        help="generate text for ever in constant memory, and show tokens per second and memory",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory or a model of the Hub")
    parser.add_argument("--prompt", default="Once upon a time", help="how the text begins (%(default)r)")
    parser.add_argument("--n-sink", type=int, default=4, help="first tokens that stay (%(default)s)")
    parser.add_argument("--window", type=int, default=1020, help="last tokens that stay (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="stop after so many (default: never)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy (%(default)s)")
    parser.add_argument("--every", type=int, default=100, help="tokens from one line of figures to the next")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> None:
    """Stream until the end or Ctrl-C."""
    import torch

    from hf_galore.integrations import streaming

    model, tokenizer = streaming.load(args.model)
    cache = streaming.SinkCache(model, args.n_sink, args.window)
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(model.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    torch.manual_seed(args.seed)
    print(args.prompt, end="", flush=True)
    try:
        streaming.stream(model, ids, streaming.Meter(cache, tokenizer, args.every), args.max_new_tokens, **sampling)
    except KeyboardInterrupt:
        print(f"\n{cache.get_seq_length():,} tokens", file=sys.stderr)
