# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.scale`` prints the tables; ``--write`` puts them into docs/scale.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .. import documents
from . import tables

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scale.md"


def main(arguments: Sequence[str] | None = None) -> None:
    made = {name: partial(tables.table, name) for name in tables.TABLES}
    documents.run("python -m tools.scale", DOCUMENT, made, arguments, tables.__doc__)


if __name__ == "__main__":
    main()
