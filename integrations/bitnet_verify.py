"""The proof that plain transformers reads an export as what the model computes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from hf_galore.integrations import bitnet_proof
from hf_galore.integrations.bitnet_export import Export
from hf_galore.integrations.bitnet_proof import digest
from hf_galore.nn.bitlinear import BitLinear

# transformers sums in another order. Where that puts an activation on the other side of a rounding to 8 bits, it moves
# by a whole code, and with it others in later layers: in 24 layers logits differ by 1 %, in 2 by 1e-7.
ALLOWED_ERROR = 0.1  # of logits; a wrong scale or norm gives about 1
OUTLIER = 8.0  # times the error's root mean square: a larger lead is not lost to such an error


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and what a process with transformers alone made of it.

    Attributes:
        converted: the ternary layers of the checkpoint.
        unconverted: its other linear layers, and why they are not ternary.
        codes_equal: whether the codes it computes with are those of the model, bit for bit.
        top1: the share of positions at which its most likely token is that of the reference: the model with all floats
            and scales as they are stored, and layers stored as nn.Linear computing as such, all in float32. At the
            others the reference's lead is so small that the relative error explains that it is lost.
        relative_error: ‖difference‖ / ‖reference‖ of the logits.
        error_of_storing: the same against the model as it trains, in float32: what rounding to the dtype of the
            checkpoint and layers stored as nn.Linear add.
        error_as_loaded: the same for the checkpoint as from_pretrained gives it, computing in its own dtype.
    """

    target: str
    dtype: str
    converted: list[str]
    unconverted: dict[str, str] = field(default_factory=dict)
    codes_equal: bool | None = None
    top1: float | None = None
    relative_error: float | None = None
    error_of_storing: float | None = None
    error_as_loaded: float | None = None

    def __str__(self) -> str:
        lines = [f"target {self.target}, {self.dtype}: {len(self.converted)} ternary layers"]
        reasons: dict[str, list[str]] = {}
        for path, reason in self.unconverted.items():
            reasons.setdefault(reason, []).append(path)
        lines += [f"  {len(paths)} others ({reason}): {', '.join(paths)}" for reason, paths in reasons.items()]
        if self.top1 is None:
            read = "not verified" if self.codes_equal is None else "read back: codes equal, logits not computed"
            return "\n".join([*lines, f"  {read}"])
        lines.append(
            f"  loaded by transformers alone: codes {'equal' if self.codes_equal else 'DIFFERENT'}, top-1 equal at "
            f"{self.top1:.1%} of positions, relative error of logits {self.relative_error:.1e}"
        )
        lines.append(
            f"  against the model as it trains: {self.error_of_storing:.1e}; as loaded, in {self.dtype}: "
            f"{self.error_as_loaded:.1e}"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Expected:
    """What transformers should find in a checkpoint."""

    directory: Path
    export: Export
    tokens: Tensor
    codes: dict[str, str]
    state: dict[str, str]
    reference: Tensor
    training: Tensor


def expect(export: Export, directory: Path) -> Expected:
    """Computes what is expected of the checkpoint in the directory. The model is as before afterwards."""
    config = export.shell.config.get_text_config()
    length = min(32, getattr(config, "max_position_embeddings", None) or 32)
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    codes = {path: export.ternaries[path].codes for path in export.converted}
    state = {
        name: digest(codes[path].float() if unpacked else tensor)
        for name, tensor in export.tensors.items()
        for path in [name.removesuffix(".weight")]
        for unpacked in [export.target == "transformers-auto" and path in codes and name != path]
    }
    return Expected(
        directory,
        export,
        tokens,
        {path: digest(value) for path, value in codes.items()},
        state,
        compute_logits(export, tokens, as_stored=True),
        compute_logits(export, tokens, as_stored=False),
    )


@torch.no_grad()
def compute_logits(export: Export, tokens: Tensor, *, as_stored: bool) -> Tensor:
    """Logits of the model in float32, in evaluation: with all values as they are stored, or as they train."""
    base = export.plain.base
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(base))
        if as_stored:
            for path, layer in export.plain.layers.items():
                stack.enter_context(computing_as_stored(export, path, layer))
        masters = {id(layer.weight) for layer in export.plain.layers.values()}
        kept = base.state_dict().keys()
        values = [*base.named_parameters(), *((n, b) for n, b in base.named_buffers() if n in kept)]
        floats = {
            name: (value.to(export.dtype) if as_stored else value).float()
            for name, value in values
            if value.is_floating_point() and id(value) not in masters
        }
        output = functional_call(base, floats, kwargs={"input_ids": tokens.to(base.device), "use_cache": False})
        logits: Tensor = output.logits.float().cpu()
        return logits


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation mode, and back into what each was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def computing_as_stored(export: Export, path: str, layer: BitLinear) -> Iterator[None]:
    """Gives a layer the codes and scale that are stored, and unrounded activations where it is stored as nn.Linear."""
    stored, quantizes = export.ternaries[path], layer.quantize_activations
    layer.__dict__["ternary"] = lambda: stored
    layer.quantize_activations = path not in export.unconverted
    try:
        yield
    finally:
        del layer.__dict__["ternary"]
        layer.quantize_activations = quantizes


