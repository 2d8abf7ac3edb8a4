"""What is installed, what it imports, and that importing it changes nothing."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_galore
from hf_galore import native

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted(path for path in (ROOT / "hf_galore").rglob("*.py") if "integrations" not in path.parts)
DOORS = {
    "__init__.py",
    "cli/activations.py",
    "cli/env.py",
    "cli/run.py",
    "cli/plot_subspace.py",
    "cli/stream.py",
}  # the files of the core that may reach the integrations

IMPORT_THE_CORE = """
import importlib, pathlib, hf_galore
package = pathlib.Path(hf_galore.__file__).parent
for path in sorted(package.rglob("*.py")):
    parts = path.relative_to(package).with_suffix("").parts
    if parts[0] != "integrations" and parts[-1] != "__main__":
        importlib.import_module(".".join(["hf_galore", *(part for part in parts if part != "__init__")]))
"""

SNAPSHOT = """
import sys, peft, accelerate, torch, transformers, transformers.trainer
LIBRARIES = {"torch", "transformers", "peft", "accelerate"}
def snapshot():
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] in LIBRARIES}
    classes = [transformers.Trainer, transformers.TrainingArguments, peft.PeftModel, accelerate.Accelerator,
               torch.Tensor, torch.nn.Module, torch.nn.Linear, torch.optim.Optimizer]
    spaces = modules | {f"class {cls.__name__}": cls for cls in classes}
    return {(name, key): value for name, space in spaces.items() for key, value in vars(space).items()}
before = snapshot()
"""
COMPARE = """
after = snapshot()
print([key for key, value in before.items() if after.get(key) is not value])
"""


def python(code: str, **kwargs) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, **kwargs
    ).stdout.strip()


def imported_modules(tree: ast.AST) -> set[str]:
    """The absolute names of all that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or "" if node.level == 0 else f"hf_galore.{node.module or ''}"
            names.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            names.update(arg.value for arg in node.args if isinstance(arg, ast.Constant))
    return names


def test_importing_the_core_imports_torch_and_nothing_else():
    outside = "{'transformers', 'peft', 'accelerate', 'trl', 'bitsandbytes', 'deepspeed', 'datasets', 'galore_torch'}"
    assert python(f"{IMPORT_THE_CORE}\nimport sys; print(sorted({outside} & set(sys.modules)))") == "[]"


def test_importing_the_core_patches_nothing():
    assert python(SNAPSHOT + IMPORT_THE_CORE + COMPARE).splitlines()[-1] == "[]"


def test_core_names_only_torch_and_the_standard_library():
    allowed = {"torch", "hf_galore", *sys.stdlib_module_names}
    assert len(CORE) > 60
    for path in CORE:
        names = imported_modules(ast.parse(path.read_text("utf-8")))
        assert {name for name in names if name.split(".")[0] not in allowed} == set(), path
        if str(path.relative_to(ROOT / "hf_galore")) not in DOORS:
            assert {name for name in names if name.startswith("hf_galore.integrations")} == set(), path


def test_public_names_are_listed_and_found():
    assert set(hf_galore.__all__) <= set(dir(hf_galore))
    for name in hf_galore.__all__:
        assert getattr(hf_galore, name) is getattr(hf_galore, name)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'hf_galore' has no attribute 'galore'"):
        hf_galore.galore  # noqa: B018


def test_integrations_of_a_checkout_are_one_folder():
    assert (ROOT / "hf_galore/integrations").resolve() == ROOT / "integrations"


def build_wheel(folder: Path, **env: str) -> Path:
    """A wheel from a copy of the sources in which nothing has been built yet."""
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "_native_*")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | env)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """One without native ops, since there was no compiler: an installation succeeds all the same."""
    return build_wheel(tmp_path_factory.mktemp("wheel"), CC="/no/compiler", CXX="/no/compiler")


def test_wheel_holds_every_module_once(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = {str(path.relative_to(ROOT)) for path in CORE}
    expected |= {f"hf_galore/integrations/{path.name}" for path in (ROOT / "integrations").glob("*.py")}
    assert sorted(name for name in names if name.endswith(".py")) == sorted(expected)
    assert "hf_galore/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"hf_galore"}


@pytest.mark.slow
def test_wheel_holds_the_native_ops(tmp_path):
    """One for every Python from 3.10 on; where they cannot be built, a note of why."""
    wheel = build_wheel(tmp_path)
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]
    names = zipfile.ZipFile(wheel).namelist()
    found = {name.removeprefix("hf_galore/_native") for name in names if name.startswith("hf_galore/_native_")}
    library, note = f"_v{native.OPS_VERSION}.abi3.so", "_build.txt"
    cpu = library if native.cpu_kernels() else note
    assert found in ({cpu, f"_cuda{library}"}, {cpu, f"_cuda{note}"})


def test_an_installation_without_a_compiler_says_what_is_missing(wheel):
    """By a note, which `python -m hf_galore env` shows."""
    archive = zipfile.ZipFile(wheel)
    assert "/no/compiler" in archive.read("hf_galore/_native_build.txt").decode()
    assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_wheel_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import hf_galore, hf_galore.integrations as it; print(it.__name__, it.__file__, hf_galore.register.__name__)"
    )
    output = python(code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert output == f"hf_galore.integrations {tmp_path}/hf_galore/integrations/__init__.py register"
