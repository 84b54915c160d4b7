# SPDX-License-Identifier: BSD-3-Clause
"""What of a path a stranger may read."""

import contextlib
import os
import pwd
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PATH = re.compile(r"(?<![\w.~/])/[^\s:;,()'\"]+")
OF_EVERYONE = re.compile(r"/(usr|lib|lib64|bin|etc|proc|sys|dev)(/|$)")


def shown(text: str) -> str:
    """With the package's folder left out, ~ for the home folder, and of other folders the end."""
    text = text.replace(f"{PACKAGE.parent}/", "")
    home = os.path.expanduser("~")
    if os.path.isabs(home) and home != "/":
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return PATH.sub(lambda found: _end(found[0]), text)


def _end(path: str) -> str:
    if OF_EVERYONE.match(path):
        return path
    names = path.strip("/").split("/")
    user = _user_name()
    return ".../" + "/".join("USER" if name == user else name for name in names[-2:])


def _user_name() -> str | None:
    with contextlib.suppress(KeyError):  # a number without a name, as containers give them
        return pwd.getpwuid(os.getuid()).pw_name
    return None
