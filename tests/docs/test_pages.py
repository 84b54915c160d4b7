# SPDX-License-Identifier: BSD-3-Clause
"""Every block of Python in docs/ is executed, and prints what the page says that it prints."""

from pathlib import Path

import pytest

from tools import pages

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if pages.blocks(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_and_prints_what_it_says(page):
    printed, missing = pages.execute(page)
    if missing:
        pytest.skip(f"all ran but what needs {missing}, which is not installed")
    wrong = pages.differences(page, printed)
    assert not wrong, "\n".join(wrong)


def page_of(folder, code, shown):
    page = folder / "page.md"
    page.write_text(f"words\n\n```python\n{code}```\n\n```text\n{shown}```\n\nmore\n")
    return page


def test_another_output_is_seen_and_mended(tmp_path):
    page = page_of(tmp_path, "x = 2\nprint(x + 1)\n", "4\n")
    printed, _ = pages.execute(page)
    (wrong,) = pages.differences(page, printed)
    assert wrong.startswith(f"{page}:3: prints\n3")
    assert pages.main([str(page), "--write"]) == 0
    assert page.read_text().count("```") == 4 and "```text\n3\n```\n\nmore" in page.read_text()


def test_an_error_names_the_line_of_the_page(tmp_path):
    page = page_of(tmp_path, "x = 2\nraise KeyError(x)\n", "")
    with pytest.raises(KeyError) as raised:
        pages.execute(page)
    assert raised.traceback[-1].lineno == 4  # from 0
