# SPDX-License-Identifier: BSD-3-Clause
"""All mutants, in the order in which they are numbered: those first that need no compiler."""

from . import call_lines, cpu_lines, cuda_lines, formula_lines, python_lines

MUTANTS = [
    *python_lines.MUTANTS,
    *formula_lines.MUTANTS,
    *cpu_lines.MUTANTS,
    *call_lines.MUTANTS,
    *cuda_lines.MUTANTS,
]
