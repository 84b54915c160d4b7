# SPDX-License-Identifier: BSD-3-Clause
"""``make sanitize``: tests and kernels under the sanitizers of gcc and clang."""
