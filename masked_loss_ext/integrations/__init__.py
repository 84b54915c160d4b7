# SPDX-License-Identifier: BSD-3-Clause
"""For what users train with: each is imported by its own name, never by the package."""
