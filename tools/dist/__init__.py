# SPDX-License-Identifier: BSD-3-Clause
"""What is given to others: a source archive and one wheel, checked and tried."""
