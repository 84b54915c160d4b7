# SPDX-License-Identifier: BSD-3-Clause
"""Every public name has a page of the reference, and each page all parts (tools/reference)."""

import importlib
import inspect
import re

import pytest

import masked_loss_ext
from tools.reference import figures, pages
from tools.reference.docstrings import blocks_of, entries_of, parse
from tools.reference.names import NAMES
from tools.reference.overview import every_page, schemas

PAGES = every_page()
ENTRIES = {entry.name: entry for entry in pages.entries()}
NOT_NAMES = {"__version__", "distributed", "reference"}  # a number, and modules
# ops/__init__.py lists nothing: operators are called by the losses, but for these.
PUBLIC = {
    "masked_loss_ext.ops.repetition": {"repetition_counts", "repetition_links", "RepetitionCounts"}
}


def public_names(module):
    return PUBLIC.get(module) or set(importlib.import_module(module).__all__) - NOT_NAMES


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_has_a_page(module):
    if module.endswith(".transformers"):
        pytest.importorskip("transformers")
    links = pages.links()
    without = [name for name in public_names(module) if f"{module}.{name}" not in links]
    assert not without, "add them to tools/reference/names.py"
    assert set(NAMES[module]) == public_names(module), "names.py names what is not public"


def sections_of(text):
    """{title: text} of what is underlined by hyphens."""
    parts = re.split(r"^(.+)\n-+$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", ENTRIES)
def test_every_page_has_every_section(name):
    found = sections_of(PAGES[f"{name}.rst"])
    assert tuple(found) == pages.SECTIONS
    empty = [title for title, text in found.items() if not text.strip()]
    assert not empty


@pytest.mark.parametrize("name", ENTRIES)
def test_all_of_a_docstring_is_on_its_page(name):
    thing = ENTRIES[name].thing
    words = set(re.findall(r"\w{4,}", inspect.getdoc(thing)))
    words -= {"Args", "Returns", "Raises", "Example"}
    missing = words - set(re.findall(r"\w{4,}", PAGES[f"{name}.rst"]))
    assert not missing


def test_every_argument_has_its_type_and_default():
    text = PAGES["masked_cross_entropy.rst"]
    assert "``shift`` : int, default 0\n   k scores position t" in text
    assert "``logits`` : Tensor\n" in text
    assert "``weight`` : Tensor \\| None, default None\n" in text


def test_a_letter_is_no_number_of_a_list():
    assert "``vocab_size`` : int, at least 1\n   \\V.\n" in PAGES["HiddenStateMTPLoss.rst"]


def test_every_operator_is_shown():
    text = PAGES["operators.rst"]
    assert len(schemas()) > 20
    for schema in schemas():
        assert f"{schema.split('(')[0]}(\n" in text, schema


@pytest.mark.parametrize("name", ENTRIES)
def test_figures_are_those_of_the_files(name):
    """What facts.py names exists: a case, a property or an operator that is renamed is missed."""
    family = ENTRIES[name].family
    for source, patterns in family.benchmark:
        for pattern in patterns:
            assert figures.cases(source, [pattern]), f"{source}: no case {pattern}"
    assert len(figures.fuzzed(family.fuzz)) == len(family.fuzz)
    assert len(figures.never_read(family.operators)) in (1, 1 + len(family.operators))
    assert (figures.ROOT / "tests" / family.room).is_dir()


def test_a_docstring_is_taken_apart():
    def documented():
        """A sentence.

        With x as it is

        .. math:: y = x^2

        where x is a number.

        The same as:

        >>> 1
        1

        Other text, of

        - one
        - two

        Args:
            x, y: numbers, of which
                one is large.
            z: another.

            Text between.

        Returns:
            nothing.

        **State.** After it all.
        """

    doc = parse(documented)
    assert doc.summary == "A sentence."
    assert [text.split()[0] for text in doc.formula] == ["With", "..", "where"]
    assert doc.equivalent == ["The same as:", ">>> 1\n1"]
    assert doc.text == ["Other text, of\n\n- one\n- two", "**State.** After it all."]
    args = entries_of(doc.sections["Args"])
    assert args == [
        (["x", "y"], "numbers, of which\none is large."),
        (["z"], "another."),
        ([], "Text between."),
    ]
    assert doc.sections["Returns"] == "nothing."


def test_formulas_in_lines_are_formulas():
    """Where none is displayed: the first paragraph that has one, and the table that it leads to."""
    found = sections_of(PAGES["aggregate_tokens.rst"])
    assert '"sequence_mean"   :math:`' in found["Formula"]
    assert ":math:" in sections_of(PAGES["row_statistics.rst"])["Formula"]


def test_indented_text_stays_with_what_leads_to_it():
    assert [block.kind for block in blocks_of("Same as::\n\n    f(x)\n\n>>> f\n\nText")] == [
        "text",
        "session",
        "text",
    ]


def test_names_lead_to_the_page_of_the_package():
    links = pages.links()
    assert links["mle.masked_cross_entropy"] == "masked_cross_entropy"
    assert links["ChannelInvariantTokenLoss"] == "AttentionMaskMseLoss"
    assert links["MultiTokenPredictionLoss"] == "MultiTokenPredictionLoss"
    assert links["masked_loss_ext.unified.MultiTokenPredictionLoss"] == "HiddenStateMTPLoss"
    assert masked_loss_ext.MultiTokenPredictionLoss is ENTRIES["MultiTokenPredictionLoss"].thing
