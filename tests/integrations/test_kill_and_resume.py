"""A process that is killed while it trains, and one that goes on from what it left on the disk.

(examples/benchmarks/results/kill_and_resume.json is the same with 20 kills.)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "kill_and_resume.py"


def test_a_killed_run_ends_in_the_bits_of_one_that_was_not(tmp_path):
    """SIGKILL at a random step and moment, twice: the weights and the optimizer's state are the same at the end."""
    results = tmp_path / "results.json"
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills=2", "--seed=1", "--results", str(results)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    runs = json.loads(results.read_text())["runs"]
    assert len(runs) == 2
    for run in runs:
        assert run["same_weights"]
        assert run["same_state"]
    assert any(run["resumed_from_step"] for run in runs)