def examine(expected: Sequence[Expected]) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """What a process with transformers alone finds in the checkpoints: digests, and logits.

    Raises:
        RuntimeError: it failed; its last lines are in the message.
    """
    # The directory must not be that of this file: modules are named there as the libraries are.
    with tempfile.TemporaryDirectory() as scratch:
        requests = [
            {
                "directory": str(each.directory.absolute()),
                "converted": each.export.converted,
                "tokens": each.tokens.tolist(),
                "output": os.path.join(scratch, f"{i}.json"),
            }
            for i, each in enumerate(expected)
        ]
        request = Path(scratch, "request.json")
        request.write_text(json.dumps(requests))
        source = Path(bitnet_proof.__file__).read_text("utf-8")
        done = subprocess.run(
            [sys.executable, "-c", source, str(request)],
            cwd=scratch,
            env=_environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError("transformers cannot load the export:\n" + "\n".join(done.stderr.splitlines()[-15:]))
        outputs = [each["output"] for each in requests]
        return [(json.loads(Path(str(o)).read_text()), load_file(f"{o}.safetensors")) for o in outputs]


def _environment() -> dict[str, str]:
    """This process's, without its GPUs and launchers.

    transformers' BitNet functions are compiled, which takes minutes on a CPU and changes nothing but the time.
    """
    launchers = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launchers) and k not in launched}
    return kept | {
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def compare(expected: Expected, found: tuple[dict[str, Any], dict[str, Tensor]]) -> ExportReport:
    """Compares what was found with what was expected.

    Raises:
        RuntimeError: codes or other tensors differ, or logits by more than roundings of activations explain.
    """
    digests, logits = found
    export, reference = expected.export, expected.reference
    loaded = logits["float32"]
    report = ExportReport(
        export.target,
        str(export.dtype).removeprefix("torch."),
        export.converted,
        export.unconverted,
        digests["codes"] == expected.codes,
        top1_share(loaded, reference),
        relative_error(loaded, reference),
        relative_error(loaded, expected.training),
        relative_error(logits["loaded"], expected.training),
    )
    differing = {name for name, _ in expected.state.items() ^ digests["state"].items()}
    if not report.codes_equal or differing:
        wrong = f", such as of {min(differing)!r}" if differing else ""
        raise RuntimeError(f"transformers reads other values from the export{wrong}:\n{report}")
    if not relative_error(loaded, reference) <= ALLOWED_ERROR or lost_leads(loaded, reference):  # NaN is refused too
        raise RuntimeError(f"transformers computes something else from the export:\n{report}")
    return report


def relative_error(values: Tensor, reference: Tensor) -> float:
    """‖values − reference‖ / ‖reference‖."""
    return float((values - reference).norm() / reference.norm())


def top1_share(logits: Tensor, reference: Tensor) -> float:
    """The share of positions at which both are largest for the same token."""
    return float((logits.argmax(-1) == reference.argmax(-1)).float().mean())


def lost_leads(logits: Tensor, reference: Tensor) -> int:
    """At how many positions the reference has a lead over what is largest here that their distance cannot explain."""
    lead = reference.amax(-1) - reference.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    return int((lead > OUTLIER * (logits - reference).square().mean().sqrt()).sum())


def unverified(export: Export) -> ExportReport:
    """The report of an export that was not read back."""
    return ExportReport(export.target, str(export.dtype).removeprefix("torch."), export.converted, export.unconverted)
