"""One run of subspace_ablation.py: a small Llama trained from random weights by AdamW, GaLore, LoRA or ReLoRA."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from held_out import loss_of, tokens_of
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_galore import GaLoreAdamW
from hf_galore.lowrank_backward import enable
from hf_galore.lowrank_basis import LayerBasis
from hf_galore.lowrank_layer import LowRankLayer
from hf_galore.param_groups import find_targets, galore_param_groups

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from corpus import Blocks, load_corpus
from measure import state_bytes

HELD_OUT_BLOCKS = 128  # for the perplexity, at most
TARGETS = ["self_attn", "mlp"]
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8}  # of every method; none decays weights
REWARM = 10  # steps in which the adapters' rate grows again after a merge of ReLoRA


class Method(NamedTuple):
    """What trains the matrices, and the method whose rates do where there is no grid of its own."""

    kind: str  # adamw, galore (full gradients), layerwise (projected backward), inputs (`use_inputs`), lora, relora
    options: dict[str, Any]  # group keys of galore, arguments of `enable`
    tuned_like: str = ""


class Study(NamedTuple):
    """A model, the length of its training, and what is compared on it."""

    model: dict[str, Any]
    steps: int
    rank: int
    gap: int
    batch: int  # blocks in a step
    methods: Sequence[str]


class Run(NamedTuple):
    """What makes a line of the CSV, within a study, a text and a number of steps."""

    method: str
    lr_matrices: float
    lr_rest: float
    seed: int  # of the weights, the order of the data and what is random in a method


def measure(study: Study, method: Method, run: Run, folder: Path, text: Path | None) -> dict[str, Any]:
    """The figures of one run."""
    train_blocks, held_out = load(study, folder, text)
    held_out = Blocks(held_out.rows[:: math.ceil(len(held_out) / HELD_OUT_BLOCKS)])
    torch.manual_seed(run.seed)
    model = LlamaForCausalLM(LlamaConfig(**study.model))
    model, optimizer, refresher = prepare(model, study, method, run)
    began = time.perf_counter()
    losses = train(model, optimizer, train_blocks, study, method, run.seed)
    seconds = time.perf_counter() - began
    return {
        "perplexity": f"{torch.tensor(loss_of(model, held_out)).exp():.3f}",
        "train_loss": f"{mean(losses[-max(1, study.steps // 10) :]):.4f}",
        "train_seconds": f"{seconds:.1f}",
        "refresh_seconds": f"{getattr(refresher, 'refresh_seconds', 0.0):.2f}",
        "state_mib": f"{state_bytes(optimizer) / 2**20:.2f}",
        "threads": torch.get_num_threads(),
    }


def load(study: Study, folder: Path, text: Path | None) -> tuple[Blocks, Blocks]:
    """(train, held-out) blocks, the same for every run of a study."""
    vocabulary, length = study.model["vocab_size"], study.model["max_position_embeddings"]
    return load_corpus(folder, [text] if text else [], vocabulary, length, seed=0)


def prepare(model: nn.Module, study: Study, method: Method, run: Run) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """The model as the method trains it, its optimizer, and what knows the `refresh_seconds`."""
    low_rank = {"rank": study.rank, "update_proj_gap": study.gap, "scale": run.lr_matrices / run.lr_rest}
    if method.kind == "galore":
        groups = galore_param_groups(model, TARGETS, **low_rank, **method.options)
        optimizer = GaLoreAdamW(groups, lr=run.lr_rest, seed=run.seed, **ADAM)
        return model, optimizer, optimizer
    if method.kind in ("layerwise", "inputs"):
        engine = enable(model, TARGETS, **low_rank, seed=run.seed, **method.options)
        if method.kind == "inputs":
            use_inputs(engine.bases, run.seed)
        optimizer = GaLoreAdamW(engine.param_groups(model), lr=run.lr_rest, seed=run.seed, **ADAM)
        engine.attach(optimizer)
        return model, optimizer, engine
    names = find_targets(model, TARGETS)
    if method.kind in ("lora", "relora"):
        model = with_adapters(model, names, study.rank)
        names = {name for name, _ in model.named_parameters() if "lora_" in name}
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups = [
        {"params": [param for name, param in trained if name in names], "lr": run.lr_matrices},
        {"params": [param for name, param in trained if name not in names], "lr": run.lr_rest},
    ]
    return model, torch.optim.AdamW(groups, weight_decay=0.0, fused=True, **ADAM), None


def use_inputs(bases: Sequence[LayerBasis], seed: int) -> None:
    """Makes the principal directions of each layer's input x its basis, in place of those of its gradient.

    A streaming refresh then sketches (yᵀ x)ᵀ U in place of (gyᵀ x)ᵀ U; y = x J, with normal numbers J (n, m).
    """
    generator = torch.Generator().manual_seed(seed)
    for basis in bases:
        m, n = basis.layers[0].weight.shape
        mixing = torch.randn(n, m, generator=generator) / math.sqrt(n)
        basis.receive = partial(receive_inputs, basis.receive, mixing)  # type: ignore[method-assign]


def receive_inputs(receive: Callable[..., None], mixing: Tensor, layer: LowRankLayer, x: Tensor, gy: Tensor) -> None:
    receive(layer, x, x @ mixing)


def with_adapters(model: nn.Module, names: set[str], rank: int) -> nn.Module:
    """The model with LoRA on the named matrices, which are frozen; everything else trains."""
    modules = [name.removesuffix(".weight") for name in names]
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=modules))
    for name, param in model.named_parameters():
        param.requires_grad_("base_layer" not in name)
    return model


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, blocks: Blocks, study: Study, method: Method, seed: int
) -> list[float]:
    """The losses of all steps."""
    generator, losses = torch.Generator().manual_seed(seed), []
    epochs = math.ceil(study.steps * study.batch / len(blocks))
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(epochs)]).tolist()
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(study.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate(step, study.steps)
        if method.kind == "relora" and step >= study.gap:
            if step % study.gap == 0:
                restart(model, optimizer)
            optimizer.param_groups[0]["lr"] *= min(1.0, (step % study.gap + 1) / REWARM)
        tokens = tokens_of(blocks, order[step * study.batch : (step + 1) * study.batch])
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_([param for group in optimizer.param_groups for param in group["params"]], 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def rate(step: int, steps: int) -> float:
    """The learning rate as a part of its peak: up over a tenth of the steps, then a cosine to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def restart(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """ReLoRA's restart: all adapters are merged and begin anew, without a history in the optimizer."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            merge(layer)
            layer.reset_lora_parameters("default", True)  # A as in nn.Linear, B = 0
            for factor in (layer.lora_A, layer.lora_B):
                optimizer.state.pop(factor["default"].weight, None)


@torch.no_grad()
def merge(layer: LoraLayer) -> None:
    """W ← W + lora_alpha/r·B A, in the frozen matrix below the adapter."""
    layer.base_layer.weight += (
        layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
