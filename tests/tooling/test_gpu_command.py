# SPDX-License-Identifier: BSD-3-Clause
"""``make gpu`` rehearsed without a GPU: its steps, its clock, and what it reads from the logs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report, targets
from tools.gpu import __main__ as command
from tools.gpu import about, reading, steps, summary

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["build", "questions", "tests", "sanitizer", "benchmarks"]

PYTEST = """
tests/test_a.py::test_b[x] PASSED [ 50%]
=========================== short test summary info ============================
SKIPPED [1] tests/cuda/test_questions.py:9: one GPU
2 failed, 3456 passed, 12 skipped, 1 warning in 101.53s (0:01:41)
"""
QUESTIONS = """
tests/cuda/test_questions.py::test_own_stream PASSED                     [ 20%]
tests/cuda/test_questions.py::test_second_device SKIPPED (one GPU here) [ 40%]
tests/cuda/test_questions.py::test_capture[squared error] PASSED         [ 60%]
tests/cuda/test_questions.py::test_capture[cross entropy] FAILED         [ 80%]
tests/cuda/test_questions.py::test_failing_launch ERROR                  [100%]
"""
MEMCHECK = """
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """
========= COMPUTE-SANITIZER
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
BUILD = "masked_loss_ext: compiled in 61 s\nlibrary: aot 0.1.0\n"


def test_totals_of_pytest():
    totals = "2 failed, 3456 passed, 12 skipped, 1 warning in 102 s"
    assert reading.pytest_line(PYTEST) == totals
    assert reading.pytest_line("1 passed in 0.50s") == "1 passed in 0 s"
    assert reading.pytest_line("collecting ...") == "no total: it did not finish"


def test_answers_to_the_questions():
    assert reading.questions_line(QUESTIONS) == (
        "own_stream 1 yes; second_device not asked (one GPU here); "
        "capture 1 yes, 1 NO (cross entropy); failing_launch 1 NO (it)"
    )
    assert reading.questions_line("") == "no answers"


def test_totals_of_the_sanitizer():
    assert reading.sanitizer_line("memcheck", MEMCHECK) == "memcheck 3 errors"
    assert reading.sanitizer_line("racecheck", RACECHECK) == "racecheck 2 hazards, 1 errors"
    none = "========= ERROR SUMMARY: 0 errors"
    assert reading.sanitizer_line("synccheck", none) == "synccheck 0 errors"
    assert reading.sanitizer_line("synccheck", "Killed") == "synccheck no summary"


def test_what_became_of_the_build():
    assert reading.compiled_line(BUILD) == "library aot 0.1.0, compiled in 61 s"
    assert reading.compiled_line("nvcc: error") == "no library that can be loaded"


def figure(**values):
    row = dict.fromkeys(report.COLUMNS, "") | {"case": "forward", "role": "floor"}
    return row | {"contender": "one read"} | values


def test_a_share_of_a_floors_bandwidth():
    (met,) = targets.verdicts_of(figure(distance="1.04", target=str(1 / 0.95), met="yes"))
    assert met.text() == "forward 96.2 % of one read (>= 95 wanted): met"
    (missed,) = targets.verdicts_of(figure(distance="1.25", target=str(1 / 0.9), met="no"))
    assert missed.text() == "forward 80.0 % of one read (>= 90 wanted): missed by 11.1%"


def test_a_rival_and_a_time():
    row = figure(role="rival", contender="compile", ratio_of_medians="1.5", target="2", met="no")
    assert targets.lines_of([row]) == ["forward 1.50x compile (>= 2 wanted): missed by 25.0%"]
    row = figure(role="ours", contender="ours", median_us="80", time_limit_us="60", time_met="no")
    assert targets.lines_of([row]) == ["forward 80.0 us of time (<= 60 wanted): missed by 25.0%"]
    assert targets.lines_of([figure(), figure(role="rival", ratio_of_medians="3")]) == []


def outcome(text="", status="ok", seconds=10.0):
    return reading.Outcome(("python", "-m", "pytest"), status, seconds, text)


def test_the_summary_has_ten_lines_at_most(tmp_path):
    rows = [
        figure(distance="1.04", target="1.06", met="yes"),
        figure(distance="1.25", target="1.11", met="no"),
    ]
    report.write_csv(tmp_path / steps.FIGURES, rows)
    outcomes = {
        "build": [outcome(), outcome(BUILD, seconds=60)],
        "questions": [outcome(QUESTIONS, "failed (1)")],
        "tests": [outcome(PYTEST, "failed (1)"), outcome("", "no time left", 0)],
        "sanitizer": [outcome(MEMCHECK, "failed (86)"), outcome("", "missing: pytest", 0)],
    }
    lines = summary.lines_of(["H100, 580"], outcomes, tmp_path, 400)
    assert len(lines) <= 10
    assert lines[0] == "GPU: H100, 580"
    assert lines[1] == "build: library aot 0.1.0, compiled in 61 s, 70 s"
    assert lines[3].endswith("no total: it did not finish (failed (1), no time left), 10 s")
    assert lines[4].startswith("sanitizer: memcheck 3 errors, racecheck no summary (failed (86)")
    assert lines[5] == "benchmarks: not run"
    assert lines[6] == "targets: 1 met, 1 missed"
    assert lines[7].startswith("missed: forward 80.0 % of one read")
    assert lines[-1].startswith("400 s in all")


def test_the_summary_of_nothing_says_so(tmp_path):
    lines = summary.lines_of([], {}, tmp_path, 0)
    assert lines[0] == "GPU: none" and lines[1] == "build: not run"
    assert "no figures were written" in lines[-2]


# --- steps ---------------------------------------------------------------------------------------


def test_steps_in_the_order_they_are_run(tmp_path):
    made = steps.all_steps(tmp_path, 16)
    assert [step.name for step in made] == STEPS
    assert sum(step.seconds for step in made) <= command.BUDGET_S < 8 * 60
    logs_and_others = len(made) + len(["figures.csv", "summary.txt"])
    assert logs_and_others <= 8


def test_every_file_that_a_step_names_is_there(tmp_path):
    for step in steps.all_steps(tmp_path, 2):
        for one in step.commands:
            for word in one.line:
                name = word.removeprefix("--ignore=")
                if name.startswith("tests/"):
                    assert (ROOT / name).is_file(), name
    large, many = steps.all_steps(tmp_path, 2)[2].commands
    assert large.environment == {"REQUIRE_CUDA": "1"}
    assert many.environment == {"REQUIRE_CUDA": "only"}
    assert "tests/cuda/test_large.py" in large.line and "tests/cuda/test_large.py" not in many.line
    for name in ("cross_entropy/test_values.py", "cuda/test_kernels.py", "cuda/test_calls.py"):
        assert f"tests/{name}" in many.line
    assert not any("test_build" in word or "test_memory" in word for word in many.line)


def test_what_is_missing_is_left_out_by_name(tmp_path):
    def has(module):
        return module not in ("hypothesis", "xdist", "liger_kernel")

    made = {step.name: step for step in steps.all_steps(tmp_path, 16, has, lambda name: None)}
    notes = made["tests"].notes
    assert steps.left_out(steps.TESTS, has)["elementwise/test_mask_laws.py"] == ["hypothesis"]
    assert any("pytest-xdist is missing" in note for note in notes)
    assert "-n" not in made["tests"].commands[-1].line
    assert [one.missing for one in made["sanitizer"].commands] == ["compute-sanitizer"] * 3
    assert made["benchmarks"].notes[0] == "rival left out: liger-kernel missing"
    without = steps.all_steps(tmp_path, 16, lambda module: module != "pytest")
    assert {one.missing for step in without[1:4] for one in step.commands} >= {"pytest"}


def test_only_what_a_file_imports_at_once_can_be_missing(tmp_path):
    (tmp_path / "test_a.py").write_text("import torch, apes\nfrom bees.wax import x\n")
    (tmp_path / "test_b.py").write_text("def f():\n    import apes\nfrom . import y\nimport beside")
    (tmp_path / "beside.py").touch()
    found = steps.left_out(tmp_path, lambda module: module == "torch")
    assert found == {"test_a.py": ["apes", "bees"]}


def test_results_have_a_place(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    gpus = ["NVIDIA H100 80GB HBM3, 580.1, 81559 MiB"]
    place = command.results_folder(None, gpus)
    assert place == ROOT / "benchmarks" / "results" / "nvidia_h100_80gb_hbm3"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert command.results_folder(None, gpus) == tmp_path
    assert command.results_folder(Path("here"), gpus) == Path("here")
    assert about.folder_name([]) == "no_gpu"


# --- time ----------------------------------------------------------------------------------------


def made_step(name, seconds, commands=1):
    return steps.Step(name, "", seconds, [steps.Command(["true"])] * commands)


def test_a_step_leaves_the_later_ones_their_seconds():
    made = [made_step("a", 100), made_step("b", 50), made_step("c", 50)]
    assert command.deadlines(made, 1000, 400) == [1300, 1350, 1400]
    assert command.deadlines(made, 0, 100) == [50, 75, 100]


def test_a_command_leaves_the_later_ones_of_its_step_some(tmp_path):
    given, clock = [], [0.0]

    def run(one, seconds, log):
        given.append(seconds)
        clock[0] += seconds
        return outcome()

    command.run_step(made_step("a", 60, 3), 60, tmp_path / "log", run, lambda: clock[0])
    assert given[0] == 40 and given[1] == 15 and given[2] == 5


@pytest.fixture
def log(tmp_path):
    return tmp_path / "step.log"


@pytest.fixture
def run(log):
    def run(line, seconds=60, **more):
        return command.run_command(steps.Command(line, **more), seconds, log)

    return run


def test_a_command_that_fails_is_told(run, log):
    done = run(["sh", "-c", "echo hello $WORD; exit 3"], environment={"WORD": "there"})
    assert (done.status, done.text) == ("failed (3)", "hello there\n")
    assert run(["true"]).status == "ok"
    assert "$ WORD=there sh -c" in log.read_text() and "$ true" in log.read_text()


def test_a_command_is_ended_with_all_that_it_started(run, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "LEAST_S", 0)
    flag = tmp_path / "survived"
    script = f"(sleep 2; touch {flag}) & echo begun; sleep 60"
    done = run(["sh", "-c", script], 0.5)
    assert done.status.startswith("out of time") and done.text == "begun\n"
    left = subprocess.run(["pgrep", "-f", str(flag)], capture_output=True, text=True)
    assert left.stdout == ""


def test_a_command_that_cannot_run_is_named(run, log):
    assert run(["no"], missing="compute-sanitizer").status == "missing: compute-sanitizer"
    assert run(["no"], 1).status == "no time left"
    assert not log.exists()


# --- the whole of it -----------------------------------------------------------------------------


def test_a_dry_run_goes_through_every_step(tmp_path, capsys):
    assert command.main(["--dry-run", "--results", str(tmp_path / "made")]) == 0
    said = capsys.readouterr().out
    for name in STEPS:
        assert f"\n{name}: " in said
    assert "compute-sanitizer --tool racecheck" in said and "-m benchmarks gpu --csv" in said
    assert not (tmp_path / "made").exists()


def test_without_a_gpu_nothing_is_begun(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(about, "gpu_lines", lambda: [])
    assert command.main(["--results", str(tmp_path / "made")]) == 1
    assert "no GPU is found" in capsys.readouterr().out and not (tmp_path / "made").exists()


def test_a_whole_run_goes_on_when_a_step_fails(monkeypatch, tmp_path, capsys):
    made = [
        steps.Step("build", "", 5, [steps.Command(["sh", "-c", "echo library: aot 0.1.0"])]),
        steps.Step("questions", "", 5, [steps.Command(["false"])]),
        steps.Step("tests", "", 5, [steps.Command(["no-such-program"])], ["a note"]),
        steps.Step("benchmarks", "", 5, [steps.Command(["x"], missing="torch")]),
    ]
    monkeypatch.setattr(about, "gpu_lines", lambda: ["Abacus, 1.0, 2 beads"])
    monkeypatch.setattr(command, "all_steps", lambda *_: made)
    assert command.main(["--results", str(tmp_path)]) == 1
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert capsys.readouterr().out.endswith("\n".join(lines) + "\n")
    assert lines[1].startswith("build: library aot 0.1.0, ")
    assert lines[2].startswith("questions: no answers (failed (1)), ")
    assert "failed (cannot be started" in lines[3]
    assert lines[5].startswith("benchmarks: 1 run (missing: torch)")
    assert (tmp_path / "tests.log").read_text().startswith("a note\n")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_gpu_takes_the_python_that_is_there():
    line = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", "ARGS=--dry-run"]
    done = subprocess.run([*line, "VENV=no/such"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "results would go to" in done.stdout
