"""GaLore under DistributedDataParallel: two real processes (gloo), the real Trainer, and all ranks the same bits.

The file is its own script: torchrun starts it twice, each rank writes what it has, the tests compare.
"""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from torchrun import leave_together, results_of
from trainer_cases import LAYERWISE, NAMES, Run, assert_same, llama, logged, state_of, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_galore

RANKS = 2
PRECISIONS = {"bfloat16": torch.bfloat16, "float64": torch.float64}
STEPS = 5  # T = 2: bases are refreshed in steps 1, 3 and 5


def train(method: str, precision: str, folder: Path, samples: int) -> dict:
    """The weights, states and losses after a run with this many samples for each rank and step."""
    trainer = Run(method, folder).train(
        llama(PRECISIONS[precision]), per_device_train_batch_size=samples, max_steps=STEPS
    )
    states = {f"{name}/{key}": value for name, state in state_of(trainer).items() for key, value in state.items()}
    wrapped = type(trainer.model_wrapped).__name__
    return {"weights": weights(trainer.model), "states": states, "wrapped": wrapped, "losses": logged(trainer, "loss")}


def train_quantized(folder: Path) -> dict:
    """The state dicts, codes and scales included, of a model in NF4 before and after a run."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", quantization_config=config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Run(LAYERWISE[0], folder).train(model, max_steps=STEPS)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return {"before": before, "after": dict(model.state_dict())}


def refusal_of_exact(folder: Path) -> str:
    """What training says that asks for bases from one process's gradients."""
    with pytest.raises(ValueError, match="exact") as caught:
        Run(LAYERWISE[0], folder).train(llama(), optim_args=", refresh=exact")
    return str(caught.value)


def main(output: Path) -> None:
    gc.freeze()  # as _quick_collections of conftest.py
    hf_galore.register()
    results = {
        (method, precision): train(method, precision, output, 2) for method in NAMES for precision in PRECISIONS
    }
    results["nf4"] = train_quantized(output)
    results["exact"] = refusal_of_exact(output)
    torch.save(results, output / f"rank{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks wrote."""
    output = tmp_path_factory.mktemp("ranks")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(output / "llama")
    return results_of(__file__, output, RANKS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", NAMES)
def test_ranks_agree_bit_for_bit(ranks, method, precision):
    """Weights, bases and moments, after the fifth step, which refreshed the bases; the run was DDP and did train."""
    one, other = (rank[method, precision] for rank in ranks)
    assert one["wrapped"] == "DistributedDataParallel"
    assert_same(one["weights"], other["weights"])
    assert_same(one["states"], other["states"])
    assert {value.dtype for value in one["weights"].values()} == {PRECISIONS[precision]}
    assert sum(name.endswith("/basis") for name in one["states"]) == 14
    start = weights(llama(PRECISIONS[precision]))
    assert not [name for name, value in one["weights"].items() if torch.equal(value, start[name])]


@pytest.mark.parametrize("method", NAMES)
def test_two_ranks_are_one_process_with_twice_the_batch(ranks, method, ours, tmp_path):
    """In float64 gradients differ by some 1e-16, which Adam divides by |g| + 1e-8: below 1e-11 a step at lr 1e-3."""
    alone = train(method, "float64", tmp_path, 2 * RANKS)
    for name, expected in alone["weights"].items():
        torch.testing.assert_close(ranks[0][method, "float64"]["weights"][name], expected, rtol=0.0, atol=1e-10)
    assert ranks[0][method, "float64"]["losses"] == pytest.approx(alone["losses"], rel=1e-6)  # losses are float32


def test_ranks_agree_on_quantized_weights(ranks):
    """Each rank quantizes on its own, with the same random bits."""
    one, other = (rank["nf4"] for rank in ranks)
    assert_same(one["after"], other["after"])
    codes = [name for name, value in one["after"].items() if name.endswith(".weight") and value.dtype == torch.uint8]
    assert len(codes) == 14
    assert not [name for name in codes if torch.equal(one["before"][name], one["after"][name])]


def test_exact_refreshes_are_refused(ranks):
    for rank in ranks:
        assert "refresh='exact' takes the gradients of one process; use refresh=streaming" in rank["exact"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_together()
