# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.trust`` prints what was counted; ``--write`` puts it into docs/trust.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from . import documents, records

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "trust.md"
Rows = Sequence[dict[str, str]]


def whole(rows: Rows) -> Iterable[Sequence[str]]:
    """Every line, every column."""
    yield list(rows[0])
    yield from (list(row.values()) for row in rows)


# name of a CSV -> what of it is shown
SHOWN: dict[str, Callable[[Rows], Iterable[Sequence[str]]]] = {}


def table(name: str) -> str:
    return documents.markdown(SHOWN[name](records.read(name)))


def main(arguments: Sequence[str] | None = None) -> None:
    made = {name: partial(table, name) for name in SHOWN}
    documents.run("python -m tools.trust", DOCUMENT, made, arguments, __doc__)


if __name__ == "__main__":
    main()
