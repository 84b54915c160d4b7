# SPDX-License-Identifier: BSD-3-Clause
"""Tables and plots of the pages are made from the benchmarks' CSV files, and from nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# benchmarks/ is never installed; at the end of the path, so that an installed library wins.
sys.path.append(str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import plots, report, tables  # noqa: E402


def toy_row(contender: str, **values: object) -> dict:
    row = {"benchmark": "toy", "case": "one", "summary": "all", "shape": "2x3", "dtype": "float32"}
    setting = {"rounds": 3, "processor": "abacus", "capability": "beads", "threads": 2}
    return {**row, **setting, "torch": "2.x", "date": "today", "contender": contender, **values}


@pytest.fixture
def toy_results(tmp_path):
    rates = {"gb_per_s": 4.0, "of_copy": 0.5, "peak_over_gradient": 1.02}
    ours = toy_row("ours", role="ours", median_us=1500.0, **rates)
    slow = toy_row("slow", role="rival", median_us=4500.0, ratio_of_medians=3.0, target=2.0)
    wrong = toy_row("wrong", role="rival", status="refused: loss is off")
    report.write_csv(tmp_path / "toy_cpu.csv", [ours, slow, wrong])
    return tmp_path


def test_a_table_is_made_from_the_csv(toy_results):
    text = "before\n<!-- benchmark toy_cpu -->\nold\n<!-- /benchmark -->\nafter\n"
    made = tables.regenerate(text, toy_results)
    assert made.startswith("before\n<!-- benchmark toy_cpu -->\n| case |")
    assert made.endswith("<!-- /benchmark -->\nafter\n") and "old" not in made
    cells = ("1.50 ms", "slow 3.0x (aim 2x), wrong not timed", "4.0 (50% of a copy)", "1.02")
    assert "| `one` | [2, 3] float32, all | " + " | ".join(cells) + " |" in made
    assert tables.regenerate(made, toy_results) == made


def test_check_finds_a_table_that_differs_and_changes_nothing(toy_results):
    path = toy_results / "page.md"
    stale = "<!-- benchmark toy_cpu -->\n9.9x\n<!-- /benchmark -->\n"
    path.write_text(stale)
    assert "not what its tables are made from" in tables.update([path], toy_results, check=True)
    assert path.read_text() == stale
    assert tables.update([path], toy_results) == ""
    assert tables.update([path], toy_results, check=True) == ""


def test_other_pages_may_have_a_table(toy_results):
    first, other, none = (toy_results / f"{name}.md" for name in ("first", "other", "none"))
    for page in (first, other):
        page.write_text("<!-- benchmark toy_cpu -->\n<!-- /benchmark -->\n")
    none.write_text("words\n")
    wrong = tables.update([first, other, none], toy_results, check=True)
    assert "first.md" in wrong and "other.md" in wrong and "none.md" not in wrong
    assert tables.update([first, other, none], toy_results) == ""
    assert "1.50 ms" in other.read_text() and none.read_text() == "words\n"
    with pytest.raises(ValueError, match="no '<!-- benchmark NAME -->'"):
        tables.update([none], toy_results)


def test_a_page_without_a_place_for_the_table_is_an_error(toy_results):
    with pytest.raises(ValueError, match="no '<!-- benchmark NAME -->'"):
        tables.regenerate("no table here", toy_results)


def test_tables_and_plots_are_those_of_the_committed_figures():
    command.main(["tables", "--check"])  # exits with a sentence where they differ


def test_a_page_says_where_there_are_no_figures_yet(tmp_path):
    made = tables.regenerate("<!-- benchmark toy -->\n<!-- /benchmark -->", tmp_path)
    assert "No figures yet." in made


def test_a_plot_shows_who_is_slower_and_knows_its_figures(toy_results, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots are drawn by it")
    monkeypatch.setattr(plots, "PLOTS", {"time_toy": "toy_cpu.csv"})
    rows = report.read_csv(toy_results / "toy_cpu.csv")
    assert plots.times(rows) == {"ours": [("one", 1.0)], "slow": [("one", 3.0)]}  # not "wrong"
    where = {"folder": toy_results, "results": toy_results}
    assert "time_toy.svg: not drawn from" in plots.update(check=True, **where)
    assert plots.update(**where) == "" and plots.update(check=True, **where) == ""
    drawn = (toy_results / "time_toy.svg").read_text()
    assert ">slow<" in drawn and ">one<" in drawn and ">wrong<" not in drawn
    report.write_csv(toy_results / "toy_cpu.csv", rows[:1])
    assert "time_toy.svg: not drawn from" in plots.update(check=True, **where)
