# SPDX-License-Identifier: BSD-3-Clause
"""Random cases of every operator and public function against the reference.

The properties are in tests/fuzz/; `make test` runs a few cases of each, ``python -m tools.fuzz`` as
many as wanted.
"""
