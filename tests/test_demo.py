# SPDX-License-Identifier: BSD-3-Clause
"""The demo runs as a user would start it, and what it prints and draws is real."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300  # seconds on an idle machine; a busy one must not fail the test


def demo(*arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One smoke run: (what it printed, where its pictures are)."""
    output = tmp_path_factory.mktemp("demo")
    done = demo("--quick", "--device", "cpu", "--output", output)
    assert done.returncode == 0, done.stderr
    return done, output


def row(text, name):
    """The cells of the table row that starts with ``name``."""
    found = re.search(rf"^{re.escape(name)}  +(.*)$", text, re.MULTILINE)
    assert found, f"no row {name!r} in:\n{text}"
    return re.split(r"  +", found.group(1).strip())


def number(cell):
    return float(re.match(r"[-+]?[\d.]+(?:e-?\d+)?", cell).group())


def test_says_which_kernels(quick):
    text = quick[0].stdout
    assert re.search(r"^masked_loss_ext \d+\.\d+\.\d+ \(.+\), PyTorch \d", text, re.MULTILINE)
    assert re.search(r"^kernels: CPU (default|avx2|avx512), \d+ threads; CUDA ", text, re.MULTILINE)


def test_shows_progress(quick):
    assert re.search(r"training:.*\d+/\d+ .*step", quick[0].stderr)


@pytest.mark.parametrize("name", ["noisy", "before training", "after training"])
def test_quality_is_plausible(quick, name):
    psnr = [number(cell) for cell in row(quick[0].stdout, name)]
    assert len(psnr) == 3 and all(5 < value < 50 for value in psnr)
    assert psnr[1] < psnr[2]  # the edit region is the noisier one


def test_denoised_is_better_than_noisy(quick):
    noisy, after = (number(row(quick[0].stdout, n)[0]) for n in ("noisy", "after training"))
    assert after > noisy + 3


FORMS = {
    # name: (is its value the right one?, loss and gradient with a NaN in the padding)
    "masked_loss_ext": (True, ["finite", "finite"]),
    "PyTorch, error times mask": (True, ["NaN", "NaN"]),
    "PyTorch, where on the error": (True, ["finite", "NaN"]),
    "PyTorch, where on both inputs": (True, ["finite", "finite"]),
    "PyTorch, mean over padding too": (False, ["NaN", "NaN"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_comparison(quick, name):
    right, with_nan = FORMS[name]
    value, off_by, step, ratio, memory, *nan = row(quick[0].stdout, name)
    figures = [number(cell) for cell in (value, off_by, step, ratio)]
    assert all(map(math.isfinite, figures))
    assert number(step) > 0 and number(value) > 0
    assert (abs(number(off_by)) < 0.05) == right, off_by
    assert memory == "?" or number(memory) >= 0
    assert nan == with_nan


def test_unknown_memory_is_explained(quick):
    text = quick[0].stdout
    assert ("?" in row(text, "masked_loss_ext")) == ("peak memory is not known: " in text)


@pytest.mark.parametrize("name", ["denoise_losses.png", "denoise_reconstructions.png"])
def test_pictures_show_something(quick, name):
    with Image.open(quick[1] / name) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 10  # an empty canvas has 0
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_same_figures_again_from_another_folder(quick, tmp_path):
    again = demo("--quick", "--device", "cpu", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "demo_output" / "denoise_losses.png").is_file()
    for name in ("noisy", "before training", "after training"):
        assert row(again.stdout, name) == row(quick[0].stdout, name)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--acts", "paint"], r"invalid choice: 'paint' \(choose from '?denoise"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--device", "abacus"], "--device: 'abacus' is not a device"),
        (["--device", "meta"], "--device: must be cpu or cuda, got 'meta'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path):
    done = demo(*arguments, "--output", tmp_path / "none")
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "none").exists()
