# SPDX-License-Identifier: BSD-3-Clause
"""What the reference has beside the pages of names: its index, the operators, the specification."""

from __future__ import annotations

import functools
import inspect
import re

import torch

import masked_loss_ext
from masked_loss_ext import reference

from . import layout
from .docstrings import parse
from .pages import Entry, entries, page

NAMESPACE = "masked_loss_ext::"


@functools.cache
def every_page() -> dict[str, str]:
    """The text of each file of the reference, by its name."""
    found = {f"{entry.name}.rst": page(entry) for entry in entries()}
    for title, members in groups().items():
        parts = [layout.title(title), _summary(members), _tree([one.name for one in members])]
        found[f"{slug(title)}.rst"] = "\n\n".join(parts) + "\n"
    others = {"operators": operators, "specification": specification, "index": index}
    return found | {f"{name}.rst": make() for name, make in others.items()}


def groups() -> dict[str, list[Entry]]:
    """The pages that stand together, in the order of names.py."""
    found: dict[str, list[Entry]] = {}
    for entry in entries():
        found.setdefault(entry.family.title, []).append(entry)
    return found


def slug(title: str) -> str:
    """Of a group's page: no name is written like it."""
    return "group-" + re.sub(r"\W+", "-", title.lower()).strip("-")


def index() -> str:
    parts = [
        layout.title("Reference"),
        "A page for each public name, all in one order. They are made of the docstrings, of the "
        "committed figures and of counts; a test holds every public name to have one.",
    ]
    for title, members in groups().items():
        parts += [layout.title(title, "-"), _summary(members)]
    parts += [
        layout.title("Operators, specification", "-"),
        "The :doc:`operators` as ``torch.ops`` has them, and the plain PyTorch that they are held "
        "to: the :doc:`specification`.",
        _tree([*map(slug, groups()), "operators", "specification"]),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(members: list[Entry]) -> str:
    rows = "\n".join(
        f"   * - :doc:`{one.name}`\n     - {parse(one.thing).summary}" for one in members
    )
    return f".. list-table::\n   :class: names\n   :widths: 35 65\n\n{rows}"


def _tree(names: list[str]) -> str:
    return ".. toctree::\n   :hidden:\n\n" + layout.indent("\n".join(names))


def schemas() -> list[str]:
    found = (str(schema) for schema in torch._C._jit_get_all_schemas())
    return sorted(one.removeprefix(NAMESPACE) for one in found if one.startswith(NAMESPACE))


def operators() -> str:
    """Every operator that the library registers, as it registered it."""
    assert masked_loss_ext.__version__  # the library is loaded
    public = [one for one in schemas() if not one.startswith("_")]
    private = [one for one in schemas() if one.startswith("_")]
    parts = [
        layout.title("Operators"),
        "What the native library registers under ``torch.ops.masked_loss_ext``: what stands in an "
        "exported model and what a C++ program calls. Names and schemas are read from the "
        "dispatcher. Derivatives are registered by the Python package alone.",
        layout.title("Public", "-"),
        *map(_operator, public),
        layout.title("Private", "-"),
        "Backward passes, and what several operators are made of. An exported training step may "
        "hold them; nobody should call them.",
        *map(_operator, private),
    ]
    return "\n\n".join(parts) + "\n"


def _operator(schema: str) -> str:
    name, rest = schema.split("(", 1)
    arguments, results = rest.split(") -> ", 1)
    lines = [f"{name}(", *(f"    {one}," for one in _split(arguments)), f") -> {results}"]
    code = ".. code-block:: text\n\n" + layout.indent("\n".join(lines))
    return f"{layout.title(layout.escaped(name), '~')}\n\n{code}"


def _split(arguments: str) -> list[str]:
    """At commas outside of brackets."""
    found, depth = [""], 0
    for letter in arguments:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [one.strip() for one in found if one.strip()]


def specification() -> str:
    """The functions of ``masked_loss_ext.reference`` with their source."""
    parts = [
        layout.title("Specification"),
        inspect.getdoc(reference) or "",
        "``masked_loss_ext.reference`` is what the kernels are tested against, and what an "
        "argument means where words leave a doubt.",
    ]
    for name in reference.__all__:
        thing = getattr(reference, name)
        if inspect.ismodule(thing) or not inspect.getdoc(thing):
            continue
        source = inspect.getsource(thing)
        code = ".. code-block:: python\n\n" + layout.indent(source)
        parts += [layout.title(name, "-"), code]
    return "\n\n".join(parts) + "\n"
