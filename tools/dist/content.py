# SPDX-License-Identifier: BSD-3-Clause
"""What a wheel and a source archive of this package have to be."""

from __future__ import annotations

import email
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tools.kernels import ROOT, sources

PACKAGE = "masked_loss_ext"
# No interpreter and no ABI of Python: the library is loaded by PyTorch and has no symbol of Python.
WHEEL = re.compile(
    rf"{PACKAGE}-{re.escape(sources.VERSION)}-py3-none-"
    r"(?P<platform>(linux|manylinux_\d+_\d+)_(x86_64|aarch64)(\.manylinux\w+)?)\.whl"
)
UNWANTED = re.compile(r"(^|/)(tests|benchmarks|tools|examples|__pycache__|test_\w+\.py)(/|$)|\.\.")
# By the kind of file: what the package is made of, and what is compiled at a first import.
KINDS = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".so", ".typed"}
LARGEST_WHEEL_MB = 60  # what PyPI takes is 100
OF_THE_ARCHIVE = ("CMakeLists.txt", "LICENSE", "Makefile", "pyproject.toml", "tests/cpp/test_ops.cpp")


def problems_of_wheel(wheel: Path) -> list[str]:
    return list(_of_wheel(wheel))


def _of_wheel(wheel: Path) -> Iterator[str]:
    named = WHEEL.fullmatch(wheel.name)
    if named is None:
        yield f"its name is {wheel.name}"
        return
    if wheel.stat().st_size > LARGEST_WHEEL_MB * 1e6:
        yield f"it has {wheel.stat().st_size / 1e6:.0f} MB"
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        about = content.read(f"{PACKAGE}-{sources.VERSION}.dist-info/WHEEL").decode()
        metadata = content.read(f"{PACKAGE}-{sources.VERSION}.dist-info/METADATA").decode()
    yield from _of_names(names)
    tags = [value for key, value in email.message_from_string(about).items() if key == "Tag"]
    if tags != [f"py3-none-{one}" for one in named["platform"].split(".")]:
        yield f"its name says {named['platform']}, its tags are {tags}"
    required = email.message_from_string(metadata).get_all("Requires-Dist", [])
    if [one for one in required if "extra ==" not in one] != ["torch>=2.10"]:
        yield f"it requires {required}"


def _of_names(names: list[str]) -> Iterator[str]:
    inside = [n for n in names if ".dist-info/" not in n and not n.endswith("/")]  # no folders
    for name in inside:
        if name.partition("/")[0] != PACKAGE or UNWANTED.search(name):
            yield f"{name} is no part of the package"
        elif Path(name).suffix not in KINDS:
            yield f"{name} is of no kind that belongs there"
    if [name for name in inside if name.endswith(".so")] != [f"{PACKAGE}/{sources.LIBRARY}"]:
        yield "it has not the one library"
    csrc = sources.csrc_dir()
    for path in sorted(csrc.rglob("*.*")):
        if f"{PACKAGE}/csrc/{path.relative_to(csrc).as_posix()}" not in names:
            yield f"{path.name} is missing, which a first import compiles"
    if not any(name.endswith("licenses/LICENSE") for name in names):
        yield "the licence is missing"


def problems_of_archive(archive: Path) -> list[str]:
    """A source archive has all that is built, tested and told from."""
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    wanted = {*OF_THE_ARCHIVE, *(f"csrc/{p.relative_to(ROOT / 'csrc')}" for p in _sources())}
    found = [f"{name} is missing" for name in sorted(wanted - names)]
    return found + [f"{name} is built" for name in sorted(names) if name.endswith((".so", ".pyc"))]


def _sources() -> list[Path]:
    return [path for path in (ROOT / "csrc").rglob("*.*") if path.is_file()]
