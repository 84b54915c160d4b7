# SPDX-License-Identifier: BSD-3-Clause
"""One file per operator: the function that the losses call, its fake and its derivative."""
