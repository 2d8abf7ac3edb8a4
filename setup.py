"""Packaging of hf_galore, and the build of its native ops where torch and a compiler are. Needs neither."""

import re
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "hf_galore/__init__.py").read_text("utf-8"), re.MULTILINE)[1]
OPS_VERSION = re.search(r"^OPS_VERSION = (\d+)", (ROOT / "hf_galore/native.py").read_text("utf-8"), re.MULTILINE)[1]

# The oldest torch whose stable ABI has what the library uses (parallel_for); the library then runs with any newer one.
OLDEST_TORCH = (2, 10)
COMPILE = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]


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


class BuildNative(build_ext):
    """Builds the native ops, or leaves a note of why they cannot be built: an installation never fails for them."""

    def build_extension(self, ext: Extension) -> None:
        note = Path(self.get_ext_fullpath(ext.name)).parent / "_native_build.txt"
        note.unlink(missing_ok=True)
        try:
            if self.compiler.compiler_type != "unix":
                raise RuntimeError(
                    f"its compiler must take the options of GCC, and {self.compiler.compiler_type} does not"
                )
            torch = torch_folder()
            major, minor = OLDEST_TORCH
            ext.define_macros = [("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000")]
            ext.extra_compile_args = [*COMPILE, "-isystem", str(torch / "include")]
            ext.library_dirs, ext.libraries = [str(torch / "lib")], ["torch_cpu", "c10"]
            super().build_extension(ext)
        except Exception as error:
            reason = f"it was not built: {error}"
            print(f"hf_galore: the native ops will be missing, {reason}", file=sys.stderr)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(reason + "\n", "utf-8")

    def copy_extensions_to_source(self) -> None:
        """For editable installations: the library, or the note, next to the sources."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            for path in (built, built.with_name("_native_build.txt")):
                target = ROOT / "hf_galore" / path.name
                target.unlink(missing_ok=True)
                if path.exists():
                    self.copy_file(str(path), str(target))


NATIVE = Extension(
    f"hf_galore._native_v{OPS_VERSION}",
    sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "hf_galore/csrc/cpu").glob("*.cpp")),
    depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "hf_galore/csrc/cpu").glob("*.h")),
    language="c++",
    py_limited_api=True,  # it holds no Python at all
)

TRANSFORMERS = ["transformers>=5", "accelerate", "peft"]
EXTRAS = {
    "transformers": TRANSFORMERS,
    "trl": [*TRANSFORMERS, "trl"],
    "bitsandbytes": ["bitsandbytes"],
    "deepspeed": [*TRANSFORMERS, "deepspeed>=0.19"],
    "gguf": [*TRANSFORMERS, "gguf"],
    "demo": ["transformers>=5", "accelerate", "tokenizers", "matplotlib", "datasets"],
    "lint": ["ruff", "mypy", "pre-commit"],
}
EXTRAS["test"] = sorted(
    {
        *EXTRAS["trl"],
        *EXTRAS["bitsandbytes"],
        *EXTRAS["deepspeed"],
        *EXTRAS["gguf"],
        *EXTRAS["demo"],
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
    install_requires=["torch>=2.6"],
    extras_require=EXTRAS,
    # find_packages sees integrations/ through the symlink; it is named for checkouts that have no symlinks.
    packages=sorted({*find_packages(include=["hf_galore", "hf_galore.*"]), "hf_galore.integrations"}),
    package_dir={"hf_galore.integrations": "integrations"},
    package_data={"hf_galore": ["py.typed"]},
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
