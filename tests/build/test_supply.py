# SPDX-License-Identifier: BSD-3-Clause
"""What the library asks of its surroundings and gives away, and what our Python never does."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from masked_loss_ext.build import sources, toolchain

ROOT = sources.PACKAGE.parent
CUDA_LIBRARY = ROOT / "build" / "ci-cuda" / sources.LIBRARY  # by .ci/check_build.py cuda
# The headers of PyTorch that promise a stable ABI.
STABLE_HEADERS = (
    "torch/csrc/stable/c/shim.h",
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h",
    "torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h",
)
# Versioned names are of libc, libm, libstdc++ and libgcc; these are what a linker adds.
OF_THE_LINKER = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
OF_THE_SYSTEM = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
# What a library of arithmetic has no use for: programs, sockets, files that are written.
NEVER = re.compile(
    "system|popen|exec[lv]p?e?|posix_spawnp?|fork|vfork|socket|connect|bind|listen|accept4?|"
    "send(to|msg)?|recv(from|msg)?|gethostbyname|getaddrinfo|fopen(64)?|creat|unlink|rename|"
    "remove|chmod|ptrace|mprotect|setenv|putenv"
)
# The static cudart does: it talks to the profilers of CUDA and reads what the driver says.
NEVER_BUT_OF_CUDART = set(
    "bind chmod connect fopen listen mprotect recvmsg remove sendmsg setenv socket unlink".split()
)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def library(request):
    path = sources.PACKAGE / sources.LIBRARY if request.param == "cpu" else CUDA_LIBRARY
    if not path.is_file():
        pytest.skip(f"{path.relative_to(ROOT)} is not built here")
    return path


def said_by(program, *arguments):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing: apt-get install binutils")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def undefined(library):
    return {
        line.split()[-1] for line in said_by("nm", "-D", "--undefined-only", library).splitlines()
    }


def promised():
    """Functions that PyTorch's headers of the stable ABI declare."""
    include = toolchain.torch_about()[0] / "include"
    text = "\n".join((include / name).read_text() for name in STABLE_HEADERS)
    # One family is declared by a macro for each type.
    kinds = r"aoti_torch_(?:dtype|device_type|layout|memory_format)_\w+\(\)"
    return set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", text)) | {
        name.removesuffix("()") for name in re.findall(kinds, text)
    }


def test_undefined_symbols_are_the_stable_abi(library):
    names = undefined(library)
    of_torch = {name for name in names if "torch" in name.lower()}
    assert len(of_torch) > 20
    assert not of_torch - promised(), "not promised by PyTorch"
    others = {n for n in names - of_torch - OF_THE_LINKER if not OF_THE_SYSTEM.search(n)}
    assert not others, "of no library that is named"


def test_no_program_is_started_and_no_file_written(library):
    plain = {name.partition("@")[0] for name in undefined(library)}
    found = {name for name in plain if NEVER.fullmatch(name)}
    if library == CUDA_LIBRARY:
        found -= NEVER_BUT_OF_CUDART
    assert not found


def test_loaded_from_nowhere_else_and_nothing_writable_is_code(library):
    dynamic = said_by("readelf", "-dW", library)
    assert "libtorch_cpu.so" in dynamic
    assert not re.search("RPATH|RUNPATH|TEXTREL", dynamic)
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    assert not [name for name in needed if "/" in name]
    segments = said_by("readelf", "-lW", library)
    flags = re.findall(r"^\s+(\w+)(?:\s+0x\w+){5}\s+([RWE ]+?)\s+0x", segments, re.MULTILINE)
    assert {"LOAD", "GNU_STACK", "GNU_RELRO"} <= {name for name, _ in flags}, segments
    assert not [name for name, what in flags if "W" in what and "E" in what]
    assert not [name for name, what in flags if name == "GNU_STACK" and "E" in what]


def test_no_folder_of_the_machine_that_built_it(library):
    data = library.read_bytes()
    torch_root = toolchain.torch_about()[0]
    for folder in (torch_root, sources.csrc_dir(), ROOT, Path.home(), Path.cwd()):
        if folder != Path("/"):
            assert os.fsencode(folder) + b"/" not in data, folder


BAD = """
#include <cstdlib>
#include <cstdio>
extern "C" int aoti_torch_of_another_version(), other_library();
int one() { return std::system("") + aoti_torch_of_another_version() + other_library(); }
const char* where = __FILE__;
"""


@pytest.mark.parametrize(
    "check",
    [
        test_undefined_symbols_are_the_stable_abi,
        test_no_program_is_started_and_no_file_written,
        test_loaded_from_nowhere_else_and_nothing_writable_is_code,
        test_no_folder_of_the_machine_that_built_it,
    ],
)
def test_a_bad_library_is_seen(check, tmp_path, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("needs g++, to make a bad library of")
    (tmp_path / "bad.cpp").write_text(BAD)
    bad = [
        "-Wl,-rpath,/elsewhere",
        "-Wl,-z,execstack",
        tmp_path / "bad.cpp",
        "-o",
        tmp_path / "bad.so",
    ]
    subprocess.run(["g++", "-shared", "-fPIC", *bad], check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        check(tmp_path / "bad.so")


# -- our Python ---------------------------------------------------------------------------------

FOLDERS = ("masked_loss_ext", "tools", "benchmarks", "examples", ".ci")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NETWORK = {"socket", "urllib", "http", "ftplib", "smtplib", "requests", "aiohttp", "ssl"}
FUNCTIONS = {"eval", "exec", "__import__"}
METHODS = {"torch.load", "os.system", "os.popen", "yaml.load", "np.load", "numpy.load"}
# tools/scale: formulas that stand in that very file, without builtins. tools/site: serves its own
# pages to a browser on this machine.
ALLOWED = {("tools/scale/messages.py", "eval"), ("tools/site/__main__.py", "http")}


def our_files():
    folders = [ROOT / name for name in FOLDERS if (ROOT / name).is_dir()]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def dotted(node):
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def unsafe(tree):
    """Names of what it calls or imports that takes data for code, or talks to a network."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if not node.level else []
            yield from {name.partition(".")[0] for name in names} & (MODULES | NETWORK)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FUNCTIONS | METHODS:
                yield name
            if any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords):
                yield "shell="


@pytest.mark.parametrize("path", our_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_data_is_taken_for_code(path):
    name = path.relative_to(ROOT).as_posix()
    found = {what for what in unsafe(ast.parse(path.read_text())) if (name, what) not in ALLOWED}
    assert not found


def test_what_is_looked_for_is_found():
    text = """
import pickle, os.path
from urllib.request import urlopen
def one():
    import socket
    return eval("1"), torch.load("x"), subprocess.run("ls", shell=True), model.eval()
"""
    expected = ["eval", "pickle", "shell=", "socket", "torch.load", "urllib"]
    assert sorted(unsafe(ast.parse(text))) == expected
