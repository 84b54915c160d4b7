# SPDX-License-Identifier: BSD-3-Clause
"""`python -m masked_loss_ext` and show_config(): what they tell, what they never tell."""

import doctest
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext.build import gpus, loading, sources, toolchain
from masked_loss_ext.environment import _facts, _operators, _privacy, _text, is_program

ROOT = sources.PACKAGE.parent


def run(*arguments, **settings):
    """The program, with a home of its own and a secret in the environment."""
    done = subprocess.run(
        [sys.executable, "-m", "masked_loss_ext", *arguments],
        env={**os.environ, "A_TOKEN": "a-secret", **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr and "a-secret" not in done.stdout
    return done


def test_the_program_says_all_that_a_bug_report_needs(monkeypatch):
    done = run("--json", MASKED_LOSS_EXT_CPU_CAPABILITY="default", HOME=str(ROOT.parent))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["masked_loss_ext"] == mle.__version__
    assert facts["torch"] == {"version": torch.__version__, "cuda": torch.version.cuda}
    assert facts["python"].startswith("{}.{}.".format(*sys.version_info))
    assert facts["cpu"]["level"] == "default"
    assert facts["settings"] == {"MASKED_LOSS_EXT_CPU_CAPABILITY": "default"}
    assert facts["library"]["kind"] == loading.loaded.kind
    assert facts["library"]["problem"] is None
    assert facts["library"]["built"]["sources"] == sources.source_fingerprint()
    assert set(facts["operators"]) >= {"masked_cross_entropy", "masked_squared_error"}
    assert facts["operators"]["masked_cross_entropy"]["cpu"] == "default kernels"
    for private in (str(ROOT), str(Path.home()), sys.prefix):
        assert private not in done.stdout


def test_where_there_is_no_library_yet_nothing_is_compiled(tmp_path):
    settings = {"MASKED_LOSS_EXT_JIT": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    done = run(**settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not compiled yet: the first import of masked_loss_ext does it, once" in done.stdout
    assert "operators" not in done.stdout and not done.stderr
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.ninja"))
    without = run(**settings, CXX="no-such-compiler")  # the first import would fail
    assert without.returncode == 1
    (problem,) = [line for line in without.stdout.splitlines() if "PROBLEM" in line]
    assert "CXX=no-such-compiler names no program" in problem


def test_a_library_that_cannot_be_loaded_is_one_sentence_and_status_1():
    done = run(MASKED_LOSS_EXT_JIT="1", MASKED_LOSS_EXT_BUILD="aot")
    assert done.returncode == 1 and not done.stderr
    (problem,) = [line for line in done.stdout.splitlines() if "PROBLEM" in line]
    assert "MASKED_LOSS_EXT_BUILD=aot, but there is no built library that fits" in problem
    assert "  pytorch       " + torch.__version__ in done.stdout


def test_without_pytorch(tmp_path):
    missing = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    (tmp_path / "torch.py").write_text(missing)
    done = run(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert done.returncode == 1 and not done.stderr
    assert "PROBLEM       PyTorch is missing; get it with: pip install torch" in done.stdout
    assert "pytorch       not found" in done.stdout


def test_arguments_are_refused_by_name():
    done = run("--jason")
    assert done.returncode == 2 and "unrecognized arguments: --jason" in done.stderr


@pytest.mark.parametrize(
    ("given", "words", "expected"),
    [
        (["python", "-m", "masked_loss_ext"], ["-m"], True),
        (["python", "-X", "dev", "-m", "masked_loss_ext", "--json"], ["-m", "--json"], True),
        (["python", "-Bmmasked_loss_ext"], ["-m"], True),
        (["python", "-m", "masked_loss_ext.__main__"], ["-m"], True),
        (["python", "-m", "masked_loss_ext.build", "--cmake"], ["-m", "--cmake"], False),
        (["python", "-m", "trainer", "masked_loss_ext"], ["-m", "masked_loss_ext"], False),
        (["python", "train.py", "masked_loss_ext"], ["train.py", "masked_loss_ext"], False),
        (["python"], [""], False),
    ],
)
def test_an_import_is_the_program_only_where_it_was_asked_for(monkeypatch, given, words, expected):
    monkeypatch.setattr(sys, "orig_argv", given)
    monkeypatch.setattr(sys, "argv", words)
    assert is_program() is expected
    monkeypatch.delattr(sys, "argv")
    assert is_program() is False


def test_show_config_is_the_same_text():
    text = mle.show_config()
    facts = _facts.collect()
    assert text == _text.rendered(facts)
    assert text.startswith(f"masked_loss_ext {mle.__version__}\n")
    for name in _operators.operators():
        assert f"\n  {name} " in text
    assert all(len(line) < 160 for line in text.splitlines())
    json.dumps(facts)
    example = doctest.DocTestFinder(recurse=False).find(mle.show_config, globs={"mle": mle})
    assert doctest.DocTestRunner().run(example[0]) == (0, 1)  # failed, attempted


# --- what it concludes ---------------------------------------------------------------------------

BUILT = ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((8, 0), BUILT, "sm_80"),
        ((8, 6), BUILT, "sm_80"),
        ((9, 0), BUILT, "sm_90"),
        ((10, 0), BUILT, "compute_90, which the driver compiles at its first use"),
        ((12, 0), ["sm_80", "sm_90"], "nothing: the library has no code for it"),
        ((7, 5), BUILT, "nothing: the library has no code for it"),
        ((9, 0), ["sm_90a"], "sm_90a"),
        ((10, 0), ["sm_90a", "compute_90a"], "nothing: the library has no code for it"),
        ((10, 3), ["sm_100", "sm_103"], "sm_103"),
        ((10, 3), ["sm_100f"], "sm_100f"),
        ((9, 0), [], "nothing: the library was built without CUDA kernels"),
    ],
)
def test_which_code_a_gpu_runs(capability, built, expected):
    got = _facts.code_for(capability, built)
    assert got.startswith(expected)
    if "no code" in got:
        assert got.endswith("build it with TORCH_CUDA_ARCH_LIST={}.{}".format(*capability))


def test_cuda_of_a_machine_with_gpus(monkeypatch):
    driver = gpus.Driver("570.1", (gpus.Gpu("A GPU", (9, 0), 80), gpus.Gpu("Another", (7, 5), 16)))
    monkeypatch.setattr(gpus, "driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    library = {"built": {"cuda": "sm_80 sm_90", "toolkit": "13.0"}}
    cuda = _facts._cuda(library)
    lines = dict(_text._cuda(cuda))
    assert lines["CUDA kernels"] == "sm_80 sm_90"
    assert lines["CUDA runtime"] == "13.0, linked in; driver 580 or newer"
    assert lines["driver"] == "570.1: older than 580, so the kernels do not run"
    assert lines["GPU"].startswith("Another, sm_75, 16 GiB: runs nothing")
    cpu = {"level": "avx2", "half_products": []}
    ways = _operators.ways(cpu, cuda)
    assert ways["linear_cross_entropy"] == {
        "cpu": "avx2 kernels, products by PyTorch, bfloat16 and float16 in float32",
        "cuda": "CUDA kernels (sm_80 sm_90), products by PyTorch",
    }
    assert ways["packed_rows"]["cpu"] == "integers: one kernel for every processor"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _operators.ways(cpu, cuda)["packed_rows"]["cuda"].endswith(
        "has no CUDA to give it tensors"
    )


def test_why_a_level(monkeypatch):
    name = _facts.LEVEL
    monkeypatch.setattr(_facts.platform, "machine", lambda: "x86_64")
    level = torch.ops.masked_loss_ext.cpu_capability()
    for asked, why in [
        ("", "the best of this processor"),
        (level, f"{name} asks for it"),
        ("avx1024", f"{name} asks for avx1024, this processor has no more"),
    ]:
        monkeypatch.setenv(name, asked)
        assert _facts._level()["level_because"] == why
    monkeypatch.setattr(_facts.platform, "machine", lambda: "aarch64")
    assert "the only one" in _facts._level()["level_because"]


def test_half_products_are_those_that_the_library_takes():
    assert set(torch.ops.masked_loss_ext._half_products().split()) <= {"bfloat16", "float16"}


# --- what is private -----------------------------------------------------------------------------


def test_paths_are_cut(monkeypatch):
    monkeypatch.setenv("HOME", "/people/alice")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: pwd.struct_passwd(("alice",) + ("",) * 6))
    shown = _privacy.shown
    assert shown(f"{sources.PACKAGE}/_C.abi3.so") == "masked_loss_ext/_C.abi3.so"
    assert shown("/people/alice/.cache/x/_C.so is damaged") == "~/.cache/x/_C.so is damaged"
    assert shown("/people/alice2/secret/x/_C.so") == ".../x/_C.so"
    assert shown("in /scratch/alice/x.so, or /usr/bin/g++") == "in .../USER/x.so, or /usr/bin/g++"
    assert shown("/alice: full") == ".../USER: full"
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user without a name
    monkeypatch.setenv("HOME", "/")
    assert shown("/people/alice/x") == ".../alice/x" and shown("a/b 1/2") == "a/b 1/2"


def test_unknown_values_of_settings_are_not_repeated(monkeypatch):
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "a-secret")
    assert _facts._setting("MASKED_LOSS_EXT_CUDA") == "not one of auto, 1, 0"
    assert set(toolchain.SETTINGS) >= set(_facts.collect()["settings"])
