# SPDX-License-Identifier: BSD-3-Clause
"""The demo runs as a user would start it, and what it prints and draws is real."""

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


def row(text, name, table=""):
    """The cells of the first row that starts with ``name``, of the tables after ``table``."""
    text = text[text.index(table) :]
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


RUNS = ["padding masked", "padding counted"]


@pytest.mark.parametrize("name", ["counts alone", *RUNS])
def test_bits_per_byte_are_plausible(quick, name):
    heads = [number(cell) for cell in row(quick[0].stdout, name)[-4:]]
    assert all(1 < bits < 8 for bits in heads)
    assert heads == sorted(heads)  # the farther ahead, the less is known


def test_only_the_run_with_the_mask_reports_its_true_loss(quick):
    masked, counted = (row(quick[0].stdout, name) for name in RUNS)
    assert masked[0] == masked[1]
    assert counted[0] != counted[1]


FOUR_TOKEN_FORMS = {
    # name: what becomes of loss and gradient with NaN logits and absurd labels in the padding
    "masked_loss_ext": ["same bits", "same bits"],
    "masked_loss_ext, in place": ["same bits", "same bits"],
    "F.cross_entropy, logits sliced": ["same bits", "NaN"],
    "F.cross_entropy, labels shifted": ["same bits", "NaN"],
}


@pytest.mark.parametrize("name", FOUR_TOKEN_FORMS)
def test_four_token_loss_in_the_training_step(quick, name):
    cells = row(quick[0].stdout, name, table="A training step of ")
    off_by, *figures, memory, loss, gradient = cells
    assert off_by == "+0.00%"
    bytes_per_second, step, in_loss, share = map(number, figures)
    assert bytes_per_second > 0 and 0 < in_loss < step and 0 < share < 100
    assert memory == "?" or number(memory) >= 0
    assert [loss, gradient] == FOUR_TOKEN_FORMS[name]


@pytest.mark.parametrize("name", FOUR_TOKEN_FORMS)
def test_four_token_loss_with_many_classes(quick, name):
    text = quick[0].stdout
    alone = "The loss alone, not this model's: random logits of "
    assert re.search(alone + r"\d+ x \d+ tokens and \d+ classes for 4 heads", text)
    time, ratio, memory = row(text, name, table=alone)
    assert number(time) > 0 and number(ratio) > 0
    assert memory == "?" or number(memory) >= 0


HEAD_FORMS = ["without logits", "masked_loss_ext, of logits", "F.cross_entropy, of logits"]


def test_a_head_without_logits_learns_the_same(quick):
    table = "A model of words with a head of "
    rows = [row(quick[0].stdout, name, table=table) for name in HEAD_FORMS]
    for loss, step, ratio, memory in rows:
        assert number(loss) == pytest.approx(number(rows[0][0]), abs=2e-3) and number(loss) > 1
        assert number(step) > 0 and number(ratio) > 0
        assert memory == "?" or number(memory) >= 0


def test_words_and_their_numbers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from acts.language import head

    texts = [b"if a:\n    a = a", b"if b"]
    assert head.WORD.findall(texts[0]) == [b"if", b" ", b"a", b":", b"\n    ", b"a", b" ", b"=",
                                           b" ", b"a"]  # fmt: skip
    index = head.vocabulary(texts, 5)  # END, unknown, and the three most frequent
    assert index == {b" ": 2, b"a": 3, b"if": 4}
    assert head.in_words([b"if b:"], index) == [[4, 2, 1, 1]]


def test_writes_a_sample(quick):
    sample = quick[0].stdout.split("the mask writes")[1]
    assert "    def read(self" in sample and "    def _parse" in sample


KEEP_K = ["1", "2", "4", "8", "16", "32", "64"]


@pytest.mark.parametrize("keep_k", KEEP_K)
def test_error_of_registers_is_plausible(quick, keep_k):
    numbers, before, error, psnr, pairs, blocks = row(
        quick[0].stdout, keep_k, table="keep_k  numbers"
    )
    assert number(numbers) == 16 * int(keep_k)
    assert 0 < number(before) < 2 and 0 < number(error) < 2
    assert number(psnr) == pytest.approx(10 * math.log10(4 / number(error)), abs=0.02)
    assert 0 < number(pairs) < 100
    computed, every = map(int, blocks.split(" of "))
    assert 0 < computed < every


def test_fewer_registers_are_fewer_blocks_and_pairs(quick):
    rows = [row(quick[0].stdout, k, table="keep_k  numbers") for k in KEEP_K]
    blocks = [int(cells[-1].split(" of ")[0]) for cells in rows]
    assert blocks == sorted(blocks) and blocks[0] < blocks[-1]
    pairs = [number(cells[-2]) for cells in rows]
    assert pairs == sorted(pairs) and pairs[0] < pairs[-1]


