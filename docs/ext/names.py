# SPDX-License-Identifier: BSD-3-Clause
"""The reference on the site: its files are made before a build, and code that is a public name,
such as ``masked_cross_entropy``, leads to its page."""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

from tools.reference.__main__ import write
from tools.reference.pages import links

COMMON_WORDS = {"Change", "Shift"}  # names that are words of code elsewhere


class LinkNames(SphinxPostTransform):
    default_priority = 5

    def run(self, **kwargs) -> None:
        names = self.config.reference_names
        for literal in list(self.document.findall(nodes.literal)):
            page = names.get(literal.astext().removesuffix("()"))
            inside = (nodes.reference, nodes.title, addnodes.pending_xref, nodes.term)
            if page and not _within(literal, inside) and f"reference/{page}" != self.env.docname:
                self._link(literal, f"reference/{page}")

    def _link(self, literal: nodes.literal, page: str) -> None:
        target = self.app.builder.get_relative_uri(self.env.docname, page)
        reference = nodes.reference("", "", internal=True, refuri=target)
        literal.replace_self(reference)
        reference += literal


def _within(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    while (node := node.parent) is not None:
        if isinstance(node, kinds):
            return True
    return False


def generate(app, config) -> None:
    write(Path(app.srcdir) / "reference")
    names = links()
    config.reference_names = {name: names[name] for name in names.keys() - COMMON_WORDS}


def setup(app):
    app.add_config_value("reference_names", {}, "")
    app.connect("config-inited", generate)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
