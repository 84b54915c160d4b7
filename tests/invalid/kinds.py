# SPDX-License-Identifier: BSD-3-Clause
"""Every way to get an argument wrong, by the kind of argument; and those that only look wrong."""

import datetime
import fractions
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

SAME, FINE = "the same result", "a result"


@dataclass(frozen=True)
class Way:
    """A value and what becomes of it: an error of a kind, SAME as with the good one, or FINE."""

    name: str
    value: Any
    verdict: Any
    needs_data: bool = False  # tells only by what is stored in a tensor
    is_named: bool = True  # else another argument may be called the one that does not fit
    by_pytorch: bool = False  # which refuses it in its own words

    @property
    def is_wrong(self) -> bool:
        return self.verdict not in (SAME, FINE)


def changed(ways, **verdicts):
    """The same ways with other verdicts, by their names with underscores; None leaves one out."""

    def found(good):
        for way in ways(good):
            verdict = verdicts.get(way.name.replace(" ", "_"), way.verdict)
            if verdict is not None:
                yield replace(way, verdict=verdict)

    return found


Ways = Callable[[Any], Iterator[Way]]


class Subclass(torch.Tensor):
    """As people make them, for a unit or a name."""


# --- tensors -------------------------------------------------------------------------------------


def no_tensor(good):
    for name, value in {
        "None": None,
        "a str": "x",
        "an int": 3,
        "a bool": True,
        "a list": [1.0, 2.0],
        "a NumPy array": np.ones(good.shape, dtype=np.float32),
        "a NumPy scalar": np.float32(1.0),
        "a dict": {},
    }.items():
        yield Way(name, value, TypeError)


def no_plain_tensor(good):
    two = good if good.dim() else good.expand(2)
    yield Way("nested", torch.nested.nested_tensor([two, two]), ValueError)
    jagged = torch.nested.nested_tensor([two, two], layout=torch.jagged)
    yield Way("nested, jagged", jagged, ValueError)
    yield Way("sparse", good.to_sparse(), ValueError)
    if good.dim() == 2:
        yield Way("sparse, CSR", good.to_sparse_csr(), ValueError)
    yield Way("on meta", good.to("meta"), ValueError, is_named=False)
    quantized = torch.quantize_per_tensor(good.float(), 0.1, 0, torch.quint8)
    yield Way("quantized", quantized, ValueError)


def of_dtypes(good, names, verdict):
    for name in names:
        dtype = getattr(torch, name)
        try:
            value = good.to(dtype)
        except (RuntimeError, NotImplementedError):
            value = torch.empty(good.shape, dtype=dtype)
        yield Way(f"of {name}", value, verdict)


