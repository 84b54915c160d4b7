# SPDX-License-Identifier: BSD-3-Clause
"""What a build needs, and the one sentence that comes where something is missing."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_build

from masked_loss_ext.build import loading, ninja, sources, toolchain
from masked_loss_ext.build.toolchain import BuildError


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No program on PATH, no setting, no cache."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "MASKED_LOSS_EXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return programs


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)


def fake_torch(folder, version="2.13.0", cuda="13.0"):
    (folder / "torch").mkdir()
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return folder / "torch"


def fake_toolkit(folder):
    program(folder / "bin" / "nvcc")
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    return folder


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


def test_missing_compiler(bare):
    with pytest.raises(BuildError) as error:
        toolchain.find_cxx()
    assert "no C++ compiler is found" in one_sentence(error)
    assert "apt-get install g++" in one_sentence(error)


def test_compiler_from_the_environment(bare, monkeypatch):
    program(bare / "clang++")
    assert toolchain.find_cxx() == [str(bare / "clang++")]
    program(bare / "ccache")
    monkeypatch.setenv("CXX", "ccache g++ -pipe")
    assert toolchain.find_cxx() == [str(bare / "ccache"), "g++", "-pipe"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX=no-such-compiler names no program"):
        toolchain.find_cxx()


def test_missing_ninja(bare, monkeypatch):
    monkeypatch.setattr(toolchain.sys, "executable", str(bare / "python"))
    monkeypatch.setattr(toolchain.sys, "prefix", str(bare))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(BuildError, match="ninja is missing; get it with: pip install ninja"):
        toolchain.find_ninja()
    program(bare / "ninja")
    assert toolchain.find_ninja() == str(bare / "ninja")


def test_missing_nvcc_is_an_error_where_cuda_was_asked_for(bare, monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "cuda_home", lambda torch_root: None)
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "1")
    with pytest.raises(BuildError) as error:
        toolchain.find_cuda(tmp_path, None)
    assert "nvcc is missing; install the CUDA toolkit" in one_sentence(error)


@pytest.fixture
def gpus(monkeypatch):
    """Those that are here: none, until the list says otherwise."""
    here = []
    monkeypatch.setattr(toolchain.gpus, "capabilities", lambda: ";".join(here))
    return here


def test_missing_nvcc_is_said_aloud_where_torch_has_cuda(bare, monkeypatch, tmp_path, capsys, gpus):
    monkeypatch.setattr(toolchain, "cuda_home", lambda torch_root: None)
    gpus.append("9.0")
    assert toolchain.find_cuda(tmp_path, "13.0") is None
    said = capsys.readouterr().err
    assert "WARNING: PyTorch is built for CUDA 13.0, but nvcc is missing" in said
    assert "only the CPU kernels are built" in said


def test_who_gets_cuda_kernels(bare, monkeypatch, tmp_path, gpus):
    """PyTorch with CUDA and nvcc, and somebody who can run them; or who asks for them by name."""
    home = fake_toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(home))
    found = lambda cuda="13.0", **how: toolchain.find_cuda(tmp_path, cuda, **how)  # noqa: E731
    assert found() is None  # no GPU is here
    assert found(for_others=True) == home  # a wheel is for other machines too
    assert found(None, for_others=True) is None  # but for a PyTorch like this one
    gpus.append("9.0")
    assert found() == home and found(None) is None
    gpus.clear()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert found() == home and found(None) is None
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "1")
    assert found() == home and found(None) == home
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "0")
    gpus.append("9.0")
    assert found() is None and found(for_others=True) is None
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "yes")
    with pytest.raises(BuildError, match="must be auto, 1 or 0, got 'yes'"):
        found(None)


def test_kernels_that_nobody_can_run_are_left_out_aloud(bare, monkeypatch, tmp_path, gpus):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "toolkit")))
    program(bare / "c++")
    program(bare / "ninja")
    monkeypatch.setattr(toolchain, "torch_about", lambda: (tmp_path, "2.13.0", "13.0"))
    monkeypatch.setattr(toolchain, "find_static_cudart", lambda home: home)
    tools = toolchain.find_toolchain()
    assert tools.cuda_home is None
    assert tools.remark == (
        "PyTorch is built for CUDA 13.0, but there is no GPU here, so no CUDA kernels are "
        "compiled; MASKED_LOSS_EXT_CUDA=1 compiles them all the same"
    )
    wheel = toolchain.find_toolchain(for_others=True)
    assert wheel.cuda_home and not wheel.remark
    assert wheel.architectures == ["sm_80", "sm_90", "compute_90"]
    for setting in ("0", "1"):
        monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", setting)
        assert not toolchain.find_toolchain().remark
    monkeypatch.delenv("MASKED_LOSS_EXT_CUDA")
    monkeypatch.setattr(toolchain, "torch_about", lambda: (tmp_path, "2.13.0", None))
    assert not toolchain.find_toolchain().remark  # PyTorch itself has no CUDA


def test_the_remark_is_made_where_something_is_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "0")
    tiny_build.reduce(sources, tiny_build.make_tree(tmp_path), monkeypatch.setattr)
    tools = toolchain.find_toolchain()
    tools.remark = "no GPU here"
    said = []
    for _ in range(2):
        ninja.compile_library(tools, tmp_path / "built")
        said.append(capsys.readouterr().err)
    assert said[0].startswith("masked_loss_ext: no GPU here\n") and not said[1]


def test_nvcc_script_outside_its_toolkit_is_no_toolkit(bare, monkeypatch, tmp_path):
    program(bare / "nvcc")  # its parent folder has no include/cuda_runtime.h
    monkeypatch.setenv("CUDA_PATH", str(fake_toolkit(tmp_path / "toolkit")))
    assert toolchain.cuda_home(tmp_path) == tmp_path / "toolkit"


def test_toolkit_without_the_static_runtime(tmp_path):
    home = fake_toolkit(tmp_path / "toolkit")
    with pytest.raises(BuildError, match="libcudart_static.a is missing"):
        toolchain.find_static_cudart(home)


def test_architectures(bare, monkeypatch):
    monkeypatch.setattr(toolchain.gpus, "capabilities", lambda: "")
    assert toolchain.find_architectures() == ["sm_80", "sm_90", "compute_90"]
    monkeypatch.setattr(toolchain.gpus, "capabilities", lambda: "8.6;9.0")
    assert toolchain.find_architectures() == ["sm_86", "sm_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;10.0+PTX")
    assert toolchain.find_architectures() == ["sm_86", "sm_90a", "sm_100", "compute_100"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST must list .* got 'Hopper'"):
        toolchain.find_architectures()


def test_architecture_flags(tmp_path):
    tools = toolchain.Toolchain(tmp_path, "2.13.0", ["c++"], "ninja")
    tools.architectures = ["sm_90", "compute_90"]
    assert tools.cuda_flags == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(
    ("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64"), ("win32", "AMD64")]
)
def test_other_platforms_are_refused(monkeypatch, system, machine):
    monkeypatch.setattr(toolchain.sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(BuildError, match="only Linux on x86-64 and aarch64 is supported") as error:
        toolchain.find_toolchain()
    assert machine in one_sentence(error)


def test_missing_and_old_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="PyTorch is missing; get it with: pip install torch"):
        toolchain.torch_about()
    places = type("Spec", (), {"submodule_search_locations": [fake_torch(tmp_path, "2.9.1+cu128")]})
    monkeypatch.setattr(toolchain, "find_spec", lambda name: places)
    with pytest.raises(BuildError, match=r"PyTorch 2.10 or newer is needed, this is 2\.9\.1"):
        toolchain.torch_about()


def test_import_without_a_compiler_ends_in_one_sentence(bare, monkeypatch):
    monkeypatch.setenv("MASKED_LOSS_EXT_JIT", "1")
    done = subprocess.run(
        [sys.executable, "-c", "import masked_loss_ext"],
        cwd=sources.PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.match("ImportError: masked_loss_ext: no C.. compiler", done.stderr.splitlines()[-1])
    assert len(done.stderr.splitlines()) < 15, done.stderr


def test_build_without_a_compiler_ends_in_one_sentence(bare, tmp_path):
    if not (sources.PACKAGE.parent / "setup.py").is_file():
        pytest.skip("the package under test is installed, there is no setup.py to run")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path)],
        cwd=sources.PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: masked_loss_ext: no C++ compiler is found"), done.stderr
    assert "Traceback" not in done.stderr


def test_compiler_errors_are_shown_without_the_command(tmp_path):
    output = [
        "[1/3] c++ -c good.cpp\n",
        "FAILED: cpu/bad.cpp.o \n",
        "/usr/bin/c++ -O3 very long\n",
        "bad.cpp:1:1: error: 'x' does not name a type\n",
        "[2/3] /usr/bin/c++ -O3 very long\n",  # that ran beside it
        "FAILED: cpu/worse.cpp.o \n",
        "/usr/bin/c++ -O3 very long\n",
        "worse.cpp:1:1: error: no\n",
        "ninja: build stopped: subcommand failed.\n",
    ]
    text = ninja.failure(output, tmp_path)
    assert text == "the compiler failed at cpu/bad.cpp.o:\n" + output[3]


def test_every_source_is_listed_once():
    listed = sources.LEVEL_SOURCES + sources.CPU_SOURCES
    listed += sources.CUDA_SOURCES + sources.CUDA_HOST_SOURCES
    assert len(listed) == len(set(listed))
    root = sources.csrc_dir()
    on_disk = [p for p in root.rglob("*") if p.suffix in (".cpp", ".cu")]
    assert sorted(p.relative_to(root).as_posix() for p in on_disk) == sorted(listed)


def test_fingerprint_follows_every_header(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "csrc_dir", lambda: tmp_path)
    header = tmp_path / "checks.h"
    header.write_text("// one\n")
    first = sources.source_fingerprint()
    assert first == sources.source_fingerprint()
    header.write_text("// two\n")
    assert first != sources.source_fingerprint()


def library_of(folder, architectures):
    """A file that a library's build info is read from, and that is whole for who looks at it."""
    library = folder / sources.LIBRARY
    text = sources.build_info_source(sources.build_info(architectures, "2.13.0", "13.0"))
    python = Path(os.path.realpath(sys.executable)).read_bytes()
    said = re.search('= "([^"]*)" COMPILER;$', text)[1] + "gcc 12.2.0"
    library.write_bytes(python + said.encode() + b"\0more")
    return library


