# SPDX-License-Identifier: BSD-3-Clause
"""sync_state: the state of several ranks becomes one, and of one process nothing changes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from unified_cases import CASES, batch

from masked_loss_ext.unified._state import KeepsState, SyncsState

WITH_STATE = [c for c in CASES if any(isinstance(m, KeepsState) for m in c.make().modules())]


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """What is to hold stands in unified_two_ranks.py."""
    script = Path(__file__).parents[1] / "common" / "unified_two_ranks.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "meeting"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for output in outputs:
        assert output.rstrip().endswith("as one process"), output


@pytest.mark.parametrize("case", WITH_STATE, ids=[case.name for case in WITH_STATE])
def test_one_process_changes_nothing(case):
    module = case.make()
    case(module, batch())
    before = copy.deepcopy(module.state_dict())
    assert module.sync_state() is None
    for name, tensor in before.items():
        assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.parametrize("case", WITH_STATE, ids=[case.name for case in WITH_STATE])
def test_every_module_with_state_has_it_and_says_so(case):
    module = case.make()
    assert isinstance(module, SyncsState)
    text = type(module).__doc__ + (type(module).forward.__doc__ or "")
    assert "sync_state" in text and type(module).sync_state is SyncsState.sync_state
