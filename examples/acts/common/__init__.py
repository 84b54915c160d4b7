# SPDX-License-Identifier: BSD-3-Clause
"""What several acts share: photographs and their tokens, transformer blocks, measuring, tables,
the look of the pictures.
"""
