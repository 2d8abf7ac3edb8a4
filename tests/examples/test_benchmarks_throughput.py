"""examples/benchmarks/layerwise_throughput.py on a tiny model: every method trains, and the file has its figures."""

import csv
import importlib

import pytest
from example_scripts import EXAMPLES, call

pytestmark = pytest.mark.filterwarnings("ignore:.*a basis refresh found:UserWarning")  # of 8 tokens

for package in ("transformers", "peft", "galore_torch"):
    pytest.importorskip(package)
OPTIONS = ["--rows", "tiny/8/bfloat16/frozen", "--rounds", "1", "--threads", "1"]
METHODS = [
    "adamw_torch_fused",
    "LoRA",
    "galore-torch",
    "galore_adamw_layerwise",
    "galore_adamw_layerwise, share_inputs",
    "galore_adamw, randomized",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The lines of the file, and what the script printed the first and the second time."""
    out = tmp_path_factory.mktemp("throughput") / "rows.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES / "benchmarks")
        script = importlib.import_module("layerwise_throughput")
        patch.setitem(script.SHAPES, "tiny", (32, 64, 2, 1))
        here = {"measure_in_child": script.measure, "BATCH": 1, "LENGTH": 8}
        printed = [
            call("benchmarks/layerwise_throughput", *OPTIONS, "--out", out, cwd=out.parent, **here) for _ in range(2)
        ]
    with out.open(newline="") as file:
        return list(csv.DictReader(file)), *printed


def test_writes_a_line_for_each_method(finished):
    lines, _, _ = finished
    assert [line["method"] for line in lines][: len(METHODS)] == METHODS
    assert {(line["shape"], line["rank"], line["dtype"], line["others"]) for line in lines} == {
        ("tiny", "8", "bfloat16", "frozen")
    }
    for line in lines:
        for column in ("t_plain_ms", "forward_ms", "backward_ms", "step_ms", "tokens_per_second"):
            assert float(line[column]) > 0
        for column in ("ratio_adamw", "ratio_lora", "ratio_galore_torch"):
            assert 0 < float(line[f"{column}_min"]) <= float(line[column]) <= float(line[f"{column}_max"])
        assert bool(line["ideal_ratio"]) == ("layerwise" in line["method"])


def test_measures_no_row_twice(finished):
    _, first, second = finished
    assert "round 0" in first
    assert first.endswith(second)  # the table
    assert all(f"| tiny | 8 | bfloat16 | frozen | {method} |" in second for method in METHODS)
