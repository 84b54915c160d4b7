# SPDX-License-Identifier: BSD-3-Clause
"""Each example in its quick form, and what its last line says (`make examples`).

A few steps teach little, so what is looked at is what does not depend on luck: what the runs have
in common, what training improves at once, what C++ and Python agree on.
"""

import re
import subprocess
import sys

import pytest
from example_runs import ROOT, last_figures, run_example

pytestmark = [pytest.mark.examples, pytest.mark.slow]

ONE_PROCESS = [
    "accumulation.py", "cpp_programs.py", "edit_masks.py", "grpo.py", "lightning_module.py",
    "masked_autoencoder.py", "nested_dropout.py", "trainer.py",
]  # fmt: skip
ELSEWHERE = ["ddp.py", "fsdp2.py", "tensor_parallel.py", "demo.py"]  # have tests of their own


def test_accumulation():
    text = run_example("accumulation.py", "--quick")
    (off,) = re.findall(r"means are off by (\d+)%", text)
    assert int(off) > 1
    exact, means, before = last_figures(text, "bits per byte, held out: ")
    assert exact < before - 0.2 and exact != means


def test_trainer():
    """With and without logits is one training with right numbers; with padding they are not."""
    pytest.importorskip("transformers")
    text = run_example("trainer.py", "--quick")
    lines = re.findall(r"^(.*): \d+ ms .* says ([\d.]+) .* is ([\d.]+)$", text, re.M)
    said = {way: (float(trainers), float(true)) for way, trainers, true in lines}
    assert len(said) == 3
    assert said["with logits"] == pytest.approx(said["without logits"], abs=2e-3)
    for way in ("with logits", "without logits"):
        assert said[way][0] == pytest.approx(said[way][1], abs=2e-2)
    before, after, off = last_figures(text, "nats per word, held out: ")
    assert after < before - 0.2 and abs(off) > 0.1


def test_masked_autoencoder():
    text = run_example("masked_autoencoder.py", "--quick", "--steps", "12")
    hidden, shown, grey = last_figures(text, "squared error of hidden patches, held out: ")
    assert hidden < 1.02 * shown < grey
    padding, plain = re.search(r"^(\d+)% of the held-out .* everything: (.*)$", text, re.M).groups()
    assert 20 < int(padding) < 80 and float(plain) != hidden


def test_edit_masks():
    text = run_example("edit_masks.py", "--quick")
    noisy, denoised = re.findall(r"PSNR ([\d.]+) dB .* loss ([\d.]+)$", text, re.M)
    assert float(denoised[0]) > float(noisy[0]) + 3 and float(denoised[1]) < float(noisy[1]) / 3
    loss, share, same, more, plain, less = last_figures(text, "loss, held out: ")
    assert loss == pytest.approx(same, rel=1e-4) and more > share
    assert less < 0.9 * plain


def test_nested_dropout():
    text = run_example("nested_dropout.py", "--quick")
    for name in ("nested", "plain"):
        line = re.search(rf"^.*, {name}: (.*) of 64 registers$", text, re.M)[1]
        errors = [float(error) for error in re.findall(r"([\d.]+) with", line)]
        assert errors == sorted(errors, reverse=True) and len(errors) == 4
    nested, plain, grey = last_figures(text, "from 4 registers: ")[:3]
    assert nested < grey and plain < grey


def test_grpo():
    text = run_example("grpo.py", "--quick", "--steps", "6")
    start = "letters that 512 names are off 8, mean: "
    before, after = last_figures(text, start)
    assert after < before
    assert len(re.findall(r"'", text)) >= 12, "samples are shown"


def test_cpp_programs():
    text = run_example("cpp_programs.py", "--quick")
    assert "of 9 tokens: 0.25 masked, nan with the padding counted" in text
    bits = [float(b) for b in re.findall(r"^([\d.]+) .*\.py$", text, re.M)]
    assert len(bits) == 5 and all(4 < b < 9 for b in bits)
    files, mean, apart, _ = last_figures(text, "bits per byte of ")
    assert files == 5 and mean == pytest.approx(sum(bits) / 5, abs=1e-3) and apart < 1e-4


def test_wrong_switches_are_refused():
    line = [sys.executable, str(ROOT / "examples" / "accumulation.py"), "--steps", "0"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "argument --steps: must be at least 1, got 0" in done.stderr


def test_table():
    """Every example has a row with its command, and a docstring that says how it is run."""
    files = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert files == {*ONE_PROCESS, *ELSEWHERE, "examples_common.py", "ranks_common.py"}
    table = (ROOT / "examples" / "README.md").read_text()
    for name in ONE_PROCESS + ELSEWHERE:
        assert re.search(rf"^\| `.*{re.escape(name)}", table, re.M), name
    for name in ONE_PROCESS:
        text = (ROOT / "examples" / name).read_text()
        assert f"python examples/{name} --quick\n" in text, name
