# SPDX-License-Identifier: BSD-3-Clause
"""What modules that hand a dict on read from it: entries by name, lists of names, shapes."""

import math
from operator import index

from . import _host


class MissingEntry(KeyError):
    """A KeyError whose text is a sentence: KeyError itself would show it in quotes."""

    def __str__(self):
        return self.args[0]


def check_dict(function, data_dict):
    if not hasattr(data_dict, "keys") or not hasattr(data_dict, "__setitem__"):
        raise TypeError(f"{function}: data_dict must be a dict, got {type(data_dict).__name__}")


def read_entry(function, argument, data_dict, key):
    """``data_dict[key]``; ``argument`` is what the module calls the key."""
    check_dict(function, data_dict)
    if key not in data_dict:
        held = ", ".join([repr(k) for k in data_dict.keys()]) or "nothing"
        raise MissingEntry(
            f"{function}: data_dict must hold {key!r} ({argument}), but it holds {held}"
        )
    return data_dict[key]


def names(function, argument, values):
    """A list of keys; a str would be one key per letter."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(
            f"{function}: {argument} must be a list of keys, got {type(values).__name__}"
        )
    values = list(values)
    if not values:
        raise ValueError(f"{function}: {argument} must hold at least one key")
    return values


def shape_of(function, name, shape):
    """torch.Size, tuple, list, array or int -> tuple of ints, none of them negative."""
    sizes = (shape,) if _host.is_number(shape) else shape
    what = "an int or a list of ints"
    sizes = tuple(_host.listed(function, name, sizes, what))
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            _refuse_size(function, name, size)
    return tuple([index(size) for size in sizes])


def _refuse_size(function, name, size):
    if isinstance(size, bool) or not _host.is_number(size):
        raise TypeError(f"{function}: {name} must hold ints, got {type(size).__name__}")
    if size < 0:
        raise ValueError(f"{function}: {name} must not be negative, got {size}")


def token_count(function, name, shape):
    return math.prod(shape_of(function, name, shape))
