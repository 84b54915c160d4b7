# SPDX-License-Identifier: BSD-3-Clause
"""Links of the pages lead to a file of this checkout and, on a page, to a heading that is there."""

import re

import pytest
from pages import FENCE, PAGES, ROOT

from tools.reference.overview import every_page

LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)")


def anchors(text):
    """The names that headings and labels of a page have."""
    text = FENCE.sub("", text)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r"^\((.*)\)=$", text, re.MULTILINE))


def broken(path):
    """Links of a page that lead nowhere."""
    for target, anchor in LINK.findall(FENCE.sub("", path.read_text())):
        place = path.parent / target if target else path
        if place.parent.name == "reference":  # made when the site is built
            if place.name not in every_page():
                yield target
        elif not place.exists():
            yield target
        elif anchor and place.suffix == ".md" and anchor not in anchors(place.read_text()):
            yield f"{target}#{anchor}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert not list(broken(ROOT / name))


def test_links_that_lead_nowhere_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# What: a `name`, and\n(label)=\n## more\n"
        "[1](page.md) [2](#what-a-name-and) [3](page.md#label) [8](reference/no.rst)\n"
        "[4](other.md) [5](#less) [6](https://example.org/#x)\n```text\n# less\n[7](none.md)\n```\n"
    )
    assert list(broken(page)) == ["reference/no.rst", "other.md", "#less"]
