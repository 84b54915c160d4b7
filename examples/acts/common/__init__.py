# SPDX-License-Identifier: BSD-3-Clause
"""What several acts share: transformer blocks, measuring, tables, the look of the pictures."""
