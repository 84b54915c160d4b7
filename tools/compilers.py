# SPDX-License-Identifier: BSD-3-Clause
"""The library by every gcc and clang that is here, and the numbers tests with each of them.

``make compilers`` looks for g++-N and clang++-N on PATH, compiles the whole library with each,
counts the packed products of its AVX2 and AVX-512 kernels in the object files, and runs the numbers
tests at every level that this machine can run. docs/trust/compilers.csv gets a line per compiler
and level. `python -m tools.compilers clang++-14` is one alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools import records
from tools.kernels import ROOT, ninja, sources, toolchain
from tools.trees import clean_environment, make_tree

sys.path.insert(0, str(ROOT / "tests" / "common"))
from numbers_tests import pytest_words  # noqa: E402

sys.path.pop(0)

FOLDER = ROOT / "build" / "compilers"
NAME = re.compile(r"(?:g|clang)\+\+-\d+")
# Registers of each level, and the fewest packed products of floats in a file of kernels: a loop
# over logits has some ten. Those that are not vectorised would leave none.
REGISTERS = {"avx512": "zmm", "avx2": "ymm", "default": "xmm"}
LEAST_PRODUCTS = 15
TABLE = "compilers"
VARIABLE = "MASKED_LOSS_EXT_CPU_CAPABILITY"
SECONDS = 3600


@dataclass
class Row:
    compiler: str
    version: str
    level: str
    packed_products: int | str = ""  # fused or not, of floats, in the level's own registers
    passed: int | str = ""
    failed: int | str = ""
    seconds: int | str = ""
    result: str = ""


def compilers_here() -> list[str]:
    folders = filter(os.path.isdir, os.environ.get("PATH", "").split(os.pathsep))
    names = {name for folder in folders for name in os.listdir(folder) if NAME.fullmatch(name)}
    return sorted(names, key=lambda name: (name.partition("-")[0], int(name.rpartition("-")[2])))


def version_of(compiler: str) -> str:
    said = toolchain.answer_of([compiler, "--version"]).stdout
    found = re.search(r"\d+\.\d+\.\d+", said)
    return found[0] if found else "unknown"


def packed_products(library: Path, level: str) -> dict[str, int]:
    """By file of kernels."""
    found = {}
    for source in sources.LEVEL_SOURCES:
        unit = library.parent / f"{source}.{level}.o"
        said = toolchain.answer_of(["objdump", "-d", "--no-show-raw-insn", str(unit)]).stdout
        product = rf"\sv?(?:mul|fn?m(?:add|sub)\d*)ps\s.*%{REGISTERS[level]}"
        found[source] = len(re.findall(product, said))
    return found


def tests_at(tree: Path, level: str, log: Path) -> str:
    """The last line of pytest."""
    command = [sys.executable, "-m", "pytest", *pytest_words("tests")]
    environment = clean_environment(**{VARIABLE: level, "PYTHONPATH": str(tree)})
    with log.open("w") as file:
        try:
            subprocess.run(
                command, cwd=tree, env=environment, stdout=file, stderr=file, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"out of time after {SECONDS} s"
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "nothing was printed"


def level_here(tree: Path, level: str) -> str:
    question = "import masked_loss_ext, torch; print(torch.ops.masked_loss_ext.cpu_capability())"
    environment = clean_environment(**{VARIABLE: level, "PYTHONPATH": str(tree)})
    done = subprocess.run(
        [sys.executable, "-c", question], cwd=tree, env=environment, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def tried(compiler: str) -> list[Row]:
    version, folder = version_of(compiler), FOLDER / compiler
    root, torch, _ = toolchain.torch_about()
    tools = toolchain.Toolchain(root, torch, [compiler], toolchain.find_ninja())
    try:
        library = ninja.compile_library(tools, folder / "library")
    except toolchain.BuildError as error:
        first = str(error).partition("\n")[0]
        return [Row(compiler, version, "all", result=f"not compiled: {first}")]
    tree = make_tree(folder / "tree", library)
    rows = []
    for level, registers in REGISTERS.items():
        row = Row(compiler, version, level)
        rows.append(row)
        products = packed_products(library, level)
        row.packed_products = sum(products.values())
        scalar = [name for name, count in products.items() if count < LEAST_PRODUCTS]
        found = level_here(tree, level)
        if found != level:
            row.result = f"not run: {found}"
            continue
        begin = time.monotonic()
        last = tests_at(tree, level, folder / f"{level}.log")
        row.seconds = round(time.monotonic() - begin)
        counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed)", last)}
        row.passed, row.failed = counts.get("passed", 0), counts.get("failed", 0)
        row.result = "passed" if row.passed and not row.failed else last
        if scalar:
            row.result = f"no {registers} products in {', '.join(scalar)}"
        print(f"{compiler} {version} {level}: {row.packed_products} products, {last}", flush=True)
    return rows


def add_to_table(rows: Sequence[Row]) -> None:
    """In the place of what it had of that compiler."""
    old = records.read(TABLE) if (records.FOLDER / f"{TABLE}.csv").is_file() else []
    names = {row.compiler for row in rows}
    every = [row for row in old if row["compiler"] not in names] + [asdict(row) for row in rows]
    records.write(TABLE, sorted(every, key=lambda row: (row["compiler"], row["level"])))


def main(arguments: Sequence[str] | None = None) -> int:
    here = compilers_here()
    parser = argparse.ArgumentParser(prog="python -m tools.compilers", description=__doc__)
    parser.add_argument("compilers", nargs="*", metavar="COMPILER", help=f"of {', '.join(here)}")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.compilers if name not in here]
    if unknown or not here:
        print(f"not on PATH: {', '.join(unknown) or 'any g++-N or clang++-N'}")
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = []
    for compiler in options.compilers or here:
        rows += tried(compiler)
        add_to_table(rows)
    bad = [row for row in rows if row.result != "passed" and not row.result.startswith("not run")]
    print("\n".join(f"{row.compiler} {row.level}: {row.result}" for row in bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
