# SPDX-License-Identifier: BSD-3-Clause
"""numpy and einops are not needed: a Python without them passes the tests that ask for neither."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from masked_loss_ext import _build

TESTS = Path(__file__).resolve().parents[1]
MISSING = ("numpy", "einops")
FILES = [  # of those that do not use numpy themselves
    "elementwise/test_hand_worked.py",
    "cross_entropy/test_hand_worked.py",
    "diagnostics/test_check_padding.py",
    "attention/test_nested_dropout_ids.py",
    "cross_entropy/test_multi_token.py",
    "unified/test_state.py",
    "cross_entropy/test_shift.py",
    "elementwise/test_padding.py",
]
# PyTorch's own words, said once when it is imported.
OF_PYTORCH = "Failed to initialize NumPy"
SCRIPT = """
import sys, warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
warnings.simplefilter("error")
import masked_loss_ext as mle
labels = torch.tensor([[1, 0, 1]])
logits = torch.zeros(1, 3, 2, requires_grad=True)
loss = mle.masked_cross_entropy(logits, labels)
loss.backward()
total = mle.UnifiedLoss(vocab_size=2)(logits, labels)
dropout = mle.AttentionMaskedNestedDropout("keep_k")
print(f"{loss.item():.6f}", [name for name in sys.modules if name in ("numpy", "einops")])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a Python that finds the packages of this one, but those two."""
    site = tmp_path_factory.mktemp("site")
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    places.add(str(_build.torch_about()[0].parent))
    for package in (p for place in places for p in Path(place).iterdir()):
        if not package.name.startswith(MISSING) and not (site / package.name).exists():
            (site / package.name).symlink_to(package)
    path = os.pathsep.join(map(str, (site, _build.PACKAGE.parent, TESTS, TESTS / "common")))

    def run(*arguments):
        # -S: no site-packages but those, and no .pth file.
        command = [sys.executable, "-S", *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True)

    assert run("-c", "import numpy").returncode and run("-c", "import einops").returncode
    return run


def test_nothing_is_said(run):
    done = run("-c", SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.693147 []\n", "")


@pytest.mark.slow
def test_tests_pass(run):
    files = [str(TESTS / name) for name in FILES]
    options = ["-q", "-p", "no:cacheprovider", "-W", "error", "-W", f"ignore:{OF_PYTORCH}"]
    done = run("-m", "pytest", "--rootdir", str(TESTS.parent), *options, *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 200, done.stdout[-500:]


def test_only_functions_import_them():
    for path in _build.PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names]
                assert not [n for n in names if n.partition(".")[0] in MISSING], path
