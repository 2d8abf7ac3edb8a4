"""Runs a third of the tests with other versions of the libraries: `python tests/versions.py oldest` or `newest`.

The oldest transformers, peft, accelerate and trl are the bounds of setup.py, the newest what the package index has.
Each set gets an environment of its own, .venv-oldest or .venv-newest, made anew on top of the one that runs this:
what it does not hold itself, torch first of all, it takes from there. Further arguments go to pytest.
"""

import os
import subprocess
import sys
import venv
from importlib.metadata import requires
from pathlib import Path
from sysconfig import get_path

from packaging.requirements import Requirement
from packaging.version import Version

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIBRARIES = ("transformers", "peft", "accelerate", "trl")
TESTS = (
    "optim/test_parity.py",
    "integrations/test_data_parallel.py",  # a launch of two ranks
    *(f"integrations/test_transformers_{name}.py" for name in ("register", "trainer", "resume", "parity", "models")),
    *(f"integrations/test_{name}.py" for name in ("requirements", "private_api", "plain_parameters")),
    *(f"integrations/test_peft{name}.py" for name in ("", "_attention_bias", "_register_tokens")),
    *(f"integrations/test_sink_cache{name}.py" for name in ("", "_generate", "_refused")),
    *(f"integrations/test_{name}.py" for name in ("attention_bias", "register_tokens", "bitnet_export")),
)
_SHOW = """
import sys
from importlib.metadata import version
print(f"{sys.argv[1]}:", ", ".join(f"{name} {version(name)}" for name in sys.argv[2:]))
"""


def wanted(which: str) -> list[str]:
    """What pip is asked for."""
    bounds = {one.name: one.specifier for one in map(Requirement, requires("hf_galore") or ())}
    if which == "newest":
        return [f"{name}{bounds[name]}" for name in LIBRARIES]
    lowest = {name: min(Version(bound.version) for bound in bounds[name]) for name in LIBRARIES}
    return [f"{name}=={version}" for name, version in lowest.items()]


def make(which: str) -> Path:
    """The Python of a new environment with this set."""
    folder = ROOT / f".venv-{which}"
    venv.create(folder, clear=True, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    (Path(get_path("purelib", vars=paths)) / "base.pth").write_text(get_path("purelib") + "\n")
    python = Path(get_path("scripts", vars=paths)) / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--upgrade", *wanted(which)], check=True)
    return python


def main(which: str, *arguments: str) -> int:
    """Makes the environment, says what is in it and returns the exit status of pytest."""
    python = make(which)
    subprocess.run([python, "-c", _SHOW, which, "torch", *LIBRARIES], check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([python, "-m", "pytest", *TESTS, *arguments], cwd=HERE, env=environment).returncode


if __name__ == "__main__":
    if sys.argv[1:2] not in (["oldest"], ["newest"]):
        sys.exit(f"usage: {sys.argv[0]} oldest|newest [arguments of pytest]")
    sys.exit(main(*sys.argv[1:]))
