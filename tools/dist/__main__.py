# SPDX-License-Identifier: BSD-3-Clause
"""``make dist``: dist/ with a source archive and one wheel for every Python and PyTorch; both checked,
and the wheel installed into clean environments and tried.

CUDA kernels are in it where nvcc is found, whatever this PyTorch is, for TORCH_CUDA_ARCH_LIST or the
architectures that most users have; MASKED_LOSS_EXT_CUDA=0 leaves them out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from masked_loss_ext.environment._facts import OLDEST_DRIVER

from ..kernels import ROOT, sources, toolchain
from ..matrix import PYTHONS, find_python, pinned_torch
from ..trees import clean_environment
from .content import WHEEL, problems_of_archive, problems_of_wheel

DIST = ROOT / "dist"
FOLDER = ROOT / "build" / "dist"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
# Without a compiler: what is used is the wheel and nothing else.
QUESTION = """
import torch, masked_loss_ext as mle
error = torch.tensor([[3.0, float("nan")]])
loss = mle.masked_mse(error, torch.zeros(1, 2), torch.tensor([[True, False]]))
assert mle._loading.loaded.kind == "aot" and loss == 9, (mle._library_kind, loss)
print(mle.__file__)
"""


def say(text: str) -> None:
    print(f"dist: {text}", flush=True)


def run(*command: str | Path, **settings: str) -> str:
    """What it said; its whole output and the end of everything where it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=clean_environment(**settings),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"dist: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


# --- making them ---------------------------------------------------------------------------------


def cuda_settings() -> dict[str, str]:
    asked = os.environ.get("MASKED_LOSS_EXT_CUDA", "auto") or "auto"
    if asked == "auto":
        asked = "1" if toolchain.cuda_home(toolchain.torch_about()[0]) else "0"
    if asked == "0":
        say("without CUDA kernels" + ("" if os.environ.get("MASKED_LOSS_EXT_CUDA") else ": no nvcc"))
        return {"MASKED_LOSS_EXT_CUDA": "0"}
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or toolchain.DEFAULT_ARCHITECTURES
    say(f"with CUDA kernels for {wanted}; MASKED_LOSS_EXT_CUDA=0 leaves them out")
    return {"MASKED_LOSS_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": wanted}


def make() -> tuple[Path, Path]:
    """(archive, wheel), the wheel with the tag that setuptools gives it: linux, of this machine."""
    shutil.rmtree(DIST, ignore_errors=True)
    for left in (*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")):
        shutil.rmtree(left)
    run(sys.executable, "setup.py", "--quiet", "sdist")
    shutil.rmtree(FOLDER / "wheel", ignore_errors=True)
    command = ["setup.py", "-q", "-q", "bdist_wheel", "--dist-dir", str(FOLDER / "wheel")]
    # Not run(): how far the compiler is should be seen; that setup.py was called should not.
    settings = {"PYTHONWARNINGS": "ignore", **cuda_settings()}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=clean_environment(**settings))
    if done.returncode:
        sys.exit("dist: no wheel was built")
    (archive,), (wheel,) = DIST.glob("*.tar.gz"), (FOLDER / "wheel").glob("*.whl")
    return archive, wheel


def tools() -> Path:
    """The environment with what checks; made once, again when its list changes."""
    folder, stamp = FOLDER / "tools", FOLDER / "tools" / "done"
    wanted = REQUIREMENTS.read_text()
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", folder)
        run(folder / "bin" / "python", "-m", "pip", "install", "-qq", "-r", REQUIREMENTS)
        stamp.write_text(wanted)
    return folder / "bin"


def with_honest_tag(wheel: Path, programs: Path) -> Path:
    """For the oldest glibc and libstdc++ whose symbols the library asks for; nothing is grafted:
    libtorch_cpu.so comes with PyTorch, which the user has."""
    said = run(
        *(programs / "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "--only-plat"),
        *("--wheel-dir", DIST, wheel),
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
    )
    found = list(DIST.glob("*.whl"))
    if len(found) != 1:
        sys.exit(f"dist: auditwheel has made no wheel:\n{said}")
    return found[0]


# --- trying them ---------------------------------------------------------------------------------


def environment(name: str, interpreter: str | Path) -> Path:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    run(interpreter, "-m", "venv", folder)
    return folder / "bin" / "python"


def install(python: Path, wheel: Path) -> None:
    run(python, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", wheel)


def try_with_torch(wheel: Path) -> dict[str, object]:
    """In a clean environment that sees the packages of this one but not this package."""
    python = environment("with-torch", sys.executable)
    install(python, wheel)
    places = {sysconfig.get_path("purelib"), str(toolchain.torch_about()[0].parent)}
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "of_the_running_python.pth").write_text("\n".join(sorted(places)))
    where = run(python, "-P" if sys.version_info >= (3, 11) else "-I", "-c", QUESTION, PATH="")
    if str(FOLDER) not in where:
        sys.exit(f"dist: not the wheel was imported, but {where}")
    facts = json.loads(run(python, "-I", "-m", "masked_loss_ext", "--json"))
    say(f"tried with Python {facts['python']} and PyTorch {facts['torch']['version']}: works")
    return facts


def try_without_torch(wheel: Path) -> None:
    """Every Python that is here takes the wheel, and its report says what is missing."""
    took = []
    for version in PYTHONS:
        interpreter = find_python(version)
        if interpreter is None:
            continue
        python = environment(f"python-{version}", interpreter)
        install(python, wheel)
        done = subprocess.run(
            [str(python), "-I", "-m", "masked_loss_ext"], capture_output=True, text=True
        )
        if done.returncode != 1 or "PyTorch is missing" not in done.stdout:
            sys.exit(f"dist: Python {version}: {done.stdout}{done.stderr}")
        took.append(version)
    say(f"installed with Python {', '.join(took)}; make matrix runs the tests under each")


def summary(archive: Path, wheel: Path, facts: dict[str, object]) -> None:
    library = facts["library"]
    built = library["built"]
    glibc = re.search(r"manylinux_(\d+)_(\d+)", wheel.name)
    for path in (archive, wheel):
        say(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.1f} MB")
    say(
        f"wheel: Python 3.10 or newer, PyTorch 2.10 or newer (built with {pinned_torch()}), "
        f"{WHEEL.fullmatch(wheel.name)['platform'].partition('.')[0]}"
        + (f" (glibc {glibc[1]}.{glibc[2]} or newer)" if glibc else "")
    )
    if built["cuda"] != "none":
        oldest = OLDEST_DRIVER.get(built["toolkit"].partition(".")[0], "unknown")
        say(
            f"CUDA: {built['cuda']}, runtime {built['toolkit']} linked in, "
            f"NVIDIA driver {oldest} or newer"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    if sys.argv[1:] if arguments is None else arguments:
        sys.exit(f"usage: python -m tools.dist\n{__doc__}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    archive, built = make()
    programs = tools()
    wheel = with_honest_tag(built, programs)
    print(run(programs / "twine", "check", "--strict", archive, wheel).strip())
    problems = problems_of_archive(archive) + problems_of_wheel(wheel)
    if problems:
        sys.exit("dist: " + "\ndist: ".join(problems))
    facts = try_with_torch(wheel)
    try_without_torch(wheel)
    summary(archive, wheel, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
