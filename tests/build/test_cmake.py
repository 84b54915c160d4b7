# SPDX-License-Identifier: BSD-3-Clause
"""The CMake build: its own C++ test, and the library it makes under Python."""

import re
import shutil
import subprocess
import sys

import pytest
from quick_compiler import quick_compiler

from masked_loss_ext.build import sources

ROOT = sources.PACKAGE.parent
pytestmark = pytest.mark.slow


def run(*command):
    done = subprocess.run(
        list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("the package under test is installed, there is no CMakeLists.txt")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is missing: apt-get install cmake")
    folder = tmp_path_factory.mktemp("cmake")
    quick_compiler(folder)
    settings = (f"-DPython3_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={folder / 'c++'}")
    run("cmake", "-S", ROOT, "-B", folder, *settings)
    run("cmake", "--build", folder, "--parallel", "2")
    return folder


def test_operators_are_called_from_cpp(build):
    said = run("ctest", "--test-dir", build, "--verbose")
    assert "100% tests passed, 0 tests failed out of 1" in said
    assert len(re.findall(r"ok +mean over", said)) == 2


def test_installed_library_is_used_by_the_package(build, tmp_path):
    run("cmake", "--install", build, "--prefix", tmp_path)
    library = tmp_path / "lib" / "libmasked_loss_ext.so"
    assert (tmp_path / "lib/cmake/masked_loss_ext/masked_loss_extConfig.cmake").is_file()
    program = (
        f"import sys, torch; sys.path.insert(0, '{ROOT}'); torch.ops.load_library('{library}');"
        "import masked_loss_ext as mle; print(mle._library_kind)"
    )
    assert run(sys.executable, "-c", program).strip() == "preloaded"
