# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
Feeds generated input to the package and counts how that ends: `make fuzz`, or

    PYTHONPATH=tests python -m fuzz.run --examples 10000

Prints a table, and every call that ended in an error from inside of torch or Python (raw), in a wrong result without
an error (silent), or not at all (hung). Ends with the exit code 1 if there are any.
"""

import argparse
import collections
import logging
import resource
import sys
import time
import warnings

import diffusers
import hypothesis
import torch
from fuzz.cases import HUNG, RAW, REFUSED, SILENT, WORKED, Case, judge
from fuzz.surfaces import SURFACES


MEMORY = 16 * 2**30  # more than that is an error, in place of the end of other processes
COLUMNS = (WORKED, REFUSED, RAW, SILENT, HUNG)


def run_surface(name: str, examples: int, seed: int, found: dict) -> collections.Counter:
    """Counts how so many calls of a surface end; what is wrong goes into `found`, once for each place."""
    counts: collections.Counter[str] = collections.Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(SURFACES[name])
    def run(case: Case):
        outcome, reason = judge(case)
        counts[outcome] += 1
        if outcome in (RAW, SILENT, HUNG):
            key = (name, outcome, reason.rpartition("(")[2] if outcome == RAW else reason)
            found.setdefault(key, [reason, case, 0])[2] += 1

    run()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="Calls in all.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed makes other calls.")
    parser.add_argument("--surfaces", nargs="*", default=list(SURFACES), help="Parts of the names of some surfaces.")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    diffusers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    names = [name for name in SURFACES if any(part in name for part in args.surfaces)]
    print(f"{'surface':28}" + "".join(f"{column:>9}" for column in ("inputs", *COLUMNS, "seconds")), flush=True)
    found: dict = {}
    total: collections.Counter[str] = collections.Counter()
    for index, name in enumerate(names):
        examples = args.examples // len(names) + (index < args.examples % len(names))
        start = time.monotonic()
        counts = run_surface(name, examples, args.seed, found)
        total.update(counts)
        cells = (counts.total(), *(counts[column] for column in COLUMNS), round(time.monotonic() - start))
        print(f"{name:28}" + "".join(f"{cell:9,}" for cell in cells), flush=True)
    print(f"{'all':28}" + "".join(f"{cell:9,}" for cell in (total.total(), *(total[c] for c in COLUMNS))))
    for (name, outcome, _), (reason, case, times) in found.items():
        print(f"\n{outcome} x {times}, {name}: {case}\n  {reason}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
