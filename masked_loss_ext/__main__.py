# SPDX-License-Identifier: BSD-3-Clause
"""``python -m masked_loss_ext`` ends in the package's own import, see there; this is for runpy."""

import sys

from masked_loss_ext.environment import main

sys.exit(main())
