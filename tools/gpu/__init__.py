# SPDX-License-Identifier: BSD-3-Clause
"""Everything that a machine with a GPU can tell, by one command: ``python -m tools.gpu``."""
