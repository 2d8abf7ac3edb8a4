"""Packaging of hf_galore, and the build of its native ops where torch and a compiler are. Needs neither."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "hf_galore/__init__.py").read_text("utf-8"), re.MULTILINE)[1]
OPS_VERSION = re.search(r"^OPS_VERSION = (\d+)", (ROOT / "hf_galore/native.py").read_text("utf-8"), re.MULTILINE)[1]

# The oldest torch whose stable ABI has what the library uses (parallel_for); the library then runs with any newer one.
OLDEST_TORCH = (2, 10)
TARGET = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
COMPILE = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]

NVCC = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Werror=all-warnings"]
NVCC += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
ARCHITECTURES = "8.0;8.9;9.0+PTX"  # where TORCH_CUDA_ARCH_LIST does not say others


def torch_folder() -> Path:
    """Where torch is installed, found without importing it.

    Also from a build that pip isolates, where torch cannot be imported: the interpreter is that of the environment.

    Raises:
        RuntimeError: there is none, or it is too old.
    """
    folders = [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    spec = find_spec("torch")
    folders += [Path(spec.origin).parent] if spec is not None and spec.origin else []
    for folder in folders:
        if (folder / "include/torch/csrc/stable").is_dir():
            version = re.search(r"__version__ = .(\d+)\.(\d+)", (folder / "version.py").read_text("utf-8"))
            if version is not None and (int(version[1]), int(version[2])) >= OLDEST_TORCH:
                return folder
            break
    wanted = ".".join(map(str, OLDEST_TORCH))
    raise RuntimeError(f"no torch {wanted} or newer was installed when hf_galore was")


def nvcc(torch: Path, architectures: list[str], sources: list[str], *arguments: str) -> None:
    """Runs nvcc on CUDA sources, every warning an error.

    Raises:
        RuntimeError: there is no nvcc, or it fails.
    """
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    compiler = shutil.which("nvcc", path=os.pathsep.join(map(str, [*homes, os.environ.get("PATH", "")])))
    if compiler is None:
        raise RuntimeError("there is no nvcc, neither in CUDA_HOME nor on the path")
    flags = [*NVCC, f"-DTORCH_TARGET_VERSION={TARGET}", "-isystem", str(torch / "include"), *architectures]
    if subprocess.run([compiler, *flags, *sources, *arguments], cwd=ROOT).returncode != 0:
        raise RuntimeError("nvcc failed")


def architectures(wanted: str) -> Iterator[str]:
    """nvcc's options for what TORCH_CUDA_ARCH_LIST has, like "8.0;9.0+PTX".

    Raises:
        RuntimeError: it has something else.
    """
    for one in wanted.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", one)
        if match is None:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: {one!r} is not like 8.0 or 9.0+PTX")
        number = match[1] + match[2]
        codes = [f"sm_{number}", *([f"compute_{number}"] if match[3] else [])]
        yield f"-gencode=arch=compute_{number},code=[{','.join(codes)}]"


class BuildNative(build_ext):
    """Builds the native ops, or leaves a note of why they cannot be built: an installation never fails for them."""

    def build_extension(self, ext: Extension) -> None:
        note = Path(self.get_ext_fullpath(ext.name)).with_name(note_of(ext))
        note.unlink(missing_ok=True)
        try:
            torch = torch_folder()
            if ext is CUDA:
                self.build_cuda(torch, Path(self.get_ext_fullpath(ext.name)))
            else:
                self.build_cpu(torch, ext)
        except Exception as error:
            reason = f"it was not built: {error}"
            print(f"hf_galore: {ext.name} will be missing, {reason}", file=sys.stderr)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(reason + "\n", "utf-8")

    def build_cpu(self, torch: Path, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise RuntimeError(
                f"its compiler must take the options of GCC, and {self.compiler.compiler_type} does not"
            )
        ext.define_macros = [("TORCH_TARGET_VERSION", TARGET)]
        ext.extra_compile_args = [*COMPILE, "-isystem", str(torch / "include")]
        ext.library_dirs, ext.libraries = [str(torch / "lib")], ["torch_cpu", "c10"]
        super().build_extension(ext)

    def build_cuda(self, torch: Path, library: Path) -> None:
        if re.search(r"^cuda\b.*= .\d", (torch / "version.py").read_text("utf-8"), re.MULTILINE) is None:
            raise RuntimeError("torch is built without CUDA")
        chosen = list(architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES))
        library.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-lc10"]
        nvcc(torch, chosen, CUDA.sources, "-shared", "-o", str(library), *libraries)

    def copy_extensions_to_source(self) -> None:
        """For editable installations: the libraries, or the notes, next to the sources."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            for path in (built, built.with_name(note_of(ext))):
                target = ROOT / "hf_galore" / path.name
                target.unlink(missing_ok=True)
                if path.exists():
                    self.copy_file(str(path), str(target))


