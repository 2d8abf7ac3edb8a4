"""Packaging of hf_galore. Needs neither torch nor a compiler."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "hf_galore/__init__.py").read_text("utf-8"), re.MULTILINE)[1]

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
    zip_safe=False,
)
