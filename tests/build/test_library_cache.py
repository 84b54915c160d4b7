# SPDX-License-Identifier: BSD-3-Clause
"""The library that the first import compiles: when it is another one, and when it is trusted."""

import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_build

from masked_loss_ext.build import files, loading, sources, toolchain
from masked_loss_ext.build.toolchain import BuildError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The root of a cache of its own; what is compiled into it takes a second."""
    for name in ("CXX", "TORCH_CUDA_ARCH_LIST", *toolchain.SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loading.torch.version, "cuda", None)
    tiny_build.reduce(sources, tiny_build.make_tree(tmp_path), monkeypatch.setattr)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def folder_of(cache):
    (folder,) = loading._cache_folders(cache, sources.source_fingerprint())
    return folder


def refusal(kind=BuildError, call=loading.compile_at_import):
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) < 500, text
    return text


def program(path, text="exit 1"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_compiled_once(cache, capsys):
    library = loading.compile_at_import()
    assert library.parent == folder_of(cache) and library.parent.parent == cache
    assert f"once (kept in {library.parent})" in capsys.readouterr().err
    assert loading.compile_at_import() == library
    assert capsys.readouterr().err == ""


def test_another_compiler_is_another_library(cache, monkeypatch, tmp_path):
    first = program(tmp_path / "12" / "c++", "exec g++ -pipe")
    names = {folder_of(cache).name}
    monkeypatch.setenv("PATH", str(first.parent), prepend=os.pathsep)
    names.add(folder_of(cache).name)
    names.add(folder_of(cache).name)
    program(first, "exec g++ -pipe # the next version")
    names.add(folder_of(cache).name)
    os.utime(first, (0, 0))
    names.add(folder_of(cache).name)
    monkeypatch.setenv("CXX", "c++ -DX")
    names.add(folder_of(cache).name)
    program(tmp_path / "12" / "ccache")
    monkeypatch.setenv("CXX", "ccache c++ -DX")
    names.add(folder_of(cache).name)
    program(first, "exec g++")  # behind ccache
    names.add(folder_of(cache).name)
    assert len(names) == 7


def test_other_gpus_are_another_library(cache, monkeypatch, tmp_path):
    nvcc = program(tmp_path / "toolkit" / "bin" / "nvcc")
    (tmp_path / "toolkit" / "include").mkdir()
    (tmp_path / "toolkit" / "include" / "cuda_runtime.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    without = folder_of(cache)
    assert without == folder_of(cache)
    monkeypatch.setattr(loading.torch.version, "cuda", "13.0")
    monkeypatch.setattr(toolchain.gpus, "capabilities", lambda: "")
    assert folder_of(cache) == without  # a login node
    names = {without.name}
    for gpus in ("8.0", "9.0", "8.0;9.0"):  # an A100 node, an H100 node, both
        monkeypatch.setattr(toolchain.gpus, "capabilities", lambda gpus=gpus: gpus)
        names.add(folder_of(cache).name)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")  # the same, by name
    assert folder_of(cache).name in names and len(names) == 4
    program(nvcc, "echo the next version")
    names.add(folder_of(cache).name)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    names.add(folder_of(cache).name)
    assert len(names) == 6
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "0")
    assert folder_of(cache) == without
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    assert folder_of(cache) == without  # not asked for
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "1")
    assert "TORCH_CUDA_ARCH_LIST must list compute capabilities" in refusal()


def test_without_a_compiler_the_library_is_found(cache, monkeypatch):
    before = refusal_without_compiler(monkeypatch)
    assert "no C++ compiler is found" in before
    library = loading.compile_at_import()
    monkeypatch.setenv("PATH", "")
    assert loading.compile_at_import() == library


def refusal_without_compiler(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        return refusal()


def test_a_damaged_or_foreign_library_is_compiled_again(cache, capsys):
    library = loading.compile_at_import()
    whole = library.read_bytes()
    python = Path(os.path.realpath(sys.executable)).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-1], bytes(len(whole)), python):
        library.write_bytes(content)
        capsys.readouterr()
        assert loading.compile_at_import() == library
        assert library.read_bytes() == whole
        assert f"{library} is damaged or of another program" in capsys.readouterr().err


def test_a_library_that_cannot_be_loaded_is_named(cache, tmp_path):
    library = loading.compile_at_import()
    other = tmp_path / "not-loadable.so"
    shutil.copy(library, other)
    data = other.read_bytes()
    # Whole, and of a machine that nobody has (EM_NONE).
    other.write_bytes(data[:18] + b"\0\0" + data[20:])
    text = refusal(call=lambda: loading._register(other, "reinstall it"))
    assert text.startswith(f"{other} cannot be loaded (") and text.endswith("; reinstall it")


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_folder_that_others_can_write_to_is_not_trusted(cache, mode):
    library = loading.compile_at_import()
    for path in (library.parent, library):
        path.chmod(mode)
        text = refusal()
        assert text.startswith(f"{path} can be written to by others (mode {mode:o}), so no kernels")
        assert "set TORCH_EXTENSIONS_DIR to a folder with room that only you" in text
        path.chmod(0o755)
        assert loading.compile_at_import() == library


def test_a_root_where_everyone_may_rename_is_not_trusted(cache):
    cache.chmod(0o777)
    assert refusal().startswith(f"{cache} can be written to by others (mode 777)")
    assert list(cache.iterdir()) == []
    for mode in (0o1777, 0o775, 0o755):  # as /tmp is; a team's, whose entries are looked at
        cache.chmod(mode)
        assert loading.compile_at_import().parent.parent == cache


def test_a_folder_above_where_everyone_may_rename_is_not_trusted(cache, monkeypatch, tmp_path):
    """Who may rename the cache puts another in its place, after it was looked at."""
    for above in (tmp_path / "open", tmp_path / "open" / "disk"):
        (tmp_path / "open" / "disk" / "cache").mkdir(parents=True, exist_ok=True)
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "open" / "disk" / "cache")
        for named in (tmp_path / "open" / "disk" / "cache", link):
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(named))
            above.chmod(0o777)
            assert refusal().startswith(f"{above} can be written to by others (mode 777)")
            assert list(named.iterdir()) == []
            above.chmod(0o1777)
            assert loading.compile_at_import().parent.parent == named
            shutil.rmtree(loading.compile_at_import().parent)
        above.chmod(0o755)


def test_links_in_the_cache_are_not_followed(cache, tmp_path):
    library = loading.compile_at_import()
    shutil.move(library, tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    assert refusal().startswith(f"{library} is a link, so no kernels are taken from it")
    library.unlink()
    shutil.move(library.parent, tmp_path / "elsewhere")
    library.parent.symlink_to(tmp_path / "elsewhere")
    assert refusal().startswith(f"{library.parent} is a link")
    # But the cache itself may be one, to a larger disk.
    shutil.rmtree(cache)
    (tmp_path / "disk").mkdir()
    cache.symlink_to(tmp_path / "disk")
    assert loading.compile_at_import().is_file()


def test_a_lock_that_is_a_link_is_not_followed(cache, tmp_path):
    library = loading.compile_at_import()
    library.unlink()
    lock = library.parent / "lock"
    lock.unlink()
    lock.symlink_to(tmp_path / "precious")
    assert str(lock) in refusal()
    assert not (tmp_path / "precious").exists()


def test_another_users_folder_is_not_trusted(cache, monkeypatch):
    library = loading.compile_at_import()
    for path in (library.parent, library):
        if os.geteuid() == 0:
            os.chown(path, 12345, -1)
            owner = 12345
        else:
            owner = os.geteuid()
            monkeypatch.setattr(files.os, "geteuid", lambda other=owner + 1: other)
        assert refusal().startswith(f"{path} belongs to user {owner}, so no kernels are taken")
        if os.geteuid() == 0:
            os.chown(path, 0, -1)


def test_no_home_and_no_name_of_the_user(monkeypatch):
    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    expected = f"user {os.geteuid()} has no home folder .* set TORCH_EXTENSIONS_DIR to a folder"
    assert re.match(expected, refusal())
    for home in ("", "relative"):
        monkeypatch.setenv("HOME", home)
        assert re.match(expected, refusal(call=loading.cache_root)), home
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert loading.cache_root() == Path("/caches/torch_extensions")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/named")
    assert loading.cache_root() == Path("/named")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home-of/one")
    assert loading.cache_root() == Path("/home-of/one/.cache/torch_extensions")


@pytest.mark.parametrize("place", ["below a file", "a file", "a link to nowhere"])
def test_import_with_a_cache_that_cannot_be(tmp_path, place):
    taken = tmp_path / "taken"
    taken.symlink_to(tmp_path / "nowhere") if "link" in place else taken.touch()
    named = taken / "cache" if "below" in place else taken
    done = subprocess.run(
        [sys.executable, "-c", "import masked_loss_ext"],
        env={**os.environ, "MASKED_LOSS_EXT_JIT": "1", "TORCH_EXTENSIONS_DIR": str(named)},
        cwd=sources.PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: masked_loss_ext: ") and str(taken) in last
    assert "Not a directory; set TORCH_EXTENSIONS_DIR to a folder" in last
    assert len(done.stderr.splitlines()) < 15, done.stderr


def test_an_error_of_the_file_system_while_loading(monkeypatch):
    def fails(library):
        raise PermissionError(13, "Permission denied", str(library))

    monkeypatch.setattr(loading, "_load", lambda _: fails(Path("/a/library")))
    text = refusal(ImportError, loading.load)
    assert text == "masked_loss_ext: /a/library: Permission denied"
