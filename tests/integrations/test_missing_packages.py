# SPDX-License-Identifier: BSD-3-Clause
"""An integration whose package is missing, or of a release that it does not know, says so."""

import importlib
import sys
import types

import pytest

from masked_loss_ext.integrations import _packages

# integration -> (module that it asks for, what of it, what is missing otherwise)
ASKED = {
    "trl": ("trl.trainer.utils", "FusedCausalLMOutput"),
    "lightning": ("lightning.pytorch.callbacks", "Callback"),
    "axolotl": ("axolotl.integrations.base", "BasePlugin"),
    "torchtitan": ("torchtitan.components.loss", "BaseLoss, ChunkedLossWrapper"),
    "verl": ("verl.trainer.ppo.core_algos", "register_policy_loss"),
}


def imported_again(monkeypatch, name):
    if name == "axolotl":
        pytest.importorskip("transformers")
    monkeypatch.delitem(sys.modules, f"masked_loss_ext.integrations.{name}", raising=False)
    return importlib.import_module(f"masked_loss_ext.integrations.{name}")


@pytest.mark.parametrize("name", ASKED)
def test_without_the_package(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, ASKED[name][0], None)
    with pytest.raises(ModuleNotFoundError) as caught:
        imported_again(monkeypatch, name)
    sentence = f"masked_loss_ext.integrations.{name} needs {name} ("
    assert str(caught.value).startswith(sentence) and f"pip install {name}" in str(caught.value)
    assert caught.value.name


@pytest.mark.parametrize("name", ASKED)
def test_a_release_without_what_is_asked_for(name, monkeypatch):
    module, names = ASKED[name]
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    parent = module
    while "." in parent:
        parent = parent.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    sentence = f"integrations.{name} does not know this release: {module} has no {names}"
    with pytest.raises(ImportError, match=sentence):
        imported_again(monkeypatch, name)


def test_what_is_there():
    module = _packages.needed("x", "types", "x")
    assert module is types
    assert _packages.known("x", module, "ModuleType") is types.ModuleType
    both = _packages.known("x", module, "ModuleType", "FunctionType")
    assert both == [types.ModuleType, types.FunctionType]
