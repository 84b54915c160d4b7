# SPDX-License-Identifier: BSD-3-Clause
"""Builds that are stopped or cut off: nothing half-built stays, and the next one is whole.

A builder that is killed outright, and its linker goes on: test_files.py.
"""

import os
import signal
import subprocess
import time

import pytest
import tiny_build

from masked_loss_ext.build import files, sources

# Compiles after it has written half an object and waited, the first time.
SLOW_COMPILER = """#!/bin/sh
case " $* " in
  *" -c "*)
    if mkdir "$MARKS/started" 2>/dev/null; then
      for out do :; done
      echo half > "$out"
      exec sleep 60
    fi;;
esac
exec g++ "$@"
"""
# Killed at its first file, as a system without memory does.
KILLED_COMPILER = """#!/bin/sh
case " $* " in
  *" -c "*)
    if mkdir "$MARKS/killed" 2>/dev/null; then
      for out do :; done
      echo half > "$out"
      kill -9 $$
    fi;;
esac
exec g++ "$@"
"""


@pytest.fixture
def tree(tmp_path):
    tiny_build.make_tree(tmp_path)
    (tmp_path / "marks").mkdir()
    return tmp_path


def settings(tree, text):
    compiler = tree / "compiler"
    compiler.write_text(text)
    compiler.chmod(0o755)
    # One file after another, so that the first is known.
    return {"CXX": str(compiler), "MARKS": str(tree / "marks"), "MAX_JOBS": "1"}


def build(tree, **environment):
    process = tiny_build.start(tree, **environment)
    said = process.communicate(timeout=120)[0]
    return process.returncode, said


def check_next_build(tree, **environment):
    """It is whole, and says nothing of what was before."""
    library = tree / "built" / sources.LIBRARY
    assert not library.exists()
    code, said = build(tree, **environment)
    assert code == 0 and said.splitlines()[-1] == sources.LIBRARY, said
    assert files.is_whole(library)
    assert not list(library.parent.rglob("*.part")) and not list(tree.rglob("alone-*"))


def children_of(group):
    """Processes of a group that are not ended."""
    said = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True)
    return [state for state in said.stdout.split() if not state.startswith("Z")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_builder_that_is_stopped(tree, how):
    """With all that it started, as a terminal or a job scheduler does."""
    environment = settings(tree, SLOW_COMPILER)
    process = subprocess.Popen(
        tiny_build.command(tree),
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tree / "marks" / "started").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    check_next_build(tree, **environment)
    assert not children_of(process.pid)


def test_a_compiler_that_is_killed(tree):
    environment = settings(tree, KILLED_COMPILER)
    code, said = build(tree, **environment)
    last = said.splitlines()[-1]
    assert code == 1 and last.startswith("BuildError: the compiler was killed in "), said
    assert "MAX_JOBS=1 compiles one file at a time" in last and "Traceback" not in said
    check_next_build(tree, **environment)


@pytest.mark.parametrize("kilobytes", [0, 1, 4, 8])
def test_files_that_may_not_grow(tree, kilobytes):
    """A limit for files, which the linker, the compiler or we meet first, each in another way."""
    limited = ["sh", "-c", f'ulimit -f {2 * kilobytes}; exec "$@"', "sh", *tiny_build.command(tree)]
    done = subprocess.run(limited, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("BuildError: ") and tiny_build.ADVICE in last, done.stderr
    assert str(tree / "built") in last
    assert "File too large" in last or "File size limit exceeded" in last
    check_next_build(tree)
