# SPDX-License-Identifier: BSD-3-Clause
"""The site of docs/: built by Sphinx, and looked at by a real browser."""
