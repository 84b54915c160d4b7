# SPDX-License-Identifier: BSD-3-Clause
"""One library, built once, under each Python and each PyTorch that can be had.

``make matrix`` builds the wheel and, for each environment, makes a virtual environment, installs
PyTorch, the wheel and what the tests need, runs a share of the tests, writes a line into
docs/trust/matrix.csv and removes the environment again: several GB of disk, and minutes, each.
What already has its line is left out, unless ``--again`` or ``--only`` names it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools import records
from tools.kernels import ROOT
from tools.trees import clean_environment, make_tree

TABLE = "matrix"
FOLDER = ROOT / "build" / "matrix"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RELEASES = ("2.10", "2.11", "2.12")  # those before the pinned one
ONE_PYTHON = "3.12"  # the one that meets every release
NEWEST = "newest"
GIGABYTES = 12  # of disk: a CUDA build of PyTorch while pip unpacks it
INSTALL_S, TESTS_S = 2400, 5400

# What the tests need, of requirements.txt; what a test misses it says, and is skipped.
PACKAGES = ("einops", "hypothesis", "numpy", "pytest", "spmd_types")
# Values, derivatives, graphs, refusals, signatures and DTensors, in a minute or two: what a version
# of Python or PyTorch could change, not what a kernel computes.
SHARE = """
elementwise/test_hand_worked.py cross_entropy/test_hand_worked.py
linear_cross_entropy/test_hand_worked.py unified/test_on_paper.py
elementwise/test_torch_func.py elementwise/test_autograd.py::test_derivatives_of_public_losses
cross_entropy/test_autograd.py::test_derivatives_of_the_loss
cross_entropy_terms/test_autograd.py
elementwise/test_compile.py::test_one_graph_over_three_sizes
elementwise/test_compile.py::test_transforms_under_compile
elementwise/test_compile.py::test_export_with_dynamic_shapes
elementwise/test_compile.py::test_error_text_survives_compile
cross_entropy/test_compile.py::test_one_graph_through_inductor
cross_entropy/test_compile.py::test_one_graph_over_changing_numbers
cross_entropy/test_compile.py::test_export_with_dynamic_shapes
linear_cross_entropy/test_compile.py::test_one_graph_through_inductor
linear_cross_entropy/test_compile.py::test_one_graph_of_halves
cross_entropy_terms/test_compile.py attention/test_block_mask_compile.py repetition/test_compile.py
elementwise/test_errors.py cross_entropy/test_errors.py linear_cross_entropy/test_errors.py
cross_entropy_terms/test_errors.py attention/test_block_mask_errors.py unified/test_errors.py
contracts/test_signatures.py contracts/test_saved_tensor_hooks.py build/test_registration.py
distributed/test_dtensor_compile.py::test_cross_entropy
distributed/test_dtensor_compile.py::test_squared_error
distributed/test_dtensor_cross_entropy.py::test_two_ranks
distributed/test_dtensor_linear.py::test_two_ranks distributed/test_dtensor_refusals.py
distributed/test_dtensor_squared_error.py::test_two_ranks
distributed/test_vocab_parallel.py::test_compiled_is_one_graph_over_changing_sizes
""".split()
WITHOUT_SIMULATOR = "not simulator"  # which would compile the CUDA sources for each PyTorch


@dataclass(frozen=True)
class Environment:
    python: str
    torch: str  # a release, "newest", or a whole version

    @property
    def name(self) -> str:
        return f"python-{self.python}-torch-{self.torch}"

    @property
    def requirement(self) -> str:
        if self.torch == NEWEST:
            return "torch"
        return f"torch=={self.torch}" + (".*" if self.torch.count(".") == 1 else "")


@dataclass
class Row:
    """A line of the table; numbers are empty where it came to none."""

    environment: str
    python: str
    torch: str
    cuda: str = ""  # that PyTorch is built for; no GPU is used
    passed: int | str = ""
    failed: int | str = ""
    skipped: int | str = ""
    seconds: int | str = ""
    result: str = ""  # "passed", or why not


def pinned_torch() -> str:
    found = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    if found is None:
        raise ValueError("requirements.txt pins no torch")
    return found[1]


def environments() -> list[Environment]:
    """Each Python with the pinned PyTorch and the newest, and one of them with each before."""
    found = [Environment(ONE_PYTHON, release) for release in RELEASES]
    for release in (NEWEST, pinned_torch()):
        found += [Environment(python, release) for python in PYTHONS]
    return found


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def find_python(version: str) -> str | None:
    """On PATH, else among pyenv's; a shim of pyenv may stand on PATH and start nothing."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    places = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")]
    question = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for place in filter(None, places):
        done = subprocess.run([place, "-c", question], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return str(place)
    return None


def requirements_file(folder: Path) -> Path:
    """The pins of requirements.txt but PyTorch's own, and what it chooses."""
    unwanted = re.compile("(torch|setuptools|typing_extensions)==")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    file = folder / "constraints.txt"
    file.write_text("\n".join(line for line in lines if not unwanted.match(line)) + "\n")
    return file


def run(command: Sequence[str | Path], log: Path, seconds: float, cwd: Path = FOLDER) -> str:
    """What it printed, or "" and a reason at the log's end where it has not ended in time."""
    with log.open("a") as file:
        print("$", *command, file=file, flush=True)
        start = file.tell()
        try:
            subprocess.run(
                list(map(str, command)),
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=clean_environment(),
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            file.seek(0, os.SEEK_END)
            print(f"\nout of time after {seconds:.0f} s", file=file)
    with log.open(errors="replace") as file:
        file.seek(start)
        return file.read()


def about(python: Path, log: Path) -> tuple[str, str] | None:
    question = "import torch; print('torch', torch.__version__, torch.version.cuda or 'none')"
    found = re.search(r"^torch (\S+) (\S+)$", run([python, "-c", question], log, 300), re.M)
    return (found[1].partition("+")[0], found[2]) if found else None


def install(interpreter: str, one: Environment, wheel: Path, log: Path) -> Path:
    folder = FOLDER / one.name
    shutil.rmtree(folder, ignore_errors=True)
    run([interpreter, "-m", "venv", folder], log, 300)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--no-cache-dir", "--disable-pip-version-check"]
    limits = ["-c", requirements_file(FOLDER)]
    run([*pip, *limits, one.requirement, *PACKAGES], log, INSTALL_S)
    run([*pip, "--no-deps", "--no-index", wheel], log, 300)
    return python


def last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if re.match("ERROR|.*Error:|out of time", line)]
    return (errors or lines)[-1]


def failures(said: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (.*)$", said, re.M)


def tried(one: Environment, interpreter: str, wheel: Path, log: Path) -> Row:
    row = Row(one.name, one.python, one.torch)
    python = install(interpreter, one, wheel, log)
    versions = about(python, log)
    if versions is None:
        row.result = f"not installed: {last_error(log)}"
        return row
    row.torch, row.cuda = versions
    begin = time.monotonic()
    tests = make_tree(FOLDER / "tree", None)
    options = ["-q", "-p", "no:cacheprovider", "-k", WITHOUT_SIMULATOR, "-W", "ignore"]
    options.append("--continue-on-collection-errors")
    files = [f"tests/{name}" for name in SHARE]
    said = run([python, "-m", "pytest", *options, *files], log, TESTS_S, cwd=tests)
    row.seconds = round(time.monotonic() - begin)
    last = said.strip().splitlines()[-1] if said.strip() else "nothing was printed"
    count = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    row.passed, row.skipped = count.get("passed", 0), count.get("skipped", 0)
    row.failed = count.get("failed", 0) + count.get("error", 0)
    bad = failures(said)
    row.result = "; ".join(bad) if bad else "passed" if row.passed and not row.failed else last
    return row


def read_table() -> dict[str, Mapping[str, object]]:
    if not (records.FOLDER / f"{TABLE}.csv").is_file():
        return {}
    return {line["environment"]: line for line in records.read(TABLE)}


def write_table(rows: Mapping[str, Mapping[str, object]]) -> None:
    records.write(TABLE, [rows[one.name] for one in environments() if one.name in rows])


def built_wheel() -> Path:
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit("there is no wheel in dist: make dist")
    return wheels[-1]


def try_all(wanted: Iterable[Environment], wheel: Path) -> bool:
    """Did all pass that could be tried?"""
    rows = read_table()
    good = True
    for one in wanted:
        row = Row(one.name, one.python, one.torch)
        interpreter = find_python(one.python)
        free = shutil.disk_usage(FOLDER).free / 1e9
        if interpreter is None:
            row.result = f"not tried: no Python {one.python} here"
        elif free < GIGABYTES:
            row.result = f"not tried: {free:.0f} GB of disk are free, {GIGABYTES} are needed"
        else:
            say(f"{one.name}: installing")
            log = FOLDER / f"{one.name}.log"
            log.unlink(missing_ok=True)
            try:
                row = tried(one, interpreter, wheel, log)
            finally:
                shutil.rmtree(FOLDER / one.name, ignore_errors=True)
        say(
            f"{one.name}: torch {row.torch}, {row.passed} passed, {row.failed} failed: {row.result}"
        )
        good &= row.result == "passed" or row.result.startswith("not ")
        rows[one.name] = asdict(row)
        write_table(rows)
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    every = environments()
    parser = argparse.ArgumentParser(prog="python -m tools.matrix", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the environments, do nothing")
    parser.add_argument("--again", action="store_true", help="also those that have their line")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[one.name for one in every])
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(one.name for one in every))
        return 0
    known = set() if options.again else set(read_table())
    if options.only:
        wanted = [one for one in every if one.name in options.only]
    else:
        wanted = [one for one in every if one.name not in known]
    FOLDER.mkdir(parents=True, exist_ok=True)
    wheel = built_wheel()
    say(f"{len(wanted)} environments, with {wheel.name}")
    return 0 if try_all(wanted, wheel) else 1


if __name__ == "__main__":
    sys.exit(main())
