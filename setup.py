# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from setuptools import find_packages, setup


extras = {
    "train": ["matplotlib", "tensorboard"],
    "eval": ["matplotlib", "scipy", "torch-fidelity", "torchvision"],
    "quality": ["ruff>=0.9"],
}
extras["test"] = [
    *extras["train"],
    *extras["eval"],
    *extras["quality"],
    "parameterized",
    "peft",
    "pytest>=8",
    "pytest-timeout",
]

setup(
    name="diffusers_lsep",
    version="0.1.0.dev0",
    description="LSEP, generative training with a linear probe in place of an external encoder, native in diffusers",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The diffusers_lsep authors",
    license="Apache-2.0",
    keywords=["diffusers", "flow matching", "SiT", "LSEP", "image generation", "representation learning"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"diffusers_lsep": ["py.typed", "*.json"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.42",
        "transformers>=5.0",
        "accelerate>=1.10",
        "datasets>=4.0",
        "huggingface-hub>=1.0",
        "safetensors>=0.5",
        "evaluate>=0.4.5",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["diffusers-lsep=diffusers_lsep.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
