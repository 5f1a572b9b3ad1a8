# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""A few generated calls of every surface, the same at every time. `make fuzz` makes 10,000 others."""

import hypothesis
import pytest
from fuzz.cases import REFUSED, WORKED, judge
from fuzz.surfaces import SURFACES


@pytest.mark.slow
@pytest.mark.parametrize("name", SURFACES)
@pytest.mark.filterwarnings("ignore")
def test_generated_calls_work_or_are_refused_in_words(name):
    @hypothesis.settings(
        max_examples=15,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(SURFACES[name])
    def check(case):
        outcome, reason = judge(case)
        assert outcome in (WORKED, REFUSED), f"{outcome}: {case}\n{reason}"

    check()
