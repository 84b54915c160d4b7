# SPDX-License-Identifier: BSD-3-Clause
"""docs/scale.md shows what tools/scale computes, and that is what a hand computes."""

import math

import pytest

from tools import documents
from tools.scale import __main__ as command
from tools.scale import machines, messages, tables
from tools.scale.machines import NVLINK, Group, Link
from tools.scale.messages import Message

SLOW = Link(latency_us=10.0, gb_per_s=1)
FAST = Link(latency_us=1.0, gb_per_s=4)
START = machines.START_US


def test_the_document_shows_what_is_computed():
    command.main(["--check"])  # exits with a sentence where it does not
    shown = documents.names(command.DOCUMENT.read_text(), "table")
    assert sorted(shown) == sorted(tables.TABLES)


def test_a_stale_table_is_found_and_written_anew(tmp_path, monkeypatch):
    path = tmp_path / "scale.md"
    path.write_text("before\n<!-- table ours -->\nold\n<!-- /table -->\nafter\n")
    monkeypatch.setattr(command, "DOCUMENT", path)
    with pytest.raises(SystemExit, match="scale.md is not what its tables"):
        command.main(["--check"])
    command.main(["--write"])
    command.main(["--check"])
    text = path.read_text()
    assert text.startswith("before\n<!-- table ours -->\n| what |") and "old" not in text
    with pytest.raises(ValueError, match="no '<!-- table NAME -->'"):
        documents.regenerate("no table here", "table", tables.table)


def test_all_tables_are_printed(capsys):
    command.main([])
    printed = capsys.readouterr().out
    assert all(f"{name}\n| " in printed for name in tables.TABLES)


def test_messages_by_hand():
    """8192 rows of 4 numbers of 8 bytes and 6 numbers; hidden states of 4096 halves."""
    rows = ("all_gather", 8192 * 32 + 48)
    assert messages.messages("logits", R=8, N=8192) == [rows]
    assert messages.messages("logits", R=8, N=1, s=1, e=1) == [("all_gather", 112)]
    assert messages.messages("linear", R=8, N=8192, D=4096, b=2) == [
        rows,
        ("all_reduce", 67_108_864),
    ]
    assert messages.messages("count", R=1) == []
    assert len(messages.messages("layers", R=2, N=1, D=1, L=3, b=2)) == 12


def test_times_by_hand():
    """Two machines of two: 3 steps, of which one leaves the machine; 2 cards of 1 GB/s for 2."""
    group = Group(4, 2, inside=FAST, outside=SLOW)
    gathered = machines.ring_us(Message("all_gather", 2000), group)
    assert gathered == pytest.approx(START + 2 * 1 + 10 + 3 * 2000 / 2000)
    ring = machines.ring_us(Message("all_reduce", 2000), group)
    assert ring == pytest.approx(START + 2 * 12 + 1.5 * 2000 / 2000)
    tree = machines.tree_us(Message("all_reduce", 2000), group)
    assert tree == pytest.approx(START + 2 * (1 + 10) + 2 * 2000 / 2000)
    sent = machines.ring_us(Message("send", 2000), group)
    assert sent == pytest.approx(START + 10 + 2000 / 1000)  # by the sender's own card
    scattered = machines.ring_us(Message("reduce_scatter", 2000), group)
    assert scattered == pytest.approx(START + 12 + 0.75)
    both = [Message("all_gather", 2000), Message("all_reduce", 2000)]
    assert machines.time_us(both, group) == pytest.approx(gathered + min(ring, tree))


def test_eight_bytes_within_a_machine():
    count = Message("all_reduce", 8)
    assert machines.time_us([count], Group(8, 8)) == pytest.approx(START + 14 * 0.6, rel=1e-3)
    assert machines.whole(1_000).nodes == 125 and machines.whole(2) == Group(2, 2, NVLINK)


def test_rows_until_three_all_reduces_end_earlier():
    """By NVLink at 8 ranks: 35 µs less to begin with, 200 bytes a row more."""
    group = Group(8, 8)
    three, ours = (START + 14 * 0.6) * 3, START + 7 * 0.6
    more = (32 * 7 - 3 * 4 * 2) / 450e3  # by trees: two times 4 bytes a row
    rows = tables.rows_until_slower(group)
    assert math.isclose(rows, (three - ours) / more, rel_tol=0.02)
    here = [tables.example_us(way, group, N=rows + 10) for way in ("logits", "reduces")]
    assert here[0] > here[1]


@pytest.mark.parametrize(
    "us, text",
    [(7.96, "8.0 µs"), (9.96, "10 µs"), (999.4, "999 µs"), (1800, "1.8 ms"), (0, "0.0 µs")],
)
def test_times_are_shown_in_their_unit(us, text):
    assert tables.time_text(us) == text
    assert tables.size_text(2_100_000) == "2.1 MB"