def test_says_how_often_the_error_falls(quick):
    text = quick[0].stdout
    said = re.search(r"The error falls at (\d) of 6 doublings of keep_k\.", text)
    errors = [number(row(text, k, table="keep_k  numbers")[2]) for k in KEEP_K]
    pairs = list(zip(errors, errors[1:], strict=False))
    # Rounded to four digits, some that fall look level.
    least, most = sum(b < a for a, b in pairs), sum(b <= a for a, b in pairs)
    assert least <= int(said.group(1)) <= most


def test_registers_say_more_than_grey_and_more_of_them_say_more(quick):
    text = quick[0].stdout
    errors = [number(row(text, k, table="keep_k  numbers")[2]) for k in KEEP_K]
    grey = float(re.search(r"A grey image has (\d\.\d+),", text).group(1))
    assert errors[0] < 0.6 * grey
    assert errors[-1] < 0.6 * errors[0]


def test_registers_have_places_that_attention_tells_apart(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from acts.tokenizer import places

    assert places.radical_inverse(6, 2) == 0.375  # 110 -> 0.011
    assert places.radical_inverse(5, 3) == pytest.approx(7 / 9)  # 12 -> 0.21
    points = torch.cartesian_prod(*[torch.tensor([0.1, 0.5, 0.9])] * 2)
    waves = places.patterns(points)
    assert (waves @ waves.T).argmax(1).tolist() == list(range(9))  # each is nearest itself
    first, *_, last = places.register_patterns(64)
    assert first[1:].norm() < 0.5 * last[1:].norm()  # the first is spread, hardly a place


def test_dropped_registers_are_never_read(quick):
    said = "With NaN in every dropped register the decoder's loss has the same bits."
    assert said in quick[0].stdout


def test_masked_and_removed_registers_give_one_loss(quick):
    names = ["all registers kept", "the rest masked", "the rest taken out"]
    kept, masked, removed = (row(quick[0].stdout, name) for name in names)
    for step, *_ in (kept, masked, removed):
        assert number(step) > 0
    assert number(masked[3]) == pytest.approx(number(removed[3]), abs=2e-5)
    assert int(removed[1]) < int(masked[1]) == int(kept[1])
    assert int(masked[2].split(" of ")[0]) < int(kept[2].split(" of ")[0])


def test_kept_registers_do_not_depend_on_how_many_follow(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from acts.tokenizer import data, model

    torch.manual_seed(0)
    crops = [torch.rand(3, 8 * rows, 8 * columns) for rows, columns in ((2, 3), (4, 2))]
    batch = data.collate(crops)
    for image, crop in zip(batch.images(batch.patches), crops, strict=True):
        torch.testing.assert_close(image, crop)
    tokenizer = model.Tokenizer(torch.ones(batch.patches.shape[1]), depth=1)
    few, every = (tokenizer.encode(batch, batch.layout(k)) for k in (5, None))
    for some, whole in zip(few, every, strict=True):
        torch.testing.assert_close(some[:5], whole[:5])
        assert (some[5:] == 0).all() and (whole[5:] != 0).any()


PICTURES = {
    "denoise": ["losses", "reconstructions"],
    "language": ["bits", "costs", "heads", "losses"],
    "tokenizer": ["reconstructions"],
}


@pytest.mark.parametrize(
    "name", [f"{act}_{x}.png" for act, names in PICTURES.items() for x in names]
)
def test_pictures_show_something(quick, name):
    with Image.open(quick[1] / name) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 10  # an empty canvas has 0
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize(
    "act, names", [("denoise", ["noisy", "before training", "after training"])]
)
def test_same_figures_again_from_another_folder(quick, act, names, tmp_path):
    again = demo("--quick", "--acts", act, "--device", "cpu", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    made = {path.name for path in (tmp_path / "demo_output").iterdir()}
    assert made == {f"{act}_{name}.png" for name in PICTURES[act]}  # this act alone
    for name in names:
        assert row(again.stdout, name) == row(quick[0].stdout, name)


def test_texts_are_whole_functions_padded_on_the_right(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from acts.language import data

    file = tmp_path / "module.py"
    file.write_text(
        "class A:\n    @property\n    def b(self):\n        def inner(): pass\n        return 1\n"
        "\nasync def c():\n    pass\n"
    )
    method = b"@property\ndef b(self):\n    def inner(): pass\n    return 1"
    assert sorted(data.functions_of(file)) == sorted([method, b"async def c():\n    pass"])

    batch = data.collate([b"abc", b"abcdefgh"], longest=6)
    assert batch.tokens.tolist() == [[97, 98, 99, data.END, 0, 0], [97, 98, 99, 100, 101, 102]]
    assert batch.attention_mask.sum(1).tolist() == [4, 6]  # the first with its end mark
    assert batch.padding() == pytest.approx(2 / 12)

    train, held_out = data.split_files(data.source_files())
    assert len(held_out) >= 2 and not set(train) & set(held_out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--acts", "paint"], r"invalid choice: 'paint' \(choose from '?denoise"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--device", "abacus"], "--device: 'abacus' is not a device"),
        (["--device", "meta"], "--device: must be cpu or cuda, got 'meta'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import demo as program

    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments, "--output", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (tmp_path / "none").exists()
