# SPDX-License-Identifier: BSD-3-Clause
"""A repetition penalty that trains: generated text beside held-out loss. ``act.run`` runs it."""
