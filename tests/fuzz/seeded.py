# SPDX-License-Identifier: BSD-3-Clause
"""The share of `make test`: some cases of each property, the same ones each time. The files
test_cases_*.py are one for each process that runs them."""

from tests.fuzz.engine import run_seed
from tests.fuzz.properties import BY_NAME

SEED = 20
PARTS = {
    "rows": ("cross_entropy", "cross_entropy_sweep", "row_statistics", "labels", "transforms"),
    "hidden": ("linear_cross_entropy", "linear_sweep", "linear_row_statistics", "rows_by_name"),
    "elements": ("squared_error", "token_losses", "element_losses", "tokens_by_name", "bounds"),
}
PARTS["others"] = tuple(n for n in BY_NAME if not any(n in names for names in PARTS.values()))


def check_seeded(name):
    prop = BY_NAME[name]
    outcome = run_seed(prop, SEED, prop.examples)
    assert not outcome.failure, outcome.failure
    assert outcome.cases >= prop.examples