def library_of(device: str, name: str) -> Extension:
    """The ops of one device: csrc/<device>, with the headers that all share."""
    files = [*(ROOT / "hf_galore/csrc").glob("*.h"), *(ROOT / "hf_galore/csrc" / device).iterdir()]
    sources = [path for path in files if path.suffix in (".cpp", ".cu")]
    return Extension(
        f"hf_galore.{name}_v{OPS_VERSION}",
        sources=sorted(str(path.relative_to(ROOT)) for path in sources),
        depends=sorted(str(path.relative_to(ROOT)) for path in files if path not in sources),
        language="c++",
        py_limited_api=True,  # it holds no Python at all
    )


def note_of(ext: Extension) -> str:
    """The file that says why a library is missing."""
    return f"{ext.name.split('.')[-1].rpartition('_v')[0]}_build.txt"


class Kernels(Command):
    """Compiles the CUDA sources for all architectures, to nowhere: what shows that they compile without a GPU."""

    description = "compile the CUDA sources"
    user_options = []  # noqa: RUF012

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        for source in CUDA.sources:
            nvcc(torch_folder(), list(architectures(ARCHITECTURES)), [source], "-c", "-o", os.devnull)
        print(f"the CUDA sources compile for {ARCHITECTURES}")


NATIVE, CUDA = library_of("cpu", "_native"), library_of("cuda", "_native_cuda")

OLDEST = runpy.run_path(str(ROOT / "hf_galore/versions.py"))["OLDEST"]
BOUNDS = {name: f"{name}>={oldest}" for name, oldest in OLDEST.items()}
BOUNDS["transformers"] += ",<6"  # whose deprecated names, past_key_values for one, go in version 6
TRANSFORMERS = [BOUNDS[name] for name in ("transformers", "accelerate", "peft")]
EXTRAS = {
    "transformers": TRANSFORMERS,
    "trl": [*TRANSFORMERS, BOUNDS["trl"]],
    "bitsandbytes": ["bitsandbytes"],
    "deepspeed": [*TRANSFORMERS, BOUNDS["deepspeed"]],
    "gguf": [*TRANSFORMERS, "gguf"],
    "demo": [BOUNDS["transformers"], BOUNDS["accelerate"], "tokenizers", "matplotlib", "datasets"],
    "lint": ["ruff", "mypy", "pre-commit"],
}
EXTRAS["test"] = sorted(
    {
        *EXTRAS["trl"],
        *EXTRAS["bitsandbytes"],
        *EXTRAS["deepspeed"],
        *EXTRAS["gguf"],
        *EXTRAS["demo"],
        "coverage>=7.10",
        "expecttest",
        "galore-torch",
        "hypothesis",
        "optuna",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "setuptools>=77",
    }
)

setup(
    name="hf_galore",
    version=VERSION,
    description="Train every weight of a large language model in the memory of LoRA, from the Hugging Face scripts "
    "you already have",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["galore", "bitnet", "attention sinks", "low-rank", "optimizer", "transformers", "peft"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=[BOUNDS["torch"]],
    extras_require=EXTRAS,
    # find_packages sees integrations/ through the symlink; it is named for checkouts that have no symlinks.
    packages=sorted({*find_packages(include=["hf_galore", "hf_galore.*"]), "hf_galore.integrations"}),
    package_dir={"hf_galore.integrations": "integrations"},
    package_data={"hf_galore": ["py.typed"]},
    ext_modules=[NATIVE, CUDA],
    cmdclass={"build_ext": BuildNative, "kernels": Kernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
