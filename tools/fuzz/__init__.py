# SPDX-License-Identifier: BSD-3-Clause
"""Random cases of every operator and public function against the reference: ``python -m tools.fuzz``.

The properties are in tests/fuzz/; `make test` runs a few cases of each, this as many as wanted.
"""
