# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.errors`` makes every wrong call of the table in tests/invalid/ and collects
what is said; ``--write`` puts it into docs/guide/errors.md, ``--check`` compares.

All errors of arguments have one form, "<function>: <argument> must <rule>, got <what>". The page
has the rules of each argument, and for each rule what to do.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from tests.invalid import calling, table

from . import documents
from .error_advice import advice

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guide" / "errors.md"
SAID = re.compile(r"\S+: (?P<argument>.*?) must (?P<rule>.*?)(?:, got |: it would|$)", re.S)
# Families of functions, in the order of the page; the first that fits a name has it.
FAMILIES = {
    "squared": r"masked_[sm]se|compute_loss\w*|masked_edit\w*|\w*MseLoss|MaskEditLoss",
    "cross_entropy": r"\w*masked_(linear_)?cross_entropy|Masked\w*CrossEntropy\w*|"
    r"\w*row_statistics|vocab_parallel\w*|aggregate_tokens|\w*cross_entropy_terms|repetition\w*",
    "masks": r"lengths_to_mask|unpad|mask_labels|shift_labels|sample_keep_k",
    "attention": r"PackedLayout.*|RowIntervals.*|nested_dropout\w*|generate_nested\w*",
    "unified": r".*",
}
# Of nearly every tensor; the page says them once.
OF_TENSORS = re.compile(
    r"be a torch.Tensor|be a plain tensor|be a dense tensor|be on the device of .*|be on one "
    r"device|be of a dtype that PyTorch .*|be a floating tensor"
)
Rules = Mapping[tuple[str, str], Sequence[str]]  # of each function and argument


def normal(rule: str) -> str:
    """Without what depends on the call: sizes, devices, numbers of a shard."""
    rule = re.sub(r"(?<!in )\[(\d+(, \d+)*)?\]", "[...]", rule)
    rule = re.sub(r" \((cpu|meta|cuda:\d)\)", "", rule)
    rule = re.sub(r"per sample \(\d\)", "per sample", rule)
    rule = re.sub(r"the first \d+ dimensions", "the first dimensions", rule)
    rule = re.sub(r"be in \[0, (\d|11)\)", "be in [0, n)", rule)
    rule = re.sub(r"classes, \d \+ \d", "classes", rule)
    return re.sub(r"(num_classes|vocab_size|hidden_size|num_experts)( = | )\d+", r"\1", rule)


def of_any(rule: str) -> str:
    """Without the name of the tensor that another is compared with."""
    before = (
        "the device of|the shape of|first dimensions of|the B and S of|per row of|broadcastable to"
    )
    return re.sub(rf"({before}) [a-z]\w*(\[\.\.\.\])?", r"\1 x", rule)


def said(entry: calling.Entry, argument: str, way: calling.Way) -> tuple[str, str] | None:
    """The argument and the rule of the error, None where there is none of the form."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            calling.eager(entry, entry.given(argument) | {argument: way.value})
        except Exception as error:
            found = SAID.match(str(error))
            if found:
                named = found["argument"].split()[-1]  # another one, where two do not fit
                return named if named in entry.arguments else argument, normal(found["rule"])
    return None


def wrong_ways(entry: calling.Entry, argument: str) -> list[calling.Way]:
    return [way for way in entry.ways(argument) if way.is_wrong and not way.by_pytorch]


def entries() -> Iterable[tuple[calling.Entry, str]]:
    """And their arguments; operators, which users do not call, are left out."""
    for entry in table.ENTRIES:
        if not entry.alone:
            yield from ((entry, name) for name in entry.parameters() if name in entry.arguments)


@cache
def collected() -> Rules:
    rules: dict[tuple[str, str], dict[str, None]] = {(e.name, name): {} for e, name in entries()}
    for entry, argument in entries():
        for way in wrong_ways(entry, argument):
            found = said(entry, argument, way)
            if found:
                rules.setdefault((entry.name, found[0]), {})[found[1]] = None
    return {key: list(of) for key, of in rules.items() if of}


def advice_table() -> str:
    """Every rule once, those with one advice beside each other."""
    grouped: dict[str, list[str]] = {}
    for rule in sorted({of_any(rule) for of in collected().values() for rule in of}):
        grouped.setdefault(advice(rule), []).append(f"`{rule}`")
    rows = [["must", "what to do"], *([", ".join(of), text] for text, of in grouped.items())]
    return documents.markdown(rows)


def family_of(name: str) -> str:
    return next(family for family, names in FAMILIES.items() if re.fullmatch(names, name))


def family_table(family: str) -> str:
    rows = [["function", "argument", "must"]]
    before = ""
    for (name, argument), rules in collected().items():
        if family_of(name) != family:
            continue
        own = [f"`{rule}`" for rule in rules if not OF_TENSORS.fullmatch(rule)]
        tensor = ["a tensor"] if len(own) < len(rules) else []
        shown = "" if name == before else f"`{name}`"
        rows.append([shown, f"`{argument}`", ", ".join([*tensor, *own])])
        before = name
    return documents.markdown(rows)


TABLES = {"advice": advice_table} | {
    family: (lambda family=family: family_table(family)) for family in FAMILIES
}


def main(arguments: Sequence[str] | None = None) -> None:
    documents.run("python -m tools.errors", PAGE, TABLES, arguments, __doc__)


if __name__ == "__main__":
    main()
