# SPDX-License-Identifier: BSD-3-Clause
"""What ``python -m tools.gpu`` does, step by step: command lines, and the seconds each step has.

The Python that runs it is used for everything, with nothing installed: what is missing is left
out, and said.
"""

from __future__ import annotations

import ast
import functools
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
QUESTIONS = ["tests/cuda/test_questions.py"]
CALLS = ["tests/cuda/test_calls.py"]
LARGE = ["tests/cuda/test_large.py"]
SANITIZERS = ("memcheck", "racecheck", "synccheck")
FIGURES = "figures.csv"
MOST_TEST_PROCESSES = 14
RIVALS = {
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "cut_cross_entropy": "cut-cross-entropy",
    "triton": "triton",
}


@dataclass(frozen=True)
class Command:
    line: Sequence[str]
    environment: Mapping[str, str] | None = None
    missing: str = ""  # what it needs and this machine has not: it is not run


@dataclass(frozen=True)
class Step:
    """``seconds`` are the step's own; what earlier steps leave over is added to them."""

    name: str
    about: str
    seconds: int
    commands: Sequence[Command]
    notes: Sequence[str] = ()


def is_installed(module: str) -> bool:
    return find_spec(module) is not None


@functools.cache
def imported_modules(source: str) -> set[str]:
    """Top-level names of what a file imports when it is itself imported."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def test_files(tests: Path) -> list[Path]:
    return sorted(tests.rglob("test_*.py"))


def left_out(tests: Path, has: Callable[[str], bool] = is_installed) -> dict[str, list[str]]:
    """Test files that cannot be imported here, each with the modules that are missing."""
    beside = {path.stem for path in (*tests.iterdir(), *tests.glob("common/*.py"))}
    beside |= {tests.name, tests.parent.name}
    ours = {path.stem for path in tests.parent.iterdir()}  # the package, benchmarks, examples
    found = {}
    for path in test_files(tests):
        names = imported_modules(path.read_text()) - beside - ours
        if missing := sorted(name for name in names if not has(name)):
            found[str(path.relative_to(tests))] = missing
    return found


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def pytest_command(words: Sequence[str], has: Callable[[str], bool], prefix=()) -> Command:
    line = [*prefix, *python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfEs"), *words]
    missing = "" if has("pytest") else "pytest"
    return Command(line, {"REQUIRE_CUDA": "1"}, missing)


def build_step() -> Step:
    loaded = "import masked_loss_ext as m; print('library:', m._library_kind, m.__version__)"
    commands = [
        Command(python("-m", "tools.gpu.about")),
        # Where setuptools is too old for the first, the second compiles at its import.
        Command(python("setup.py", "--quiet", "build_ext", "--inplace")),
        Command(python("-c", loaded)),
    ]
    return Step("build", "compile the library in place for the GPUs that are here", 130, commands)


def questions_step(has: Callable[[str], bool]) -> Step:
    about = "streams, graph capture, second device, a launch that fails"
    ask = pytest_command(["-vvv", *QUESTIONS], has)
    wide = {**ask.environment, "COLUMNS": "250"}  # or reasons are cut short
    return Step("questions", about, 40, [Command(ask.line, wide, ask.missing)])


def on_gpu(tests: Path) -> list[str]:
    """Test files that run on a GPU, where there is one."""
    paths = test_files(tests)
    return [
        str(p.relative_to(tests)) for p in paths if "gpu_device" in imported_modules(p.read_text())
    ]


def tests_step(has: Callable[[str], bool], processors: int) -> Step:
    """What needs a GPU, and what runs on one too, there alone: the rest is for `make test`."""
    gpu = on_gpu(TESTS)
    absent = {name: them for name, them in left_out(TESTS, has).items() if name in gpu}
    notes = [f"{name} is left out: {', '.join(them)} missing" for name, them in absent.items()]
    files = [f"tests/{name}" for name in gpu if name not in absent]
    files = [name for name in files if name not in (*QUESTIONS, *LARGE)]
    parallel = []
    if has("xdist"):
        # Case by case, not by file: one file has half of the cases, and the GPU has no fixture.
        parallel = ["-n", str(min(MOST_TEST_PROCESSES, max(1, processors - 2))), "--dist", "load"]
    else:
        notes.append("pytest-xdist is missing: one process runs the tests, perhaps not all in time")
    many = pytest_command([*parallel, *files], has)
    alone = Command(many.line, {"REQUIRE_CUDA": "only"}, many.missing)
    return Step("tests", "what runs on a GPU", 130, [pytest_command(LARGE, has), alone], notes)


def sanitizer_step(has: Callable[[str], bool], which: Callable[[str], str | None]) -> Step:
    program = which("compute-sanitizer")
    commands = []
    for tool in SANITIZERS:
        prefix = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        one = pytest_command([*CALLS, "-k", "small"], has, prefix)
        # Each tensor its own allocation: else an access beyond it lies in the caching allocator's.
        alone = {**one.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        missing = one.missing or ("" if program else "compute-sanitizer")
        commands.append(Command(one.line, alone, missing))
    return Step("sanitizer", f"{', '.join(SANITIZERS)} of every operator", 75, commands)


def benchmarks_step(results: Path, has: Callable[[str], bool]) -> Step:
    notes = [
        f"rival left out: {name} missing" for module, name in RIVALS.items() if not has(module)
    ]
    line = python("-m", "benchmarks", "gpu", "--csv", str(results / FIGURES))
    return Step("benchmarks", "each figure beside its target", 90, [Command(line)], notes)


def all_steps(
    results: Path,
    processors: int,
    has: Callable[[str], bool] = is_installed,
    which: Callable[[str], str | None] = shutil.which,
) -> list[Step]:
    return [
        build_step(),
        questions_step(has),
        tests_step(has, processors),
        sanitizer_step(has, which),
        benchmarks_step(results, has),
    ]
