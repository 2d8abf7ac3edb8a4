"""llama.cpp itself, as the npm package node-llama-cpp ships it: `make llama-cpp` puts it into build/llama-cpp."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "build" / "llama-cpp" / "node_modules" / "node-llama-cpp"
needed = pytest.mark.skipif(
    shutil.which("node") is None or not PACKAGE.exists(), reason="there is no llama.cpp here: make llama-cpp"
)


def ask(file: Path, texts: list[str], prompts: list[list[int]] | None = None, tokens: int = 0) -> dict[str, Any]:
    """What llama.cpp makes of a GGUF file: see llama_cpp.mjs."""
    request = {"file": str(file), "texts": texts, "prompts": prompts or [], "tokens": tokens}
    script = Path(__file__).with_name("llama_cpp.mjs")
    ran = subprocess.run(
        ["node", script, PACKAGE], input=json.dumps(request), capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer
