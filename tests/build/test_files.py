# SPDX-License-Identifier: BSD-3-Clause
"""The build's files: file systems that refuse, builders that are killed, what others may write."""

import errno
import fcntl
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_build

from masked_loss_ext.build import files, ninja, sources, toolchain
from masked_loss_ext.build.toolchain import BuildError

# Slow where it links, and says so; what it leaves meanwhile is half a library.
SLOW_LINKER = """#!/bin/sh
case " $* " in
  *" -shared "*)
    if mkdir "$MARKS/started" 2>/dev/null; then
      for out do :; done
      echo half > "$out"
      sleep 2
      touch "$MARKS/ended"
    fi;;
esac
exec g++ "$@"
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "0")
    tiny_build.reduce(sources, tiny_build.make_tree(tmp_path), monkeypatch.setattr)
    return tmp_path


def compiled(tree, **keywords):
    folder = tree / "built"
    return ninja.compile_library(
        toolchain.find_toolchain(), folder, advice=tiny_build.ADVICE, **keywords
    )


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 400, text
    return text


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("place", ["file", "link to nowhere", "folder's name taken"])
def test_a_folder_that_cannot_be_made(tree, place):
    if place == "file":
        (tree / "taken").touch()
        folder = tree / "taken" / "cache"
    else:
        folder = tree / "taken"
        folder.symlink_to(tree / "nowhere") if place.startswith("link") else folder.touch()
    with pytest.raises(BuildError) as error:
        ninja.compile_library(toolchain.find_toolchain(), folder, advice=tiny_build.ADVICE)
    text = one_sentence(error)
    assert str(tree / "taken") in text and "Not a directory" in text
    assert text.endswith(tiny_build.ADVICE)


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_every_error_of_the_file_system_is_a_sentence(tree, monkeypatch, call, number):
    tools = toolchain.find_toolchain()
    folder = tree / "made" / "built"

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, call, fails)
    with pytest.raises(BuildError) as error:
        ninja.compile_library(tools, folder, advice=tiny_build.ADVICE)
    monkeypatch.undo()
    text = one_sentence(error)
    assert str(folder) in text and os.strerror(number) in text and tiny_build.ADVICE in text
    assert not list(tree.rglob("*.part")) and not list(tree.rglob(sources.LIBRARY))


def on_tmpfs(folder, options, command):
    """Run a command where `folder` is a small file system of its own."""
    folder.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o {options} tmpfs {folder} || exit 77; exec "$@"'
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare is missing, so no file system is mounted here")
    line = [unshare, "-m", "sh", "-c", script, "sh", *command]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    return done


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("size=4k", "No space left on device"),  # not even the list of steps
        ("size=20k", "No space left on device"),  # the compiler, or the linker
        ("nr_inodes=5", "No space left on device"),
        ("ro", "Read-only file system"),
    ],
)
def test_a_file_system_without_room(tree, options, reason):
    folder = tree / "built"
    done = on_tmpfs(folder, options, tiny_build.command(tree))
    (text,) = [line for line in done.stderr.splitlines() if line.startswith("BuildError")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == text  # a sentence, and nothing after it
    assert str(folder) in text and reason in text and tiny_build.ADVICE in text


@pytest.mark.parametrize(
    ("options", "reason"), [("size=4k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_import_with_a_cache_that_takes_nothing(tmp_path, options, reason):
    command = ["env", "MASKED_LOSS_EXT_JIT=1", f"TORCH_EXTENSIONS_DIR={tmp_path / 'cache'}"]
    command += [f"PYTHONPATH={sources.PACKAGE.parent}", sys.executable, "-c"]
    done = on_tmpfs(tmp_path / "cache", options, [*command, "import masked_loss_ext"])
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: masked_loss_ext: the kernels cannot be compiled")
    assert str(tmp_path / "cache") in last and reason in last
    assert "set TORCH_EXTENSIONS_DIR to a folder" in last
    assert len(done.stderr.splitlines()) < 15, done.stderr


def test_no_locks_on_the_file_system(tree, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    library = compiled(tree)
    assert files.is_whole(library)
    said = capsys.readouterr().err
    assert f"WARNING: {library.parent} has no file locks" in said
    # What it compiled alone is gone.
    assert sorted(p.name for p in library.parent.iterdir()) == [sources.LIBRARY, "lock"]


def test_another_error_of_a_lock_is_not_no_lock(tree, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(BuildError, match="Input/output error"):
        compiled(tree)


def wait_for(path, process):
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    pytest.fail(f"{path} has not come")


def test_a_killed_builder_leaves_its_lock_to_its_linker(tmp_path):
    tiny_build.make_tree(tmp_path)
    marks = tmp_path / "marks"
    marks.mkdir()
    settings = {"CXX": program(tmp_path / "slow-g++", SLOW_LINKER), "MARKS": str(marks)}
    first = tiny_build.start(tmp_path, **settings)
    wait_for(marks / "started", first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    library = tmp_path / "built" / sources.LIBRARY
    assert not library.exists()

    second = tiny_build.start(tmp_path, **settings)
    said = second.communicate()[0]
    assert second.returncode == 0, said
    assert "another process is compiling the kernels in" in said
    assert (marks / "ended").exists(), "the second builder did not wait for the first's linker"
    assert files.is_whole(library)
    assert not list(library.parent.glob("*.part"))


def test_a_server_of_the_compiler_does_not_keep_the_lock(tmp_path):
    """As compiler caches start them: it outlives the build and has inherited all of its files."""
    tiny_build.make_tree(tmp_path)
    text = f'#!/bin/sh\nsleep 30 >/dev/null 2>&1 & echo $! >> "{tmp_path}/servers"\nexec g++ "$@"\n'
    try:
        for _ in range(2):
            (tmp_path / "csrc" / "cpu" / "one.cpp").touch()
            done = tiny_build.start(tmp_path, CXX=program(tmp_path / "served-g++", text))
            said = done.communicate()[0]
            assert done.returncode == 0 and "waiting for it" not in said, said
    finally:
        for number in (tmp_path / "servers").read_text().split():
            os.kill(int(number), signal.SIGKILL)


def test_a_library_that_was_cut_short_is_made_again(tree):
    library = compiled(tree)
    whole = library.read_bytes()
    linked = library.with_name(ninja.LINKED)
    for damaged in [(library,), (linked,), (library, linked)]:
        for path in damaged:
            os.truncate(path, 5000)
        assert not files.is_whole(damaged[0])
        assert compiled(tree) == library
        assert library.read_bytes() == whole, damaged


def test_a_linker_that_makes_no_library_is_an_error(tree, monkeypatch):
    text = '#!/bin/sh\nfor out do :; done\ncase " $* " in *" -shared "*) echo no > "$out";;\n'
    text += '*) exec g++ "$@";; esac\n'
    monkeypatch.setenv("CXX", program(tree / "wrong-g++", text))
    with pytest.raises(BuildError, match="the linker has made no whole library") as error:
        compiled(tree)
    assert str(tree / "built") in one_sentence(error)
    assert not (tree / "built" / sources.LIBRARY).exists()


def test_whole_and_cut_files(tmp_path):
    python = Path(os.path.realpath(sys.executable)).read_bytes()
    cut = [python[:size] for size in (0, 10, 63, 64, 4096, len(python) // 2, len(python) - 1)]
    for content in [*cut, bytes(5000), b"text\n" * 1000, b"\x7fELF\2\1" + b"\xff" * 500]:
        (tmp_path / "file").write_bytes(content)
        assert not files.is_whole(tmp_path / "file"), len(content)
    (tmp_path / "file").write_bytes(python)
    assert files.is_whole(tmp_path / "file")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "name"
    path.write_bytes(b"before")
    with files.appearing_whole(path) as one, files.appearing_whole(path) as other:
        assert one.name != other.name
        one.write(b"half")
        assert path.read_bytes() == b"before"
    with pytest.raises(KeyboardInterrupt), files.appearing_whole(path) as file:
        file.write(b"more")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["name"]


def test_others_cannot_write_to_what_is_made(tree):
    before = os.umask(0)
    try:
        (tree / "home").mkdir()
        folder = tree / "home" / "cache" / "extensions" / "built"
        ninja.compile_library(toolchain.find_toolchain(), folder)
    finally:
        os.umask(before)
    made = [p for p in (tree / "home").rglob("*")]
    assert {sources.LIBRARY, "lock", "cpu", "one.cpp.o", "cache"} <= {p.name for p in made}
    open_to_others = stat.S_IWGRP | stat.S_IWOTH
    assert not [p for p in made if p.stat().st_mode & open_to_others]


def test_a_strict_umask_is_kept(tree):
    before = os.umask(0o077)
    try:
        library = compiled(tree)
    finally:
        os.umask(before)
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(library.stat().st_mode) == 0o700


def test_a_cut_file_without_sections(tmp_path):
    """Tools that shrink libraries take the table of sections away, which ends a linker's file."""
    file, size = tmp_path / "file", 120 + 40  # a header, one segment's entry, what is loaded
    head = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHIQQQI", 3, 62, 1, 0, 64, 0, 0)
    head += struct.pack("<6H", 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, 0, 0, 40, 40, 4096)
    for length in (size - 1, size):
        file.write_bytes((head + segment + bytes(40))[:length])
        assert files.is_whole(file) == (length == size)
