# SPDX-License-Identifier: BSD-3-Clause
"""A wrong call in each mode, and whether it is refused in the words that the project promises."""

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.invalid.kinds import SAME, Ways


@dataclass(frozen=True)
class Entry:
    """What can be called: name, as its messages say it; make() -> what is called, with a state that
    nobody has touched; of each argument a good value and the kind.

    needs: what else has to be given with an argument; compiles: "", or why nobody compiles it.
    """

    name: str
    make: Callable[[], Callable]
    arguments: Mapping[str, tuple[Any, Ways]]
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    compiles: str = ""
    key: str = ""  # where one name has several entries
    alone: bool = False  # eagerly alone

    @property
    def id(self):
        return self.key or self.name

    @property
    def modes(self):
        if self.alone:
            return ["eager"]
        return ["eager", "fake"] if self.compiles else list(MODES)

    def parameters(self):
        found = inspect.signature(self.make()).parameters.values()
        return {p.name: p for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}

    def ways(self, argument):
        """Of one that may be left out None says just that."""
        good, kind = self.arguments[argument]
        optional = self.parameters()[argument].default is None
        return [way for way in kind(good) if not (optional and way.value is None)]

    def given(self, argument):
        """The required ones, what the argument needs, and itself."""
        known = self.parameters()
        required = {n for n, p in known.items() if p.default is p.empty}
        names = known.keys() & {*required, *self.needs.get(argument, ()), argument}
        return {n: good for n, (good, _) in self.arguments.items() if n in names}


# Spellings of older code, that callers match.
ALSO_CALLED = {
    "attention_mask": "Attention mask",
    "forground_weight": "foreground_weight",
    "mask_mode": "mode",
}
# What is said in the name of what it is made of.
SPEAKERS = {"nested_dropout_block_mask": r"PackedLayout(\.block_mask)?"}


# What Dynamo does not trace, and refuses by itself, so that the call is never made.
UNTRACED = {
    *("nested", "nested, jagged", "sparse", "sparse, CSR", "quantized", "on meta", "a tensor"),
    *("a NumPy array", "a NumPy scalar", "of NumPy", "a fraction", "a date", "a dict", "a list"),
    *("complex", "a tensor [2]", "a subclass", "of 70 bits"),
}
UNTRACED |= {f"last {name}" for name in UNTRACED}
READS = (DataDependentOutputException, DynamicOutputShapeException)  # what a fake has not


OF_AN_OPERATOR = re.compile(r"\b_?(masked|cross|vocab|linear|repetition)\w+: \w.* must .+")


class Impossible(Exception):
    """A mode that cannot have such a value."""


def eager(entry, given):
    return called(entry)(**given)


def called(entry):
    """Anew, with the same weights."""
    torch.manual_seed(0)
    return entry.make()


def fake(entry, given):
    mode = FakeTensorMode()
    try:
        given = tree_map_only(torch.Tensor, mode.from_tensor, given)
    except Exception as error:
        raise Impossible(f"no fake of it: {error}") from error
    with mode:
        return called(entry)(**given)


def compiled(entry, given):
    torch._dynamo.reset()
    function = called(entry)
    return torch.compile(lambda: function(**given), fullgraph=True, backend="eager")()


MODES = {"eager": eager, "fake": fake, "compile": compiled}


def text_of(entry, argument, way):
    """A pattern."""
    speaker = SPEAKERS.get(entry.name, re.escape(entry.name))
    either = rf"{argument}|{ALSO_CALLED[argument]}" if argument in ALSO_CALLED else argument
    if way.by_pytorch:
        return ""
    named = rf".*\b({either})\b" if way.is_named else ".+"
    if way.name == "with a gradient":
        return rf"{speaker}: {named}.* must not require a gradient"
    return rf"{speaker}: {named}.* must .+, got .*"


def problem(entry, argument, way, mode):
    """What is wrong with how the call goes, "" if nothing is, None if there is no such call."""
    given = entry.given(argument) | {argument: way.value}
    # Dynamo may leave gradients off where a call fails within no_grad().
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            result = MODES[mode](entry, given)
        except (Impossible, *READS):
            return None
        except TorchDynamoException as error:
            if way.name in UNTRACED:
                return None
            return judged(entry, argument, way, mode, error)
        except Exception as error:
            return judged(entry, argument, way, mode, error)
        if way.is_wrong:
            return "" if mode != "eager" and way.needs_data else "no error"
        if way.verdict is SAME and mode != "fake":
            return compared(result, MODES["eager"](entry, entry.given(argument)))
    return ""


def judged(entry, argument, way, mode, error):
    said = f"{type(error).__name__}: {error}"
    if not way.is_wrong:
        return f"an error: {said}"
    pattern = text_of(entry, argument, way)
    if mode == "compile":  # the operator's own text, where it is the first that sees the tensors
        found = re.search(pattern, str(error)) or OF_AN_OPERATOR.search(str(error))
        return "" if found else f"said {said}"
    if not isinstance(error, way.verdict):
        return f"not {way.verdict}: {said}"
    if not re.match(pattern, str(error)):
        return f"said {said}"
    one_sentence = "\n" not in str(error) and len(str(error)) < 1000
    return "" if one_sentence or way.by_pytorch else f"too much: {said}"


def compared(result, expected):
    found, wanted = (
        [x for x in tree_flatten(r)[0] if isinstance(x, torch.Tensor)] for r in (result, expected)
    )
    if len(found) != len(wanted):
        return f"{len(found)} results, not {len(wanted)}"
    for x, y in zip(found, wanted, strict=True):
        x = x.detach().as_subclass(torch.Tensor)
        try:
            torch.testing.assert_close(x, y.detach(), equal_nan=True)
        except AssertionError as error:
            return f"another result: {error}"
    return ""
