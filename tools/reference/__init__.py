# SPDX-License-Identifier: BSD-3-Clause
"""The reference part of the site, made of docstrings, facts and committed figures."""
