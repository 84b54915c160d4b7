# SPDX-License-Identifier: BSD-3-Clause
"""The numbers tests on an aarch64 that qemu imitates, with a PyTorch of that machine.

``make aarch64`` compiles the library with Debian's cross compiler against PyTorch's own aarch64
wheel (of the oldest release that is supported), and runs the tests with Debian's Python for arm64
under qemu-aarch64. ``--short`` runs a few of them, for CI. All of it is kept in build/aarch64, so
that the second time nothing is downloaded; nothing is installed, downloads are only unpacked there.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from tools import records
from tools.kernels import ROOT, ninja, sources, toolchain
from tools.trees import clean_environment, make_tree

sys.path.insert(0, str(ROOT / "tests" / "common"))
from numbers_tests import pytest_words  # noqa: E402

sys.path.pop(0)

FOLDER = ROOT / "build" / "aarch64"
SYSTEM, SITE = FOLDER / "system", FOLDER / "site"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
TORCH = "2.10.0"
# PyTorch and the tests need these; pip cannot resolve for another machine than its own.
PACKAGES = """einops filelock fsspec hypothesis iniconfig Jinja2 MarkupSafe mpmath networkx numpy
packaging pluggy Pygments pytest sortedcontainers sympy typing_extensions""".split()
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
HAND_WORKED = ("elementwise", "cross_entropy", "linear_cross_entropy")


class NotHere(RuntimeError):
    """Something that has to be fetched cannot be had."""


def run(*command: str | Path) -> str:
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise NotHere(f"{words[0]} failed: {' '.join(last)}")
    return done.stdout


def apt_options() -> list[str]:
    """A state of apt of its own: the machine's packages and architectures are left alone."""
    state = FOLDER / "apt"
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def make_system() -> None:
    """Debian's Python for arm64 and the libraries it needs, unpacked into a folder."""
    if SYSTEM.is_dir():
        return
    print("fetching Python for arm64", flush=True)
    options = apt_options()
    run("apt-get", *options, "update")
    wanted = ("python3", "libstdc++6", "libgomp1")
    run("apt-get", *options, "install", "-y", "--download-only", "--no-install-recommends", *wanted)
    partial = FOLDER / "system.part"
    shutil.rmtree(partial, ignore_errors=True)
    for package in sorted((FOLDER / "apt" / "archives").glob("*.deb")):
        run("dpkg", "-x", package, partial)
    partial.rename(SYSTEM)


def python_version() -> str:
    (library,) = SYSTEM.glob("usr/lib/python3.[0-9]*")
    return library.name.removeprefix("python")


def make_site() -> None:
    """PyTorch and the test packages, as wheels for that machine."""
    if SITE.is_dir():
        return
    print(f"fetching PyTorch {TORCH} for aarch64", flush=True)
    version, partial = python_version(), FOLDER / "site.part"
    shutil.rmtree(partial, ignore_errors=True)
    limits = FOLDER / "constraints.txt"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if re.split("[=;]", line)[0] in PACKAGES]
    limits.write_text(f"torch=={TORCH}\n" + "\n".join(pins) + "\n")
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary=:all:", "--python-version", version, *platforms]
    run(*pip, "--no-cache-dir", "--target", partial, "-c", limits, "torch", *PACKAGES)
    partial.rename(SITE)


def make_library() -> Path:
    """By the project's own build, which is told of another machine."""
    tools = toolchain.Toolchain(SITE / "torch", TORCH, [COMPILER], toolchain.find_ninja())
    with mock.patch.object(sources.platform, "machine", lambda: "aarch64"):
        return ninja.compile_library(tools, FOLDER / "library")


def missing_programs() -> list[str]:
    packages = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}
    packages |= {"apt-get": "apt", "dpkg": "dpkg"}
    return [package for program, package in packages.items() if shutil.which(program) is None]


def test_words(short: bool) -> list[str]:
    files = [f"tests/{room}/test_hand_worked.py" for room in HAND_WORKED]
    if short:
        return ["-q", "-p", "no:cacheprovider", *files]
    return [*pytest_words("tests"), *files]


def run_tests(tree: Path, words: Sequence[str]) -> tuple[int, str]:
    """What pytest printed is shown as it comes."""
    python = SYSTEM / "usr" / "bin" / f"python{python_version()}"
    command = [EMULATOR, "-L", SYSTEM, "-E", f"PYTHONPATH={SITE}", python, "-m", "pytest", *words]
    with subprocess.Popen(
        list(map(str, command)),
        cwd=tree,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        said = []
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    return process.returncode, "".join(said)


def write_table(said: str, seconds: float) -> None:
    counts = {what: number for number, what in re.findall(r"(\d+) (passed|failed|skipped)", said)}
    row = {"torch": TORCH, "python": python_version(), "compiler": compiler_version()}
    row |= {what: counts.get(what, 0) for what in ("passed", "failed", "skipped")}
    row |= {"seconds": round(seconds)}
    records.write("aarch64", [row])


def compiler_version() -> str:
    return "g++ " + run(COMPILER, "-dumpfullversion").strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.aarch64", description=__doc__)
    about = "a few tests, no line in the table; what cannot be had is no error"
    parser.add_argument("--short", action="store_true", help=about)
    options = parser.parse_args(arguments)
    if missing := missing_programs():
        print(f"NOT DONE: apt-get install {' '.join(missing)}")
        return 0 if options.short else 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        make_system()
        make_site()
    except NotHere as error:
        print(f"NOT DONE: {error}")
        return 0 if options.short else 1
    tree = make_tree(FOLDER / "tree", make_library())
    begin = time.monotonic()
    code, said = run_tests(tree, test_words(options.short))
    if not options.short:
        write_table(said, time.monotonic() - begin)
    return code


if __name__ == "__main__":
    sys.exit(main())
