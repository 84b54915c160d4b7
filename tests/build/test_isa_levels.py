# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of every instruction-set level that this machine can run."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numbers_tests import pytest_words

from masked_loss_ext.build import sources

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
LEVELS = ("default", "avx2", "avx512")  # an upper bound, each contains the one before
VARIABLE = "MASKED_LOSS_EXT_CPU_CAPABILITY"
QUESTION = "import masked_loss_ext, torch; print(torch.ops.masked_loss_ext.cpu_capability())"


def run(level, *command):
    environment = {**os.environ, VARIABLE: level}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )


@functools.cache
def level_for(asked):
    done = run(asked, "-c", QUESTION)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("level", LEVELS)
def test_numbers_at_level(level):
    got = level_for(level)
    assert LEVELS.index(got) <= LEVELS.index(level)
    if got != level:
        pytest.skip(f"this machine has no {level}; its best is {got}")
    if level == torch.ops.masked_loss_ext.cpu_capability():
        pytest.skip(f"{level} is what the other tests of this process run with")
    done = run(level, "-m", "pytest", *pytest_words(TESTS))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_unknown_level_is_refused():
    """At import, and by the library itself, which a C++ program loads without the package."""
    expected = f"{VARIABLE} must be avx512, avx2 or default, got 'axv2'"
    done = run("axv2", "-c", QUESTION)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: masked_loss_ext: {expected}"
    assert level_for("") == level_for("avx512")
    later = (
        "import masked_loss_ext as mle, os, torch\n"
        f"os.environ['{VARIABLE}'] = 'axv2'\n"
        "for call in (torch.ops.masked_loss_ext.cpu_capability, lambda: mle.MseLoss()(x, x)):\n"
        "    x = torch.ones(2, 3)\n"
        "    try:\n"
        "        call()\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    done = run("avx2", "-c", later)
    assert done.stdout.splitlines() == [expected, expected], done.stderr


def test_no_function_of_a_wide_file_is_shared():
    """A weak function compiled for AVX-512 could be the copy that the linker keeps for everyone."""
    compiler, nm = shutil.which(os.environ.get("CXX", "c++")), shutil.which("nm")
    if not compiler or not nm:
        pytest.skip("needs a C++ compiler and nm")
    widest = [unit for unit in WIDE if ".avx512." in unit.object]
    assert len(widest) == len(sources.LEVEL_SOURCES) and len(WIDE) == 2 * len(widest)
    for unit in widest:  # the headers are the same for the other
        # Not optimised, so that nothing is inlined that need not be. Assembly is enough: a shared
        # function is declared .weak in it.
        flags = [flag for flag in sources.CXX_FLAGS if not flag.startswith("-O")]
        weak = [line for line in assembly(compiler, unit, flags) if line.startswith(".weak")]
        # A pointer to the C++ runtime's own function, not code.
        weak = [line for line in weak if "DW.ref.__gxx_personality" not in line]
        assert not weak, f"{unit.object}: {weak}"


WIDE = [unit for unit in sources.units("x86_64") if re.search(r"\.avx\w+\.o$", unit.object)]


def assembly(compiler, unit, flags=sources.CXX_FLAGS):
    """The lines of one, without blanks around them."""
    if platform.machine() != "x86_64":
        pytest.skip("these levels are those of x86-64")
    root = sources.csrc_dir()
    words = [compiler, *flags, *unit.flags, "-I", root, "-S", "-o", "-", root / unit.source]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines()]


def unit_of(operator, level):
    (unit,) = (unit for unit in WIDE if unit.object == f"{operator}/cpu/kernels.cpp.{level}.o")
    return unit


@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_clang_compiles_the_level_that_is_asked_for(level):
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("there is no clang++ here")
    lines = assembly(clang, unit_of("cross_entropy", level))
    register = {"avx2": "%ymm", "avx512": "%zmm"}[level]
    assert sum(register in line for line in lines) > 1000
    assert not [line for line in lines if line.startswith(".weak")]


def test_every_compiler_knows_the_instructions_that_are_asked_for():
    """gcc 11 and clang 13 refuse a name that is younger than they are."""
    known = {"avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
    texts = [p.read_text() for p in sources.csrc_dir().rglob("*.*") if p.suffix != ".cu"]
    asked = set(re.findall(r'__builtin_cpu_supports\("([^"]*)"\)', "\n".join(texts)))
    assert asked == known


def functions_at(level, operator):
    """Assembly of each function of an operator's kernels, by mangled name."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        pytest.skip("needs a C++ compiler")
    text = "\n".join(assembly(compiler, unit_of(operator, level)))
    return re.findall(r"^(_ZN[\w.]+):$(.*?)\.cfi_endproc", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_the_loops_over_logits_are_vectors(level):
    """gcc makes branches of some selections, and a loop with a branch runs eight times slower."""
    found = [
        body
        for name, body in functions_at(level, "cross_entropy")
        if "16exponential_sumsILb" in name and "EfEE" in name
    ]
    assert len(found) == 2, "with and without the entropy, for float"
    for body in found:
        assert not re.search(r"\sv\w*(mul|fmadd\d*)ss\s", body)
        assert len(re.findall(r"\sv\w*fmadd\d*ps\s", body)) >= 6


@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_the_loops_of_the_terms_are_vectors(level):
    """Each exponential of a loop is at least six packed products; what is left over is scalar."""
    functions = functions_at(level, "cross_entropy_terms")
    for name, loops in (("9term_sumsILb", 3), ("13term_gradientILb", 4)):
        found = {n: body for n, body in functions if name in n and re.search(r"EfE[Ev]", n)}
        assert len(found) == loops, sorted(found)
        for mangled, body in found.items():
            exponentials = 2 if "term_gradientILb1" in mangled else 1
            assert len(re.findall(r"\sv\w*fmadd\d*ps\s", body)) >= 6 * exponentials, mangled
