# SPDX-License-Identifier: BSD-3-Clause
"""The tests that are run again wherever the same kernels are other code: at another
instruction-set level, by another compiler, on another machine."""

NUMBERS = [
    "elementwise/test_values.py::test_agrees_with_reference",
    "elementwise/test_values.py::test_every_float16_number",
    "elementwise/test_values.py::test_gradients_round_to_nearest_even",
    "elementwise/test_values.py::test_squares_that_overflow_float16",
    "elementwise/test_mask_laws.py::test_poison_in_every_dtype",
    "cross_entropy/test_values.py::test_agrees_with_reference",
    "cross_entropy/test_laws.py::test_poison_in_every_dtype",
    "cross_entropy/test_laws.py::test_a_row_does_not_depend_on_the_others",
    "cross_entropy/test_numbers.py",
    "cross_entropy_terms/test_values.py::test_agrees_with_reference",
]
# Masks, labels, strides, shapes and weights are read alike at every level; float64 needs no
# conversion, and the reductions no kernel. Of the numbers of classes, those around one register.
SELECTION = (
    "not mask_ and not float64 and not long_row and not any_ignore_index and not v50257 "
    "and not v128256 and not (test_agrees_with_reference and (_mean- or _sum- or rows_ or rank_ "
    "or no_ or nothing or weight_ or edit_ or all_ or ignored or sparse or target_ or pixels "
    "or v2- or v2_ or v3- or v3_ or v8 or v9 or v31 or v32 or v63 or v64 or v127 or v128))"
)


def pytest_words(tests):
    """Arguments of pytest that run them; `tests` is the folder."""
    files = [f"{tests}/{name}" for name in NUMBERS]
    return ["-q", "-p", "no:cacheprovider", "-k", SELECTION, *files]
