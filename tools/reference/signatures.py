# SPDX-License-Identifier: BSD-3-Clause
"""What is called, with what: directives of Sphinx's Python domain, and lists of arguments."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import layout
from .docstrings import Docstring, entries_of, parse

if TYPE_CHECKING:
    from .pages import Entry

# Public to the modules of the package, not to its users.
INTERNAL = {
    "add_state", "components", "current_temperature", "end_classes", "end_penalty", "extra_repr",
    "from_log_prob", "from_primary", "from_read", "function", "needs", "record",
}  # fmt: skip
Parameters = dict[str, inspect.Parameter]


def parameters(thing: Any) -> Parameters:
    try:
        found = dict(inspect.signature(thing).parameters)
    except ValueError:  # an exception
        return {}
    found.pop("self", None)
    return found


def default_text(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    shown = repr(parameter.default)
    return "..." if "<" in shown else shown


def type_text(annotation: Any) -> str:
    """As a reader would write it: no module names, and of an annotated type its rule as well."""
    if annotation is inspect.Parameter.empty:
        return ""
    if typing.get_origin(annotation) is typing.Annotated:
        base, *rules = typing.get_args(annotation)
        return ", ".join([type_text(base), *(str(rule) for rule in rules)])
    plain = isinstance(annotation, type) and not typing.get_args(annotation)
    text = annotation.__name__ if plain else str(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text).replace("NoneType", "None").strip("'")


def text_of(thing: Any) -> str:
    """(a, b=1, *, c): names and defaults, without types, which stand with the arguments."""
    parts, starred = [], False
    for parameter in parameters(thing).values():
        kind = parameter.kind
        if kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        if kind is parameter.VAR_POSITIONAL:
            starred = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "")
        default = default_text(parameter)
        parts.append(f"{stars}{parameter.name}" + (f"={default}" if default else ""))
    return f"({', '.join(parts)})"


def directive(entry: Entry, summary: str) -> str:
    """Where an index, a link and the search find it."""
    thing = entry.thing
    kind = "function"
    if inspect.isclass(thing):
        kind = "exception" if issubclass(thing, BaseException) else "class"
    signature = text_of(thing)
    first, *others = entry.full_names
    lines = [
        f".. py:{kind}:: {first}{signature}",
        *(" " * (8 + len(kind)) + other for other in others),
    ]
    return "\n".join(lines) + "\n\n" + layout.indent(summary)


def arguments(thing: Any, section: str) -> str:
    """The entries of Args, or without any the bare list of the signature."""
    known = parameters(thing)
    if not section:
        return "\n".join(f"- {_term([name], known)}" for name in known) or "None."
    found = []
    for names, text in entries_of(section):
        found.append(f"{_term(names, known)}\n{layout.body(text)}" if names else text)
    return "\n\n".join(found)


def _term(names: Sequence[str], known: Parameters) -> str:
    """Names with their type and default, where the signature has them and they are alike."""
    named = [known[name.lstrip("*")] for name in names if name.lstrip("*") in known]
    types = list(dict.fromkeys(type_text(parameter.annotation) for parameter in named))
    defaults = [default_text(parameter) for parameter in named]
    about = [types[0]] if len(types) == 1 and types[0] else []
    if any(defaults) and len(set(defaults)) == 1:
        about.append(f"default {defaults[0]}")
    text = ", ".join(f"``{name}``" for name in names)
    return f"{text} : {layout.escaped(', '.join(about))}" if about else text


def methods(thing: type) -> list[str]:
    """Its own documented methods and those of its bases here; ``forward`` first."""
    found = {}
    for base in reversed(thing.__mro__):
        if base.__module__.startswith("masked_loss_ext"):
            found |= vars(base)
    names = [
        name
        for name, value in found.items()
        if not name.startswith("_")
        and name not in INTERNAL
        and callable(getattr(thing, name))
        and isinstance(value, staticmethod | classmethod | type(text_of))
        and value.__doc__
    ]
    return sorted(names, key=lambda name: name != "forward")


def method(thing: type, name: str) -> str:
    """A method with all that its docstring says."""
    function, doc = getattr(thing, name), parse(getattr(thing, name))
    static = isinstance(inspect.getattr_static(thing, name), staticmethod)
    if inspect.isfunction(function) and not static:  # without what it calls itself
        function = types.MethodType(function, thing)
    body = [doc.summary, *doc.formula, *doc.text, *doc.equivalent]
    if section := doc.sections.get("Args"):
        body.append(arguments(function, section))
    body += results(doc)
    head = f".. py:method:: {thing.__name__}.{name}{text_of(function)}\n   :no-index:"
    if static:
        head += "\n   :staticmethod:"
    return head + "\n\n" + layout.indent("\n\n".join(body))


def results(doc: Docstring) -> list[str]:
    """Returns and Raises of a docstring."""
    found = []
    for head in ("Returns", "Raises"):
        if section := doc.sections.get(head):
            shown = layout.definitions(entries_of(section)) if head == "Raises" else section
            found.append(f"**{head}**\n\n{shown}")
    return found
