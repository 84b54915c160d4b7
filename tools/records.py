# SPDX-License-Identifier: BSD-3-Clause
"""What the verbs of trust counted: docs/trust/NAME.csv, of which docs/trust.md is made."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "trust"


def read(name: str, folder: Path = FOLDER) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(name: str, rows: Sequence[Mapping[str, object]], folder: Path = FOLDER) -> Path:
    """One line for each row; its columns are those of the first. The file appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)
    return path