RARE = ("complex64", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint4", "int1", "bits8")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
FLOATING = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("uint8", "int8", "int16", "int32", "int64")
UNSIGNED = ("uint16", "uint32")
WHOLE_TENSORS = tuple(f"of_{name}" for name in ("bool", *INTEGERS, *UNSIGNED, "uint64"))


def of_other_shapes(good, is_named=True):
    """Of a rank more and less, longer, shorter, of no entry."""

    def wrong(name, value):
        return Way(name, value, ValueError, is_named=is_named)

    yield wrong("of a rank more", good.unsqueeze(0).repeat(2, *[1] * good.dim()))
    if good.dim():
        yield wrong("a number", good.flatten()[0])
        yield wrong("longer", torch.cat([good, good]))
        yield wrong("empty", good[:0])
    if good.dim() > 1:
        yield wrong("of a rank less", good[0])
        yield wrong("longer at the end", torch.cat([good, good], -1))
        yield wrong("of one", good[:1])


def of_other_forms(good):
    """What is the same tensor all the same."""
    yield Way("a subclass", good.clone().as_subclass(Subclass), SAME)
    yield Way("not contiguous", torch.stack([good, good], -1)[..., 0], SAME)
    yield Way("with an offset", torch.stack([good, good])[1], SAME)


def floats(good, is_named=True):
    """Floating, with a derivative."""
    yield from no_tensor(good)
    yield from no_plain_tensor(good)
    yield from of_dtypes(good, ("bool", "uint64", *INTEGERS, *UNSIGNED, *FLOAT8, *RARE), ValueError)
    yield from of_other_shapes(good, is_named)
    yield from of_other_forms(good)
    yield from of_dtypes(good, FLOATING, FINE)
    yield Way("with a gradient", good.clone().requires_grad_(), SAME)


def first(good):
    """Floating, and what the others are compared with."""
    yield from floats(good, is_named=False)


def numbers_too(good):
    """Floating with a derivative, or of integers, or a number; of any shape that broadcasts."""
    wide = dict.fromkeys((*WHOLE_TENSORS, "of_one", "of_a_rank_less", "a_number"), FINE)
    yield from changed(floats, an_int=FINE, a_NumPy_scalar=FINE, **wide)(good)


def class_weights(good):
    """Of any dtype that holds numbers, without a derivative."""
    wide = {name: FINE for name in (*WHOLE_TENSORS, *(f"of_{name}" for name in FLOAT8))}
    yield from changed(floats, with_a_gradient=ValueError, **wide)(good)


def mask(good):
    """Of any dtype that can be compared with 0."""
    yield from no_tensor(good)
    yield from no_plain_tensor(good)
    yield from of_dtypes(good, RARE, ValueError)
    yield from of_other_shapes(good)
    yield from of_other_forms(good)
    yield from of_dtypes(good, ("bool", *INTEGERS, *UNSIGNED, "uint64", *FLOATING, *FLOAT8), SAME)
    additive = torch.zeros(good.shape).masked_fill_(good == 0, -math.inf)
    yield Way("additive", additive, ValueError, needs_data=True)
    nan = good.float().index_fill(0, torch.tensor(0), math.nan)
    yield Way("with NaN", nan, ValueError, needs_data=True)


def integers(good):
    """Ids of any value."""
    yield from no_tensor(good)
    yield from no_plain_tensor(good)
    yield from of_dtypes(good, ("bool", *FLOATING, *FLOAT8, *RARE), ValueError)
    yield from of_other_shapes(good)
    yield from of_other_forms(good)
    yield from of_dtypes(good, ("int8", "int16", "int32"), SAME)
    yield from of_dtypes(good.clamp(min=0), UNSIGNED, FINE)  # what counts for nothing is negative


def labels(good):
    """Classes, of which -100 counts for nothing."""
    yield from integers(good)
    yield Way("too large", torch.full_like(good, 2**40), IndexError, needs_data=True)
    yield Way("negative", torch.full_like(good, -7), IndexError, needs_data=True)


def kept(ways):
    """Of a constructor, which looks at the kind of a tensor; the call looks at the rest."""

    def found(good):
        for way in ways(good):
            tensor = isinstance(way.value, torch.Tensor) and not way.name.startswith(("ne", "sp"))
            yield replace(way, verdict=FINE) if tensor else way

    return found


def unnamed(ways):
    """Where another argument may be called the one that does not fit in shape."""
    shapes = {way.name for way in of_other_shapes(torch.ones(2, 2))}

    def found(good):
        for way in ways(good):
            yield replace(way, is_named=way.is_named and way.name not in shapes)

    return found


def one_is_any(ways):
    """Where a size of 1 stands for any."""
    return changed(ways, of_one=FINE)


# --- what is no tensor ---------------------------------------------------------------------------

NO_NUMBER = {
    "a str": "x",
    "bytes": b"x",
    "None": None,
    "a list": [1.0],
    "complex": 1j,
    "a bool": True,
    "a date": datetime.date(2020, 1, 1),
}


def number(least=None, above=None, most=None, tensor=None):
    """A finite number between bounds. tensor: what becomes of a 0-d one, which may be taken too."""

    def ways(good):
        for name, value in NO_NUMBER.items():
            yield Way(name, value, TypeError)
        outside = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 10**400}
        outside |= {"less": least - 0.01} if least is not None else {}
        outside |= {"the bound": above, "less": above - 1} if above is not None else {}
        outside |= {"more": most + 0.01} if most is not None else {}
        for name, value in outside.items():
            yield Way(name, value, ValueError)
        yield Way("of NumPy", np.float64(good), SAME)
        yield Way("a fraction", fractions.Fraction(good), SAME)
        value = torch.tensor(float(good), dtype=torch.float64)
        yield Way("a 0-d tensor", value, TypeError if tensor is None else SAME)
        if tensor:
            yield Way("a tensor [2]", torch.tensor([1.0, 2.0]), ValueError)
            yield Way("with a gradient", value.clone().requires_grad_(), ValueError)
            yield Way("a tensor of complex64", value.to(torch.complex64), ValueError)
            yield Way("a NaN in a tensor", torch.tensor(math.nan), ValueError, needs_data=True)

    return ways


