# SPDX-License-Identifier: BSD-3-Clause
"""The build's files, which other processes meet at any moment and other users may reach.

A file that is read elsewhere appears under its name whole. One builder at a time works in a folder,
and what it starts counts as the builder. What others can write to is not trusted.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import struct
import tempfile
from pathlib import Path

from .toolchain import BuildError, say

# What file systems without locks answer; some of those that hold homes are.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
GROUP_AND_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def sentence(error, place):
    """An OSError without its number: which file, and why."""
    name = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else place
    return f"{os.fsdecode(name)}: {error.strerror or error}"


@contextlib.contextmanager
def told_in_a_sentence(folder, advice):
    """Every OSError of the block as a BuildError that names the folder and what to do."""
    try:
        yield
    except OSError as error:
        what = sentence(error, folder)
        where = "" if str(folder) in what else f" in {folder}"
        raise BuildError(f"the kernels cannot be compiled{where}, {what}; {advice}") from None


def make_folder(folder):
    """With its parents, for its owner alone to write to: a umask of 0 would let everyone."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o755)
    if not folder.is_dir():  # a file, or a link to nowhere, has that name
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


@contextlib.contextmanager
def appearing_whole(path, mode=0o644):
    """A binary file to write, under a name of this process alone until it takes path's place."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(partial, new, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a crash could leave the name and no content
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_if_changed(path, text):
    data = os.fsencode(text)  # paths in it need not be UTF-8
    if not path.is_file() or path.read_bytes() != data:
        with appearing_whole(path) as file:
            file.write(data)


def copy_whole(source, target):
    """Under a new inode: a process that has the old file mapped keeps it."""
    with open(source, "rb") as old, appearing_whole(target, 0o755) as new:
        shutil.copyfileobj(old, new, 1 << 20)


def is_whole(library):
    """Is this all of a 64-bit ELF file? Mapping one that was cut short kills the process."""
    with open(library, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(64)
        if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
            return False
        program_at, section_at = struct.unpack_from("<QQ", head, 32)
        entry, count, section_entry, sections = struct.unpack_from("<4H", head, 54)
        if entry != 56 or section_at + section_entry * sections > size:
            return False
        file.seek(program_at)
        table = file.read(entry * count)
    if len(table) < entry * count:
        return False
    rows = [struct.unpack_from("<QQQQ", table, 8 + entry * i) for i in range(count)]
    return all(offset + in_file <= size for offset, _, _, in_file in rows)


@contextlib.contextmanager
def locked(folder):
    """One builder per folder. Yields a descriptor, or None on a file system without locks.

    The programs that the builder starts inherit it: where they outlive a builder that was killed,
    they hold the lock until the last has ended.
    """
    opened = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        # Not 0, 1 or 2, which a process with a closed stream gets: programs have others there.
        lock = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(opened)
    try:
        held = _lock(lock, folder)
        yield lock if held else None
        # In words: a server that a compiler's wrapper has left running inherited it too.
        if held:
            fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)


def _lock(lock, folder):
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is compiling the kernels in {folder}, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"WARNING: {folder} has no file locks, so every process that comes now compiles alone")
        return False
    return True


@contextlib.contextmanager
def workshop(folder):
    """(where to compile, the lock that programs inherit): folder itself, kept, if it can be locked,
    else a folder in it of this process alone."""
    with locked(folder) as lock:
        if lock is None:
            with tempfile.TemporaryDirectory(prefix="alone-", dir=folder) as alone:
                yield Path(alone), None
            return
        for left in folder.glob("*.part"):  # by builders that were killed
            left.unlink(missing_ok=True)
        yield folder, lock


def distrust(path):
    """Why what lies at path could be the work of another user; None where it could not.

    The administrator's work is trusted; a link is not followed.
    """
    about = os.lstat(path)
    if stat.S_ISLNK(about.st_mode):
        return f"{path} is a link"
    if about.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {about.st_uid}"
    if about.st_mode & GROUP_AND_OTHERS_WRITE:
        return f"{path} can be written to by others (mode {stat.S_IMODE(about.st_mode):o})"
    return None


def distrust_around(root):
    """As distrust, of a folder whose entries are looked at one by one, and of those above it: links
    and groups will do. Where everyone may rename the entries, no look is worth anything."""
    real = Path(os.path.realpath(root))
    for place in dict.fromkeys((root, *root.parents, real, *real.parents)):
        mode = os.stat(place).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"{place} can be written to by others (mode {stat.S_IMODE(mode):o})"
    return None
