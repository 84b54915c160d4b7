# SPDX-License-Identifier: BSD-3-Clause
"""The examples of several processes, started as a user starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 150  # seconds; 8 on two cores that nobody else uses


def run(example, *arguments, ranks=2):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    line = [sys.executable, *torchrun, ROOT / "examples" / example, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        line, capture_output=True, text=True, timeout=TIMEOUT, env=environment, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.parametrize("example", ["ddp.py", "fsdp2.py"])
def test_as_one_process(example):
    done = run(example, "--steps", "4", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^ +(\d) +\d+ +([\d.]+) +([\d.]+) .* ([\d.]+) \(", done.stdout, re.M)
    assert [int(step) for step, *_ in rows] == [1, 2, 3, 4], done.stdout
    for _, loss, alone, rank_means in rows:
        assert abs(float(loss) - float(alone)) <= 2e-6
        assert float(rank_means) != float(alone)
    assert done.stdout.rstrip().splitlines()[-2].endswith(": as one process")


WRONG = """
import sys
sys.path.insert(0, "examples")
import ranks_common
import masked_loss_ext.distributed as distributed
count = distributed.global_token_count
distributed.global_token_count = lambda *args, **options: count(*args, average=False, **options)
import ddp
code = ddp.train()
ddp.dist.destroy_process_group()
sys.exit(code)
"""


@pytest.mark.slow
def test_another_denominator_is_noticed(tmp_path):
    """Gradients half as large: Adam hardly minds, the losses that are compared do."""
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    done = run(script, "--steps", "2", "--device", "cpu")
    assert done.returncode != 0
    assert "NOT as one process" in done.stdout


def test_without_torchrun():
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    line = [sys.executable, ROOT / "examples" / "ddp.py"]
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=TIMEOUT, env=environment, cwd=ROOT
    )
    assert done.returncode == 2
    assert "start it with: torchrun --nproc-per-node 2 " in done.stderr


@pytest.mark.slow
def test_tensor_parallel():
    done = run("tensor_parallel.py", "--steps", "4", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^ +(\d) +\d+ +([\d.]+) +([\d.]+) ", done.stdout, re.M)
    assert [int(step) for step, *_ in rows] == [1, 2, 3, 4], done.stdout
    for _, loss, alone in rows:
        assert abs(float(loss) - float(alone)) <= 2e-6
    assert done.stdout.rstrip().endswith(": as one process")
