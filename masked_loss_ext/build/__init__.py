# SPDX-License-Identifier: BSD-3-Clause
"""What to compile and how; find, load or compile the library.

Only `loading` imports torch: setup.py, CMake and the tools take the other modules before torch or
the package can be imported, as the package `build` with masked_loss_ext/ on the path.
"""
