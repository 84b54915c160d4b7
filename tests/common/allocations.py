# SPDX-License-Identifier: BSD-3-Clause
"""Memory in numbers that are the same in every run."""

import torch


def allocated_bytes(step):
    """All that PyTorch's allocator hands out meanwhile, freed again or not."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)
