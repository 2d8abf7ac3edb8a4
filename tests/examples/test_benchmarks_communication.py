"""The counters of communication.py against what is known, a launch of it, and scale_model.py against its results.

The file is its own script: torchrun starts it twice for the counters.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.append(str(BENCHMARKS))

import result_file  # noqa: E402
import scale_model  # noqa: E402
from collectives import KINDS, Collectives, sent  # noqa: E402
from communication_model import ZERO  # noqa: E402
from live_bytes import LiveBytes  # noqa: E402

RANKS = 2


def each_collective(x: Tensor) -> None:
    """Each kind once; `x` has 6 elements on each rank."""
    both = torch.zeros(RANKS * 6)
    parts = list(both.chunk(RANKS))
    dist.all_reduce(x)
    dist.broadcast(x, 0)
    dist.reduce(x, 1)
    dist.all_gather(parts, x)
    dist.all_gather_into_tensor(both, x)
    dist.reduce_scatter_tensor(x, both)
    dist.gather(x, parts if dist.get_rank() == 0 else None, 0)
    dist.barrier()


def step_of_ddp(x: Tensor) -> None:
    """DDP's reducer sends the gradients of 6·4 + 4 elements, from the backward pass."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(6, 4), init_sync=False)
    model(x).sum().backward()


def step_of_fsdp2(x: Tensor) -> None:
    """FSDP2 brings 6·4 + 4 elements together twice and their gradients back; a norm of gradients is one number."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(6, 4))
    fully_shard(model[0], mesh=dist.init_device_mesh("cpu", (RANKS,)), reshard_after_forward=True)
    model(x).sum().backward()
    torch.nn.utils.get_total_norm([model[0].weight.grad]).full_tensor()


CASES = {
    "each": (
        each_collective,
        {"all_reduce": 24, "broadcast": 24, "reduce": 24, "all_gather": 96, "reduce_scatter": 48, "gather": 48},
    ),
    "DDP": (step_of_ddp, {"all_reduce": 112}),
    "FSDP2": (step_of_fsdp2, {"all_gather": 224, "reduce_scatter": 112, "all_reduce": 4}),
}


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    found = {}
    for name, (case, _) in CASES.items():
        with Collectives() as counted:
            case(torch.ones(6))
        found[name] = counted.sizes
    (output / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()  # gloo may abort a process that ends while another still talks to it
    dist.destroy_process_group()


def run(*command: str) -> str:
    process = subprocess.run(
        [sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What each rank counted."""
    output = tmp_path_factory.mktemp("counted")
    run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", __file__, str(output))
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_counts_what_collectives_are_given(counted, case):
    for rank in counted:
        assert rank[case] == CASES[case][1]


def test_ring_sends():
    """The bytes of eight ranks, by hand: each passes on seven eighths, in an all_reduce twice."""
    assert sent("all_gather", 800, 8) == sent("reduce_scatter", 800, 8) == 700
    assert sent("broadcast", 800, 8) == sent("reduce", 800, 8) == 700
    assert sent("all_reduce", 800, 8) == 1400
    assert sent("gather", 800, 8) == 700 / 8  # seven ranks send 100 each, one none


def test_live_bytes_follow_a_storage_that_is_resized():
    with LiveBytes() as live:
        x = torch.zeros(10)
        x.untyped_storage().resize_(0)
        assert (live.now, live.peak) == (0, 40)
        x.untyped_storage().resize_(80)
        assert live.now == 80
        del x
        assert live.now == 0
    assert "resize_" not in vars(torch.UntypedStorage)


@pytest.mark.slow
def test_launch_writes_what_the_formulas_say(tmp_path, monkeypatch):
    """DDP on two ranks, a model of 12 parameters that keeps two buffers of 32 bytes."""
    for package in ("accelerate", "peft", "transformers"):
        pytest.importorskip(package)
    results, shapes = tmp_path / "rows.csv", scale_model.Shapes(32, 64, 1, 64, keys=32)
    monkeypatch.setitem(scale_model.MEASURED, "tiny", (shapes, 8))
    options = ["--shape=tiny", "--ranks=2", "--engines=DDP", "--methods=galore_adamw_layerwise"]
    run(str(BENCHMARKS / "communication.py"), *options, f"--results={results}")
    rows = result_file.read(results)
    assert [row["step"] for row in rows] == ["normal", "before", "refresh"]
    for row in rows:
        expected = scale_model.predicted(row)
        more = {"all_reduce": 12 * 4, "broadcast": 2 * 32}  # a flag for each parameter, and the buffers
        assert {kind: int(row[kind]) for kind in KINDS} == {kind: expected[kind] + more.get(kind, 0) for kind in KINDS}


def test_formulas_give_the_measured_bytes():
    """To what they leave out, which does not grow with the matrices.

    Of what collectives are given: flags, norms and buffers, up to a number for each of 44 parameters and 256 bytes of
    buffers, which all_reduces send twice. Of what is kept: those buffers, steps, losses and tokens, some kilobytes.
    """
    rows = result_file.read(scale_model.RESULTS)
    assert len(rows) == 120
    for row in rows:
        expected = scale_model.predicted(row)
        for kind in KINDS:
            assert 0 <= int(row[kind]) - expected[kind] <= 512, row
        assert 0 <= int(row["sent"]) - expected["sent"] <= 1024, row
        assert 0 <= int(row["kept"]) - expected["kept"] <= 4096, row
        if row["engine"] not in ZERO:
            assert 0 <= int(row["gradients"]) - expected["gradients"] <= 512, row


def test_tables_are_those_of_the_page(capsys):
    """docs/scale.md has what scale_model.py prints."""
    page = (BENCHMARKS.parents[1] / "docs" / "scale.md").read_text()
    scale_model.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20
    for line in lines:
        assert not line.startswith("|") or line in page


if __name__ == "__main__":
    main(Path(sys.argv[1]))