def test_build_info_is_read_without_loading(tmp_path):
    library = library_of(tmp_path, ["sm_80", "sm_90"])
    info = sources.read_build_info(library)
    assert info == {
        "version": sources.VERSION,
        "sources": sources.source_fingerprint(),
        "cuda": "sm_80 sm_90",
        "toolkit": "13.0",
        "torch": "2.13.0",
        "compiler": "gcc 12.2.0",
    }
    assert loading._usable(library)
    for foreign in (b"", b"\x7fELF\0", sources.INFO_MARKER.encode() + b"\xff\xfe"):
        library.write_bytes(foreign)
        assert sources.read_build_info(library) == {}
        with pytest.raises(BuildError, match="is damaged, it is no whole library; reinstall it"):
            loading._usable(library)
    shutil.copy(os.path.realpath(sys.executable), library)
    with pytest.raises(BuildError, match="is of version unknown, this package is"):
        loading._usable(library)


def test_cpu_only_library_is_reported_where_cuda_could_be_used(monkeypatch, tmp_path, capsys):
    library = library_of(tmp_path, [])
    monkeypatch.delenv("MASKED_LOSS_EXT_CUDA", raising=False)
    monkeypatch.setattr(loading.torch.version, "cuda", "13.0")
    monkeypatch.setattr(loading, "cuda_home", lambda torch_root: tmp_path)
    monkeypatch.setattr(toolchain.gpus, "capabilities", lambda: "")
    assert loading._usable(library)
    assert not capsys.readouterr().err  # nobody is here to run them
    monkeypatch.setattr(toolchain.gpus, "capabilities", lambda: "9.0")
    assert loading._usable(library)
    assert "has only CPU kernels, but PyTorch is built for CUDA 13.0" in capsys.readouterr().err
