# SPDX-License-Identifier: BSD-3-Clause
"""Every public function and method says the types of its arguments and of its result.

That the annotations are true is what mypy checks, in ``make lint``.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import masked_loss_ext as mle

PACKAGE = Path(mle.__file__).parent
SPECIAL = ("__init__", "__call__")
# Modules without __all__ whose functions the documentation names.
NAMED = ("ops.repetition",)


def public_modules():
    """Those that list what they export."""
    yield mle
    for found in pkgutil.walk_packages(mle.__path__, "masked_loss_ext."):
        name = found.name.removeprefix("masked_loss_ext.")
        if any(part.startswith("_") for part in name.split(".")):
            continue
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            # Of a package that `make places` installs, or transformers.
            if not found.name.startswith("masked_loss_ext.integrations.") or not error.name:
                raise
            continue
        if hasattr(module, "__all__") or name in NAMED:
            yield module


def public_functions():
    """(module, name) -> function: functions, methods and properties, each once."""
    found = {}
    for module in public_modules():
        own = [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        ]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if inspect.isclass(value):
                members = vars(value)
            elif inspect.isfunction(value):
                members = {"": value}
            else:  # a module, __version__
                continue
            place = value.__module__.removeprefix("masked_loss_ext.")
            for member, raw in members.items():
                function = getattr(raw, "fget", getattr(raw, "__func__", raw))
                if member.startswith("_") and member not in SPECIAL:
                    continue
                written = getattr(function, "__code__", None)
                if written and Path(written.co_filename).is_relative_to(PACKAGE):
                    found[place, ".".join(filter(None, (value.__name__, member)))] = function
    return found


FUNCTIONS = public_functions()


def without_type(function):
    """Names of arguments, or "return", that have no annotation."""
    signature = inspect.signature(function, follow_wrapped=False)
    empty = inspect.Parameter.empty
    names = [p.name for p in signature.parameters.values() if p.annotation is empty]
    method = "." in function.__qualname__
    names = names[1:] if method and names[:1] in (["self"], ["cls"]) else names
    return names + ["return"] * (signature.return_annotation is empty)


@pytest.mark.parametrize("module", sorted({module for module, _ in FUNCTIONS}))
def test_everything_public_is_annotated(module):
    missing = {
        name: names
        for (place, name), function in FUNCTIONS.items()
        if place == module and (names := without_type(function))
    }
    assert not missing


def test_what_lacks_a_type_is_found():
    class Owner:
        def method(self, x, y: int = 0, *, z: int): ...

    assert without_type(Owner.method) == ["x", "return"]
    assert ("losses.multi_token", "MultiTokenPredictionLoss.forward") in FUNCTIONS
    assert ("diagnostics._report", "PaddingReport.leaks") in FUNCTIONS
    assert len(FUNCTIONS) > 100


def test_the_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").exists()
    settings = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert '"py.typed"' in settings.partition("[tool.setuptools.package-data]")[2]
