# SPDX-License-Identifier: BSD-3-Clause
"""The one place that names the version: read by the build, by CMake and by the package."""

__version__ = "0.1.0"
