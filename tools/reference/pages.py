# SPDX-License-Identifier: BSD-3-Clause
"""The pages of the reference: docstrings, facts and figures in one order, as reStructuredText."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

from . import figures, layout, signatures
from .docstrings import Docstring, parse
from .facts import TRAINERS, Family
from .names import NAMES

SECTIONS = (
    "Formula",
    "Arguments",
    "What counts",
    "Equivalent PyTorch",
    "Accuracy",
    "Reads and writes",
    "Speed",
    "Limits",
    "Tests",
)


class Entry:
    """A public object, with all the names that it has."""

    def __init__(self, thing: object, module: str, name: str, family: Family):
        self.thing, self.name, self.family = thing, name, family
        self.full_names = [f"{module}.{name}"]

    @property
    def names(self) -> list[str]:
        return [full.rsplit(".", 1)[1] for full in self.full_names]


def _integrations() -> Iterator[str]:
    """Integrations that names.py does not list: they are a page, too, once they import here."""
    package = importlib.import_module("masked_loss_ext.integrations")
    for found in pkgutil.iter_modules(package.__path__, "masked_loss_ext.integrations."):
        if not found.name.rsplit(".", 1)[1].startswith("_") and found.name not in NAMES:
            yield found.name


def modules() -> dict[str, dict[str, Family]]:
    """Every public module, its names and their families."""
    found = dict(NAMES)
    for name in _integrations():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        found[name] = dict.fromkeys(getattr(module, "__all__", ()), TRAINERS)
    return found


@functools.cache
def entries() -> tuple[Entry, ...]:
    """One for each object, in the order of names.py; other names of it are added to the first."""
    found: dict[int, Entry] = {}
    for module_name, names in modules().items():
        module = importlib.import_module(module_name)
        for name, family in names.items():
            thing = getattr(module, name)
            if id(thing) in found:
                found[id(thing)].full_names.append(f"{module_name}.{name}")
            else:
                found[id(thing)] = Entry(thing, module_name, name, family)
    return tuple(found.values())


def links() -> dict[str, str]:
    """The page of each name: bare, under ``mle.`` and in full. The package's own names go first."""
    found: dict[str, str] = {}
    for entry in entries():
        for full in entry.full_names:
            short = full.removeprefix("masked_loss_ext.")
            for name in (short.rsplit(".", 1)[-1], f"mle.{short}", full):
                found.setdefault(name, entry.name)
    return found


def page(entry: Entry) -> str:
    doc = parse(entry.thing)
    parts = [layout.title(entry.name), signatures.directive(entry, doc.summary)]
    makers = (_formula, _arguments, _counts, _equivalent, _accuracy, _traffic, _speed, _limits)
    for name, make in zip(SECTIONS, (*makers, _tests), strict=True):
        parts += [layout.title(name, "-"), make(entry, doc)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _formula(entry: Entry, doc: Docstring) -> str:
    if doc.formula:
        return "\n\n".join(doc.formula)
    if ":math:" in doc.summary:
        return doc.summary
    return entry.family.formula or "None: a result, see its fields."


def _arguments(entry: Entry, doc: Docstring) -> str:
    text = [signatures.arguments(entry.thing, doc.sections.get("Args", ""))]
    text += signatures.results(doc)
    if inspect.isclass(entry.thing):
        text += [signatures.method(entry.thing, name) for name in signatures.methods(entry.thing)]
    return "\n\n".join(part for part in text if part)


def _counts(entry: Entry, doc: Docstring) -> str:
    return "\n\n".join([entry.family.counts, *doc.text])


def _equivalent(entry: Entry, doc: Docstring) -> str:
    if doc.equivalent:
        return "\n\n".join(doc.equivalent)
    return entry.family.equivalent or "None: a part of the result of another function."


def _accuracy(entry: Entry, doc: Docstring) -> str:
    family = entry.family
    counted = figures.fuzzed(family.fuzz)
    text = [family.accuracy]
    if counted:
        text.append("Random calls against the reference (``make fuzz``, :doc:`/trust`):")
        text.append(layout.bullets(counted))
    for source, names in family.benchmark:
        where = "a GPU" if source == figures.GPU else "the CPU"
        text.append(
            f"In the benchmark's cases below, on {where}, relative to float64. "
            f"{figures.errors(source, names)}."
        )
    if not counted and not family.benchmark:
        text.append("Not measured beyond its tests.")
    return "\n\n".join(text)


def _traffic(entry: Entry, doc: Docstring) -> str:
    table = figures.never_read(entry.family.operators)
    if len(table) == 1:
        return f"{entry.family.traffic}\n\nNot counted."
    said = (
        "Counted (``python -m tools.bits never_read``, :doc:`/trust`): excluded bytes that stood "
        "on pages closed to reading, and excluded bytes that a library counts whose every access "
        "is seen. *Wrong*: how often one of these was read, or a gradient not written once."
    )
    return "\n\n".join([entry.family.traffic, said, layout.table(table)])


def _speed(entry: Entry, doc: Docstring) -> str:
    text = []
    for source, names in entry.family.benchmark:
        text += [layout.table(figures.speed_table(source, names)), figures.origin(source, names)]
    return "\n\n".join(text) or "Not measured."


def _limits(entry: Entry, doc: Docstring) -> str:
    return layout.bullets(entry.family.limits)


def _tests(entry: Entry, doc: Docstring) -> str:
    room = f"tests/{entry.family.room}"
    found = sorted({path for name in entry.names for path in figures.tests_naming(name)})
    own = [path for path in found if path.startswith(f"{room}/")]
    text = [f"``make test ARGS={room}``. Of that folder these name it:", layout.files(own)]
    if not own:
        text = [
            f"``make test ARGS={room}``. None of these files names it: they call what it calls."
        ]
    elsewhere = [path for path in found if path not in own]
    if elsewhere:
        text.append("And elsewhere: " + ", ".join(f"``{path}``" for path in elsewhere) + ".")
    return "\n\n".join(text)
