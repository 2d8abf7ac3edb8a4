"""The command line: one file per sub-command, each with `add_parser`, which names the function that runs it."""

import argparse
from collections.abc import Sequence

from hf_galore import __version__
from hf_galore.cli import activations, env, plot_subspace, run, stream

_COMMANDS = (run, env, plot_subspace, activations, stream)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sub-command named in `argv`, by default in sys.argv."""
    parser = argparse.ArgumentParser(prog="python -m hf_galore", description="GaLore for the Hugging Face stack.")
    parser.add_argument("--version", action="version", version=f"hf_galore {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    args.main(args)
