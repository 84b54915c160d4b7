# SPDX-License-Identifier: BSD-3-Clause
"""The pictures of the pages are what is drawn today, and can be read as what they are."""

import xml.etree.ElementTree as ElementTree

import pytest

from tools import pictures


def test_pictures_are_what_is_drawn():
    pictures.main(["--check"])


def test_another_picture_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="nested_dropout.svg is not what is drawn"):
        pictures.main(["--check"])
    pictures.main([])
    pictures.main(["--check"])


@pytest.mark.parametrize("path", sorted(pictures.FOLDER.glob("*.svg")), ids=lambda p: p.name)
def test_a_picture_is_small_and_whole(path):
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert path.stat().st_size < 100_000
