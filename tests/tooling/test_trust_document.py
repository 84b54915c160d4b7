# SPDX-License-Identifier: BSD-3-Clause
"""docs/trust.md shows what was counted, and every file of counts is shown."""

import pytest

from tools import documents, records, trust


def test_the_document_shows_what_was_counted():
    trust.main(["--check"])  # exits with a sentence where it does not
    assert sorted(documents.names(trust.DOCUMENT.read_text(), "table")) == sorted(trust.SHOWN)


def test_every_file_of_counts_has_a_table():
    assert {path.stem for path in records.FOLDER.glob("*.csv")} <= set(trust.SHOWN)


def test_what_was_not_counted_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    assert trust.table("fuzz") == "Not counted yet.\n"


def test_records_are_read_as_they_were_written(tmp_path):
    rows = [{"what": "a, b", "count": 1}, {"what": "c", "count": 2}]
    path = records.write("some", rows, tmp_path)
    assert path.read_text() == 'what,count\n"a, b",1\nc,2\n'
    assert records.read("some", tmp_path) == [
        {"what": "a, b", "count": "1"},
        {"what": "c", "count": "2"},
    ]
    assert [path] == list(tmp_path.iterdir())


def test_lines_of_a_group_are_added_up():
    rows = [
        {"function": "f", "ways": "2", "said": "x"},
        {"function": "X()", "ways": "3", "said": "y"},
        {"function": "g", "ways": "5", "said": "z"},
    ]
    assert list(trust.invalid(rows)) == [
        ["arguments of", "ways"],
        ["functions, and calls of modules", "7"],
        ["constructors", "3"],
    ]


@pytest.mark.parametrize("ours, expected", [("3.0e-07", "3.0e-07"), ("0.0e+00", "0")])
def test_what_is_ours_stands_beside_what_is_of_aten(ours, expected):
    names = ("calls of", "condition", "calls", "runs", "calls that differ", "largest difference")
    lines = [
        ("functions", "fork", "4", "8", "1", ours),
        (trust.PRODUCTS, "fork", "2", "4", "0", "0"),
    ]
    _, line = trust.determinism([dict(zip(names, one, strict=True)) for one in lines])
    assert list(line) == ["fork", "4", "8", "1", expected, "2", "0", "0"]


def test_mutants_are_counted_by_part():
    rows = [{"part": p, "outcome": o} for p, o in (("A", "caught"), ("A", ""), ("B", "caught"))]
    assert list(trust.mutation(rows)) == [
        ["part", "wrong lines", "caught", "not run"],
        ["A", "2", "1", "1"],
        ["B", "1", "1", "0"],
        ["all", "3", "2", "1"],
    ]
