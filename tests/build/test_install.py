# SPDX-License-Identifier: BSD-3-Clause
"""Every way to install and load the package, each in its own environment.

The environments see the packages of the running Python, so nothing is downloaded but setuptools,
which pip's isolated builds ask for. The library is compiled twice in all: ahead of time and at
first import.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from quick_compiler import quick_compiler

from masked_loss_ext.build import toolchain
from tools.dist import content

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
IMPORT = """
import torch, masked_loss_ext as mle
error = torch.tensor([[3.0, float("nan")]])
loss = mle.masked_mse(error, torch.zeros(1, 2), torch.tensor([[True, False]]))
print(mle._library_kind, loss.item(), mle.__file__)
"""
SETTINGS = ("MASKED_LOSS_EXT_", "TORCH_EXTENSIONS_DIR", "TORCH_CUDA_ARCH_LIST", "PYTHON", "CXX")


def start(command, *, cwd="/", **settings):
    """Start a command far from this checkout and without the settings of this environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
    return subprocess.Popen(
        [str(word) for word in command],
        # CUDA kernels take long to compile and are no part of what is asked here.
        env={**clean, "MASKED_LOSS_EXT_CUDA": "0", **settings},
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(command, *, fails=False, **keywords):
    """Run a command to its end; what it printed, on both streams."""
    process = start(command, **keywords)
    said = process.communicate()[0]
    assert (process.returncode != 0) == fails, said
    return said


def pip(python, *arguments, **keywords):
    return run([python, "-m", "pip", "--disable-pip-version-check", *arguments], **keywords)


def environment(folder):
    """A new environment that sees torch and the rest of the running one, but not its .pth files
    and so not the package that may be installed there in editable form."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    places.add(str(toolchain.torch_about()[0].parent))
    Path(site, "packages_of_the_running_python.pth").write_text("\n".join(sorted(places)))
    return python


@pytest.fixture(scope="module", autouse=True)
def path(tmp_path_factory):
    """PATH for all that is compiled here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", quick_compiler(tmp_path_factory.mktemp("bin")))
        yield os.environ["PATH"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The source archive of this checkout, unpacked: what is not in it cannot be built from it."""
    folder = tmp_path_factory.mktemp("sdist")
    checkout = folder / "checkout"
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", ".*", "dist", "*.egg-info")

    def leave_out(folder, names):
        return unwanted(folder, names) | ({"build"} if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, checkout, ignore=leave_out)
    run([sys.executable, "setup.py", "-q", "sdist", "-d", folder], cwd=checkout)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def aot_wheel(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    pip(sys.executable, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, tree)
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def jit(tree, path, tmp_path_factory):
    """The package that compiles itself, imported for the first time by two processes at once."""
    folder = tmp_path_factory.mktemp("jit")
    python = environment(folder / "env")
    install = ("install", "--no-build-isolation", "--no-deps", "--no-index", tree)
    pip(python, *install, MASKED_LOSS_EXT_BUILD="jit")
    # ninja is found beside the packages, as in an environment that was not activated.
    path = os.pathsep.join((path.split(os.pathsep)[0], os.defpath))
    settings = {"TORCH_EXTENSIONS_DIR": str(folder / "cache"), "PATH": path}
    pair = [start([python, "-c", IMPORT], **settings) for _ in range(2)]
    said = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    return SimpleNamespace(python=python, cache=folder / "cache", first_imports=said)


def test_source_archive_is_complete(tree):
    (archive,) = tree.parent.glob("*.tar.gz")
    assert not content.problems_of_archive(archive)
    for name in ("CMakeLists.txt", "Makefile", "requirements.txt", "LICENSE", "tests/cpp"):
        assert (tree / name).exists(), name
    for path in (ROOT / "csrc").rglob("*.*"):
        assert (tree / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_ahead_of_time_wheel(aot_wheel):
    """py3-none of this machine, the package and its sources, nothing else; needs torch alone."""
    assert not content.problems_of_wheel(aot_wheel)


def test_ahead_of_time_wheel_loads(aot_wheel, tmp_path):
    python = environment(tmp_path / "env")
    pip(python, "install", "--no-deps", "--no-index", aot_wheel)
    # No compiler, no ninja and no cache can be reached: nothing but the wheel is used.
    said = run([python, "-c", IMPORT], PATH="", TORCH_EXTENSIONS_DIR="/nowhere")
    assert said.startswith("aot 9.0 ") and str(tmp_path / "env") in said, said


def test_library_needs_nothing_but_libtorch_cpu(aot_wheel, tmp_path):
    with zipfile.ZipFile(aot_wheel) as wheel:
        library = wheel.extract("masked_loss_ext/_C.abi3.so", tmp_path)
    needed = re.findall(r"NEEDED.*\[(.*?)\]", run(["readelf", "-d", library]))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    system |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libdl.so.2", "libpthread.so.0"}
    assert "libtorch_cpu.so" in needed
    assert set(needed) - system == {"libtorch_cpu.so"}
    undefined = run(["nm", "-D", "--undefined-only", library])
    assert not re.search(r" _?Py[A-Z_]", undefined), "tied to one Python"


def test_isolated_build_makes_a_package_that_compiles_itself(tree, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, tree]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said = done.stdout + done.stderr
    if re.search(r"No matching distribution found for setuptools|Failed to establish", said):
        pytest.skip("no package index can be reached, and an isolated build asks it for setuptools")
    assert done.returncode == 0, said
    assert "the kernels will be compiled at the first import" in said
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as wheel_content:
        names = wheel_content.namelist()
        (metadata,) = (wheel_content.read(n).decode() for n in names if n.endswith("METADATA"))
    assert not any(name.endswith(".so") for name in names)
    assert "Requires-Dist: ninja" in metadata


def test_first_import_compiles_once_for_all_processes(jit):
    said = jit.first_imports
    assert all(re.search(r"^jit 9\.0 ", text, re.M) for text in said), said
    compiling = "compiling the CPU kernels with PyTorch .*, takes about .* s, once"
    assert sum(bool(re.search(compiling, text)) for text in said) == 1, said
    assert len(list(jit.cache.glob("*/_C.abi3.so"))) == 1


def test_later_imports_are_quiet_and_need_no_compiler(jit):
    said = run([jit.python, "-c", IMPORT], PATH="", TORCH_EXTENSIONS_DIR=str(jit.cache))
    assert said.startswith("jit 9.0 ") and len(said.splitlines()) == 1, said


def test_source_tree_without_installation(jit, tree, tmp_path):
    for part in ("masked_loss_ext", "csrc"):
        target = tmp_path / "tree" / part
        shutil.copytree(tree / part, target, ignore=shutil.ignore_patterns("*.so"))
    python = environment(tmp_path / "env")
    # The same sources have the same key, so this finds what the installed package compiled.
    cache = {"TORCH_EXTENSIONS_DIR": str(jit.cache)}
    said = run([python, "-c", IMPORT], cwd=tmp_path / "tree", **cache)
    assert said.startswith("jit 9.0 ") and str(tmp_path) in said, said


def test_editable_installation_and_a_library_older_than_its_sources(aot_wheel, tree, tmp_path):
    # After the wheel, so that the objects are there already.
    python = environment(tmp_path / "env")
    pip(python, "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", tree)
    said = run([python, "-c", IMPORT])
    assert said.startswith("aot 9.0 ") and str(tree) in said, said

    schemas = tree / "csrc" / "schemas.cpp"
    before = schemas.read_bytes()
    try:
        schemas.write_bytes(before + b"// changed\n")
        said = run([python, "-c", IMPORT], MASKED_LOSS_EXT_BUILD="aot", fails=True)
    finally:
        schemas.write_bytes(before)
    assert "_C.abi3.so is older than csrc, so it is not used" in said
    assert "there is no built library that fits" in said.splitlines()[-1]


def test_second_copy_is_not_loaded(aot_wheel, tmp_path):
    python = environment(tmp_path / "env")
    pip(python, "install", "--no-deps", "--no-index", aot_wheel)
    library = next((tmp_path / "env").glob("lib/*/site-packages/masked_loss_ext/_C.abi3.so"))
    said = run([python, "-c", f"import torch; torch.ops.load_library('{library}')" + IMPORT])
    assert said.startswith("preloaded 9.0 "), said
    other = (
        "import torch; lib = torch.library.Library('masked_loss_ext', 'DEF');"
        "lib.define('_version() -> str'); lib.impl('_version', lambda: '0.0.9', 'BackendSelect')"
    )
    said = run([python, "-c", other + IMPORT], fails=True)
    assert re.search(r"already loaded in this process is version 0\.0\.9", said.splitlines()[-1])
