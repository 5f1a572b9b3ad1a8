# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Prints the lower bounds of `setup.py` in this folder, those of its extras too, as pins for `pip install -c`."""

import re
from distutils.core import run_setup  # that of setuptools


distribution = run_setup("setup.py", stop_after="init")
requirements = [*distribution.install_requires, *sum(distribution.extras_require.values(), [])]
bounds = dict(bound for text in requirements for bound in re.findall(r"^([\w.-]+)>=([\w.]+)", text))
print(*(f"{name}=={version}" for name, version in bounds.items()), sep="\n")