def whole(least=None, most=None):
    def ways(good):
        no = {**NO_NUMBER, "a float": 1.5, "NaN": math.nan, "a tensor [2]": torch.tensor([1, 2])}
        for name, value in no.items():
            yield Way(name, value, TypeError)
        outside = {"of 70 bits": 2**70}
        outside |= {"less": least - 1} if least is not None else {}
        outside |= {"more": most + 1} if most is not None else {}
        for name, value in outside.items():
            yield Way(name, value, ValueError)
        yield Way("of NumPy", np.int64(good), SAME)

    return ways


def flag(good):
    no = {"a str": "no", "None": None, "a list": [], "two": 2, "negative": -1, "a half": 0.5}
    for name, value in (no | {"a tensor": torch.tensor(True)}).items():
        yield Way(name, value, TypeError)
    yield Way("of NumPy", np.bool_(good), SAME)
    yield Way("an int", int(good), SAME)


def choice(good):
    no = {"empty": "", "another": "maximum", "None": None, "an int": 1, "a bool": True}
    no |= {"a list": [good], "upper case": str(good).upper(), "a tensor": torch.tensor(1)}
    for name, value in no.items():
        yield Way(name, value, ValueError)


def dtype(good):
    no = {"a str": "float32", "an int": 3, "a bool": True, "of int64": torch.int64}
    for name, value in (no | {"of complex64": torch.complex64, "a type": float}).items():
        yield Way(name, value, ValueError)


def group(good):
    no = {"a str": "x", "an int": 3, "a list": [0], "a tensor": torch.ones(1)}
    for name, value in no.items():
        yield Way(name, value, ValueError)


def number_or_weights(good):
    """A number, or a tensor of one for each class."""
    yield from changed(number(least=0), **{"a_0-d_tensor": ValueError})(good)


def list_of(ways):
    """A list of tensors, of which the last is wrong; and what is no list."""

    def found(good):
        for way in ways(good[-1]):
            yield replace(way, name=f"last {way.name}", value=[*good[:-1], way.value])
        for name, value in {"a str": "x", "an int": 3, "a dict": {}}.items():
            yield Way(name, value, TypeError)

    return found


# --- what may be given in many forms -------------------------------------------------------------


def ints(good, least=0):
    """A list of ints, an array or a tensor of them."""
    wrong = {"None": None, "a str": "x", "a float": 1.5, "a dict": {"a": 1}, "a function": len}
    wrong |= {"a list of floats": [1.5], "a list of bools": [True], "a list of None": [None]}
    wrong |= {"a tensor of floats": torch.tensor([1.5, 2.5])}
    for name, value in wrong.items():
        yield Way(name, value, (TypeError, ValueError))
    yield Way("of 70 bits", [2**70] * len(good), ValueError, is_named=False)
    if least is not None:
        yield Way("negative", [*good[:-1], least - 1], ValueError, needs_data=True)
    yield Way("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]), ValueError)
    yield Way("of complex64", torch.tensor([1j, 2j]), ValueError)
    yield Way("a tensor", torch.tensor(good), SAME)
    yield Way("an array", np.array(good), SAME)
    yield Way("a tuple", tuple(good), SAME)


def device(good):
    for name, value in {"a str": "nowhere", "a float": 1.5, "a list": ["cpu"]}.items():
        yield Way(name, value, (TypeError, RuntimeError), by_pytorch=True)


def generator(good):
    for name, value in {
        "a str": "numpy",
        "an int": 3,
        "of NumPy": np.random.default_rng(0),
    }.items():
        yield Way(name, value, (TypeError, ValueError))


def mapping(good):
    no = {"a str": "x", "None": None, "a list": [("vocab_size", 5)], "an int": 5}
    for name, value in no.items():
        yield Way(name, value, (TypeError, ValueError))
