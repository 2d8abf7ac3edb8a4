"""Several target modules on the command line of a training script: `--optim_target_modules q_proj v_proj`."""

import argparse
import dataclasses
from typing import Any, get_args

from transformers import HfArgumentParser

_FIELD = "optim_target_modules"

_parse_field = HfArgumentParser._parse_dataclass_field


def parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    """transformers' function, which takes one string for a field that may be a string or a list of strings."""
    if field.name != _FIELD or not {str, list[str]} <= set(get_args(field.type)):
        _parse_field(parser, field)
        return
    names = (f"--{_FIELD}", f"--{_FIELD.replace('_', '-')}")
    parser.add_argument(*names, action=_OneOrMore, nargs="+", default=field.default, **field.metadata)


class _OneOrMore(argparse.Action):
    """Keeps a single value as the string that it is, and several as a list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)
