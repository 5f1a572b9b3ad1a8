# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from setuptools import find_packages, setup


# Also in src/diffusers_lsep/__init__.py and CITATION.cff: tests/test_package.py checks that the three agree.
VERSION = "0.1.0.dev0"

# Where the repository is in public, as soon as it is: "https://...". Model cards and the site take the address from
# the package's metadata; in README.md and docs/index.md it stands in the place of ADDRESS.
REPOSITORY = ""

extras = {}
extras["train"] = ["matplotlib>=3.9", "tensorboard>=2.17.1"]
extras["eval"] = ["matplotlib>=3.9", "torch-fidelity>=0.4", "torchvision>=0.21"]
extras["demo"] = ["gradio>=6"]
extras["docs"] = ["mkdocs-material>=9.7", "mkdocstrings-python>=2"]
extras["quality"] = ["mypy>=2", "ruff>=0.9"]
extras["test"] = [
    *extras["train"],
    *extras["eval"],
    *extras["demo"],
    *extras["docs"],
    *extras["quality"],
    "gguf>=0.19",  # single files of quantized weights; older ones need sentencepiece
    "hypothesis>=6.120",  # makes the input of tests/fuzz
    "kornia",  # of one of diffusers' guiders
    "parameterized",  # this and requests-mock: for diffusers' own tests, which tests/upstream runs
    "peft>=0.18",
    "pytest>=8",
    "pytest-timeout>=2.3.1",
    "pytest-xdist>=3.6",
    "requests-mock",
    "selenium>=4.20",  # looks at the demo in a browser
]

setup(
    name="diffusers_lsep",
    version=VERSION,
    description="LSEP, generative training with a linear probe in place of an external encoder, native in diffusers",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The diffusers_lsep authors",
    project_urls={"Repository": REPOSITORY} if REPOSITORY else {},
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["diffusers", "flow matching", "SiT", "LSEP", "image generation", "representation learning"],
    package_dir={"": "src"},
    # src/diffusers_lsep/examples is a link: people copy these scripts, and an installed package can run them.
    packages=[*find_packages("src"), "diffusers_lsep.examples"],
    package_data={
        "diffusers_lsep": ["py.typed", "*.json"],
        "diffusers_lsep.hub": ["*.md"],
        "diffusers_lsep.examples": ["configs/*", "configs/*/*", "digits/*", "mnist/*"],
    },
    python_requires=">=3.11",  # that of diffusers 0.42
    # psutil and PyYAML, which we import as well, come with accelerate.
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.42",
        "transformers>=5.0",
        "accelerate>=1.10",
        "datasets>=4.0",
        "huggingface-hub>=1.32",
        "safetensors>=0.8",
        "evaluate>=0.4.5",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["diffusers-lsep=diffusers_lsep.cli:console_main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
