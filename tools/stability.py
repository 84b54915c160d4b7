# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.stability`` prints what docs/stability.md promises: operators with their
schemas, and public names. ``--write`` writes docs/schemas.txt and the page anew, ``--check``
compares.

A schema that is promised may grow (an argument with a default, at the end) and not otherwise
change: ``--write`` refuses that.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

import masked_loss_ext

from . import documents

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGE, SCHEMAS = DOCS / "stability.md", DOCS / "schemas.txt"
COMMAND = "python -m tools.stability"
NAMESPACE = "masked_loss_ext::"
# Not computations: what the library says of itself.
ASKED = ("cpu_capability",)
MODULES = ("", ".unified", ".distributed", ".diagnostics", ".integrations.transformers")


def registered() -> dict[str, str]:
    """Name -> schema of every operator that is loaded."""
    of = torch._C._jit_get_all_schemas()
    names = {s.name.removeprefix(NAMESPACE): str(s) for s in of if s.name.startswith(NAMESPACE)}
    return dict(sorted(names.items()))


def promised(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("_") and name not in ASKED]


def recorded() -> dict[str, str]:
    lines = SCHEMAS.read_text().splitlines() if SCHEMAS.exists() else []
    return {line.partition("(")[0].removeprefix(NAMESPACE): line for line in lines}


def broken(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Of the operators that were promised before, those that a program made then cannot call."""
    wrong = []
    for name in promised(before):
        if name not in now:
            wrong.append(f"{name} is gone")
        elif not _compatible(now[name], before[name]):
            wrong.append(f"{name} is {now[name]} and was {before[name]}")
    return wrong


def _compatible(now: str, before: str) -> bool:
    return torch._C.parse_schema(now).is_backward_compatible_with(torch._C.parse_schema(before))


def _same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Read, not compared as text, which differs between releases of PyTorch."""
    read = [{n: torch._C.parse_schema(s) for n, s in of.items()} for of in (one, other)]
    return read[0] == read[1]


def operators() -> str:
    now = recorded()
    rows = [["operator", "schema"]]
    rows += [[f"`{name}`", f"`{now[name].removeprefix(NAMESPACE)}`"] for name in promised(now)]
    return documents.markdown(rows)


def private() -> str:
    of = recorded()
    return ", ".join(f"`{name}`" for name in of if name not in promised(of)) + "\n"


def public(module: str) -> list[str]:
    """``__all__``, read from the source: some modules need packages that may be missing."""
    path = ROOT / ("masked_loss_ext" + module.replace(".", "/"))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    raise ValueError(f"{path} has no __all__")


def names() -> str:
    rows = [["module", "names"]]
    for module in MODULES:
        listed = ", ".join(f"`{name}`" for name in public(module))
        rows.append([f"`masked_loss_ext{module}`", listed])
    return documents.markdown(rows)


TABLES = {"operators": operators, "private": private, "names": names}


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    before, now = recorded(), registered()
    if "--check" in given and not _same(before, now):
        sys.exit(f"{SCHEMAS.name} is not what is registered; run `{COMMAND} --write`")
    if "--write" in given:
        wrong = broken(before, now)
        if wrong:
            sys.exit(
                "a promised schema may grow by arguments with defaults and not otherwise change; "
                "add an operator and keep this one for two releases: " + "; ".join(wrong)
            )
        SCHEMAS.write_text("\n".join(now.values()) + "\n")
    documents.run(COMMAND, PAGE, TABLES, given, __doc__)


assert masked_loss_ext.__version__  # the operators are loaded

if __name__ == "__main__":
    main()
