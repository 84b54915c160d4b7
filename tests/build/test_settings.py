# SPDX-License-Identifier: BSD-3-Clause
"""What the build takes from its environment: variables, streams, encodings, programs, GPUs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_build

from masked_loss_ext.build import loading, ninja, sources, toolchain
from masked_loss_ext.build.toolchain import BuildError

WRONG = {
    "MASKED_LOSS_EXT_BUILD": "auto, aot or jit",
    "MASKED_LOSS_EXT_CPU_CAPABILITY": "avx512, avx2 or default",
    "MASKED_LOSS_EXT_CUDA": "auto, 1 or 0",
    "MASKED_LOSS_EXT_JIT": "0 or 1",
    "MASKED_LOSS_EXT_VERBOSE": "0 or 1",
}
GPUS = """
#include <string.h>
static int major[] = {9, 8, 12}, minor[] = {0, 6, 0};
extern "C" int nvmlInit_v2() { return FAILS; }
extern "C" int nvmlShutdown() { return 0; }
extern "C" int nvmlDeviceGetCount_v2(unsigned* n) { *n = 4; return 0; }
extern "C" int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** device) {
  *device = &major[i];
  return i == 3;  // one that is lost
}
extern "C" int nvmlDeviceGetCudaComputeCapability(void* device, int* a, int* b) {
  int i = (int*)device - major;
  *a = major[i];
  *b = minor[i];
  return 0;
}
extern "C" int nvmlDeviceGetMemoryInfo(void*, unsigned long long* total) {
  *total = 80ULL << 30;
  return 0;
}
extern "C" int nvmlDeviceGetName(void*, char* text, unsigned) {
  strcpy(text, "A GPU");
  return 0;
}
extern "C" int nvmlSystemGetDriverVersion(char* text, unsigned) {
  strcpy(text, "580.65.06");
  return 0;
}
"""


def test_every_variable_of_the_package_is_known():
    texts = [p.read_text() for p in sources.PACKAGE.rglob("*.py")]
    texts += [p.read_text() for p in sources.csrc_dir().rglob("*.cpp")]
    read = set(re.findall(r'(?:setting|getenv)\("(MASKED_LOSS_EXT_\w+)"\)', "\n".join(texts)))
    assert read == set(toolchain.SETTINGS) == set(WRONG)


@pytest.mark.parametrize(("name", "values"), WRONG.items())
@pytest.mark.parametrize("value", ["sometimes", " ", "AOT", "1.0", "\udcff"])
def test_an_unknown_value_is_refused_at_import(monkeypatch, name, values, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ImportError) as error:
        loading.load()
    assert str(error.value) == f"masked_loss_ext: {name} must be {values}, got {value!r}"


@pytest.mark.parametrize("name", WRONG)
def test_an_empty_variable_is_one_that_is_not_set(monkeypatch, name):
    monkeypatch.setenv(name, "")
    assert toolchain.setting(name) == toolchain.SETTINGS[name][0]


def test_import_and_setup_end_in_that_sentence():
    expected = "masked_loss_ext: MASKED_LOSS_EXT_BUILD must be auto, aot or jit, got 'sometimes'"
    in_tree = (sources.PACKAGE.parent / "setup.py").is_file()
    setup = [["setup.py", "--version"]] if in_tree else []
    for command in (["-c", "import masked_loss_ext"], *setup):
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "MASKED_LOSS_EXT_BUILD": "sometimes"},
            cwd=sources.PACKAGE.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].removeprefix("ImportError: ") == expected
        assert len(done.stderr.splitlines()) < 15, done.stderr


@pytest.mark.parametrize("jobs", ["many", "0", "-1", "00", "1.5", "2 3", "9" * 30, "²"])
def test_jobs_that_are_no_number(monkeypatch, tmp_path, jobs):
    monkeypatch.setenv("MAX_JOBS", jobs)
    builder = ninja.Ninja(
        toolchain.Toolchain(tmp_path, "2.13.0", ["c++"], "ninja"), tmp_path, 3, ""
    )
    with pytest.raises(BuildError) as error:
        builder.bring_up_to_date("")
    assert str(error.value) == f"MAX_JOBS must be a whole number from 1 on, got {jobs!r}"


def test_jobs(monkeypatch):
    for jobs, words in (("", []), ("  ", []), ("3", ["-j", "3"]), (" 08", ["-j", "08"])):
        monkeypatch.setenv("MAX_JOBS", jobs)
        assert ninja._jobs() == words
    monkeypatch.delenv("MAX_JOBS")
    assert ninja._jobs() == []


def test_a_quotation_that_is_not_closed(monkeypatch):
    monkeypatch.setenv("CXX", "g++ 'x")
    for ask in (toolchain.find_cxx, toolchain.cxx_identity, loading.compile_at_import):
        with pytest.raises(BuildError) as error:
            ask()
        assert (
            str(error.value) == """CXX must be a command line, got "g++ 'x": No closing quotation"""
        )


@pytest.mark.parametrize("executable", [None, ""])
def test_a_program_that_embeds_python_has_no_executable(monkeypatch, tmp_path, executable):
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ninja").touch()  # what lies in the current folder is not meant
    with pytest.raises(BuildError, match="ninja is missing"):
        toolchain.find_ninja()
    (tmp_path / "prefix" / "bin").mkdir(parents=True)
    (tmp_path / "prefix" / "bin" / "ninja").touch()
    assert toolchain.find_ninja() == str(tmp_path / "prefix" / "bin" / "ninja")


def test_a_program_that_cannot_be_started_or_hangs(tmp_path):
    (tmp_path / "ninja").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "ninja").chmod(0o755)
    with pytest.raises(BuildError, match=r"ninja cannot be started: Exec format error$"):
        toolchain.answer_of([str(tmp_path / "ninja")])
    with pytest.raises(BuildError, match=r"gone cannot be started: No such file or directory$"):
        toolchain.answer_of([str(tmp_path / "gone")])
    with pytest.raises(BuildError, match=r"sleep has not answered in 0.1 s$"):
        toolchain.answer_of(["sleep", "60"], timeout=0.1)


def test_a_named_toolkit_that_is_none_is_said(monkeypatch, tmp_path, capsys):
    for part in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / part).parent.mkdir()
        (tmp_path / part).touch()
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "1")
    assert toolchain.find_cuda(tmp_path, None) == tmp_path
    said = capsys.readouterr().err
    assert "WARNING: CUDA_HOME=/nowhere has no bin/nvcc" in said and "CUDA_PATH" not in said


@pytest.mark.parametrize(("fails", "expected"), [(0, "'8.6;9.0;12.0'"), (1, "''"), (None, "''")])
def test_gpus_are_asked_of_the_driver(tmp_path, fails, expected):
    if shutil.which("g++") is None:
        pytest.skip("needs g++, to make a driver of")
    if fails is not None:
        (tmp_path / "nvml.cpp").write_text(GPUS)
        library = tmp_path / "libnvidia-ml.so.1"
        command = ["g++", "-shared", "-fPIC", f"-DFAILS={fails}", "-o", library]
        subprocess.run([*command, tmp_path / "nvml.cpp"], check=True)
    else:  # a driver that has none of these functions
        subprocess.run(
            ["g++", "-shared", "-x", "c++", "/dev/null", "-o", tmp_path / "libnvidia-ml.so.1"],
            check=True,
        )
    done = subprocess.run(
        [sys.executable, "-c", "from build import gpus; print(repr(gpus.capabilities()))"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        cwd=sources.PACKAGE,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == expected, done.stderr


def test_paths_and_messages_that_are_not_utf_8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xff"))
    folder.mkdir()
    csrc = tiny_build.make_tree(folder)
    (csrc / "cpu" / "one.cpp").write_bytes(b'#warning "caf\xe9"\n' + tiny_build.SOURCE.encode())
    built = tiny_build.start(folder, MASKED_LOSS_EXT_VERBOSE="1")
    said = built.communicate()[0]
    assert built.returncode == 0 and said.splitlines()[-1] == "_C.abi3.so", said
    assert "#warning" in said  # it was decoded

    (csrc / "cpu" / "one.cpp").write_bytes(b'#error "caf\xe9"\n')
    failing = tiny_build.start(folder)
    said = failing.communicate()[0]
    assert failing.returncode == 1 and "Traceback" not in said, said
    assert "BuildError: the compiler failed at cpu/one.cpp.o:" in said and "caf" in said


@pytest.mark.parametrize("closed", ["2>&-", "2>&- <&-", "2>/dev/full", ">&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    tiny_build.make_tree(tmp_path)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *tiny_build.command(tmp_path)],
        # Python ends with 120 of its own accord where it cannot flush a buffer to a full device.
        env={**os.environ, "MASKED_LOSS_EXT_VERBOSE": "1", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "built" / sources.LIBRARY).is_file()
    # What is not to be seen is not put elsewhere.
    assert done.stdout.strip() == ("" if closed.startswith(">") else sources.LIBRARY)


def test_a_stream_that_was_closed_by_the_program(monkeypatch):
    with open(os.devnull, "w") as closed:
        pass
    for stream in (None, closed, object()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert ninja._is_terminal() is False
    monkeypatch.setattr(sys, "stderr", closed)
    toolchain.say("nobody hears this")
    with ninja.Progress(10) as progress:
        progress.hear("[1/2] c++\n")
    monkeypatch.setattr(sys, "stderr", None)
    toolchain.say("nor this")


def test_progress_counts_while_no_step_ends(monkeypatch, capsys):
    monkeypatch.setattr(ninja, "_is_terminal", lambda: True)
    with ninja.Progress(150) as progress:
        progress.hear("[3/36] nvcc ...\n")
        progress.hear("what a compiler says\n")
        progress._ended.wait(2.5)
    lines = capsys.readouterr().err.split("\r")
    assert lines[1] == "masked_loss_ext: compiling [3/36] 1 s of about 150 s\033[K"
    assert lines[2].startswith("masked_loss_ext: compiling [3/36] 2 s") and lines[-1] == "\033[K"
    assert progress._thread is not None and not progress._thread.is_alive()


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(ninja, "_is_terminal", lambda: False)
    with ninja.Progress(150) as progress:
        progress.hear("[1/36] g++ ...\n")
        monkeypatch.setattr(ninja, "SECONDS_BETWEEN_LINES", -1)
        progress.hear("[2/36] g++ ...\n")
        progress.hear("g++: warning: nothing\n")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "masked_loss_ext: compiling [2/36] 0 s of about 150 s"


def test_the_estimate_follows_what_is_to_be_compiled(monkeypatch):
    monkeypatch.setattr(ninja.os, "sched_getaffinity", lambda process: {0, 1})
    steps = "".join(f"[{i}/10] /cuda/bin/nvcc -c x.cu -o x.o\n" for i in range(8))
    steps += "[9/10] g++ -c x.cpp -o x.o\n[10/10] g++ -shared\n"
    both = ninja._estimate(steps, ["sm_80", "sm_90", "compute_90"])
    assert both == (8 * 2 * ninja.SECONDS_PER_CUDA_SOURCE + ninja.SECONDS_PER_CPU_SOURCE) // 2
    assert ninja._estimate(steps, ["sm_90"]) < both
    assert ninja._estimate("[1/1] g++ -c x.cpp -o x.o\n", []) == ninja.SECONDS_PER_CPU_SOURCE


def test_a_failed_step_of_newer_ninjas():
    output = ["FAILED: [code=1] cpu/bad.cpp.o \n", "g++ long\n", "bad.cpp:1: error\n"]
    text = ninja.failure(output, Path("built"))
    assert text == "the compiler failed at cpu/bad.cpp.o:\nbad.cpp:1: error\n"
    text = ninja.failure(["ninja: error: loading 'build.ninja'\n"], Path("built"))
    assert text == "ninja failed in built: ninja: error: loading 'build.ninja'"
