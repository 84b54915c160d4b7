# SPDX-License-Identifier: BSD-3-Clause
"""The demo's act "repetition": what it measures, by hand, and a smoke run of all of it."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300  # seconds on an idle machine; a busy one must not fail the test
RUNS = ["cross entropy", "with penalty"]


@pytest.fixture
def acts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT)
    import acts
    import acts.repetition.generation
    import acts.repetition.training

    return acts


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One smoke run: (what it printed, where its picture is)."""
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--quick", "--device", "cpu"]
    command += ["--acts", "repetition", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout, output


def row(text, name):
    found = re.search(rf"^{re.escape(name)}  +(.*)$", text, re.MULTILINE)
    assert found, f"no row {name!r} in:\n{text}"
    return re.split(r"  +", found.group(1).strip())


def test_it_runs_by_name_alone(acts):
    assert "repetition" in acts.ACTS and "repetition" not in acts.DEFAULT
    assert {"denoise", "language"} <= set(acts.DEFAULT) < set(acts.ACTS)


def test_repeated_ngrams_by_hand(acts):
    tokens = torch.tensor([list(b"abXXabababab"), list(b"abXabcabdef\0")])
    ended = tokens == 0
    texts = acts.repetition.generation.Texts(tokens, 4, ended)
    # behind the prompts "abXX" and "abXa": abababab, of 7 pairs 5 again; bcabdef, of 6 none
    assert texts.repeated(2) == pytest.approx(5 / 13)
    assert texts.repeated(4) == pytest.approx(3 / 9)
    assert texts.repeated(9) == 0.0
    assert (texts.longest_run(), texts.finished()) == (1.0, 0.5)
    assert texts.text(1) == "abXabcabdef"


def test_prompts_are_continued_alike_and_to_the_end_mark(acts):
    generation = acts.repetition.generation
    real = generation.held_out_texts([b"abcdefgh", b"short", b"ijklmnop", b"abcdefxy"], 2, 3, 4)
    assert [bytes(text) for text in real.tokens.tolist()] == [b"abcdefg", b"ijklmno"]

    class Next(torch.nn.Module):  # the byte after the last one; after "f" the end
        embed = torch.nn.Embedding(1, 1)

        def forward(self, tokens):
            following = torch.where(tokens == ord("f"), 0, tokens + 1)
            return [torch.nn.functional.one_hot(following, 256) * 50.0]

    for temperature in (0.0, 1.0):
        made = generation.continuations(Next(), real, temperature, seed=0)
        assert made.text(0) == "abcdef" and made.text(1) == "ijklmno"
        assert made.finished() == 0.5


@pytest.mark.parametrize("penalised", [False, True])
def test_the_penalty_is_the_only_difference(acts, penalised):
    training = acts.repetition.training
    tokens = torch.tensor([list(b"self.first = 1; self.first2; self.first")])
    batch = acts.language.data.Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    logits = torch.randn(1, tokens.shape[1], 256, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_(True)
    total, main, penalty = training.Objective(penalised)(logits, batch)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(main, expected)
    if not penalised:
        torch.testing.assert_close(total, main)
        return
    # Said after " self.first" at 28, " " would repeat an 8-gram: lower logits of it are rewarded.
    assert penalty.item() > 0
    total.backward()
    at = bytes(tokens[0].tolist()).index(b"first2") + len("first") - 1
    plain = (logits[0, at].softmax(-1)[ord(" ")] / (tokens.shape[1] - 1)).item()
    assert logits.grad[0, at, ord(" ")].item() > 1.5 * plain


@pytest.mark.parametrize("name", RUNS)
def test_bits_per_byte_are_plausible(quick, name):
    before, after = map(float, row(quick[0], name)[:2])
    assert 1 < after < 8 and before == float(row(quick[0], RUNS[0])[0])


@pytest.mark.parametrize(
    "name",
    ["held-out functions", *(f"{run}, {how}" for run in RUNS for how in ("greedy", "T = 1"))],
)
def test_shares_of_repeated_ngrams_are_shares(quick, name):
    *shares, run, ended = row(quick[0], name)
    assert len(shares) == 4
    assert all(0 <= float(share.rstrip("%")) <= 100 for share in [*shares, ended])
    assert math.isfinite(float(run)) and float(run) >= 1


def test_says_what_the_penalty_costs_and_changes(quick):
    assert re.search(r"^Held-out loss with the penalty: [-+][\d.]+%\.$", quick[0], re.MULTILINE)
    assert len(re.findall(r"% without the penalty, [\d.]+% with it \(", quick[0])) == 2


def test_the_picture_shows_something(quick):
    assert [path.name for path in quick[1].iterdir()] == ["repetition.png"]
    with Image.open(quick[1] / "repetition.png") as image:
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 10  # an empty canvas has 0
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
