"""Several target modules on the command line of a training script: `--optim_target_modules q_proj v_proj`.

The parsers of transformers and TRL take one string for a field that may be a string or a list of strings. They pass
the metadata of a field on to argparse.
"""

import argparse
import dataclasses
from types import MappingProxyType
from typing import Any

from transformers.training_args import TrainingArguments


class OneOrMore(argparse.Action):
    """Keeps a single value as the string that it is, and several as a list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def several_target_modules() -> tuple[dataclasses.Field[Any], MappingProxyType[str, Any]]:
    """The field of TrainingArguments, which its subclasses share, and the metadata with which it takes several."""
    field = next(field for field in dataclasses.fields(TrainingArguments) if field.name == "optim_target_modules")
    return field, MappingProxyType({**field.metadata, "nargs": "+", "action": OneOrMore})
