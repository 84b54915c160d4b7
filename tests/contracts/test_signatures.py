# SPDX-License-Identifier: BSD-3-Clause
"""No argument of a public function is taken and not used: read from the sources."""

import ast
from pathlib import Path

import pytest

import masked_loss_ext as mle
from masked_loss_ext.unified._components import COMPONENTS

PACKAGE = Path(mle.__file__).parent
TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
SPECIAL = ("__init__", "__call__")
CALLBACK = "transformers calls its callbacks with all it has"

# (class and) function, argument: why it may go unused.
UNUSED = {
    **{(f"TokenLossCallback.{name}", "*"): CALLBACK for name in (
        *("on_train_begin", "on_substep_end", "on_pre_optimizer_step", "on_train_end"),
        *("on_log", "on_predict"),
    )},
    ("MaskedLossPlugin.post_trainer_create", "cfg"): "axolotl calls its plugins with all it has",
    ("TokenMean.on_train_batch_start", "*"): "Lightning calls its callbacks with all it has",
    ("LinearCrossEntropyLoss.__call__", "*"): "torchtitan hands it more inputs: docstring",
    ("AuxiliaryFreeMoEBalancer.forward", "expert_outputs"): "said so in the docstring",
    ("Component.needs", "rows"): "a component that needs nothing of the read",
    ("Component.term", "call"): "each component has its own",
    ("Focal.needs", "rows"): "whatever they are",
}  # fmt: skip
# Class, argument of its constructor: kept as an attribute that nobody reads, and why.
UNREAD = {
    ("AttentionMaskMseLoss", "eps"): "of older code; a count of at least 1 needs none: docstring",
    ("NestedDropoutSequencePacker", "compile_block_mask"): "of older code: docstring",
    ("AuxiliaryFreeMoEBalancer", "target_balance_ratio"): "of older code: docstring",
}


def functions(tree, owner=""):
    """Public functions and methods, with the class's name before theirs."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            if not node.name.startswith("_") or node.name in SPECIAL:
                yield owner + node.name, node


FUNCTIONS = [
    pytest.param(name, node, id=f"{file}:{name}")
    for file, tree in TREES.items()
    for name, node in functions(tree)
]


def fields(tree):
    """Classes and the arguments of their constructors, of those that are dataclasses."""
    for node in tree.body:
        decorators = [ast.dump(one) for one in getattr(node, "decorator_list", ())]
        if isinstance(node, ast.ClassDef) and any("'dataclass'" in one for one in decorators):
            for one in node.body:
                if isinstance(one, ast.AnnAssign) and "InitVar" not in ast.dump(one.annotation):
                    yield node.name, one.target.id


def parameters(node):
    a = node.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [one.arg for one in every if one.arg not in ("self", "cls")]


def nodes(function, kind):
    return [node for part in function.body for node in ast.walk(part) if isinstance(node, kind)]


@pytest.mark.parametrize("name,node", FUNCTIONS)
def test_every_argument_is_used(name, node):
    if (name, "*") in UNUSED:
        return
    used = {one.id for one in nodes(node, ast.Name)}
    if "locals" in used:  # a constructor that keeps them all
        return
    unused = [p for p in parameters(node) if p not in used and (name, p) not in UNUSED]
    assert not unused, f"{name} takes and does not use {', '.join(unused)}"


@pytest.mark.parametrize("name,node", [p for p in FUNCTIONS if p.values[1].args.kwarg])
def test_keywords_by_any_name_are_passed_on_or_refused(name, node):
    """``**options`` goes on to a function that has the names, or to one that refuses them."""
    if (name, "*") in UNUSED:
        return
    keyword = node.args.kwarg.arg
    for call in nodes(node, ast.Call):
        passed = [k.value for k in call.keywords if k.arg is None] + call.args
        if any(isinstance(one, ast.Name) and one.id == keyword for one in passed):
            return
    pytest.fail(f"{name} takes **{keyword} and neither passes it on nor refuses it")


def test_what_is_kept_is_read():
    """An argument that is kept as an attribute of its name, and read nowhere but in a repr."""
    read = {
        one.attr
        for tree in TREES.values()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name != "extra_repr"
        for one in nodes(function, ast.Attribute)
        if isinstance(one.ctx, ast.Load)
    }
    read -= {"eps"}  # of a LayerNorm, say
    read |= {"_"}  # what follows is by keyword
    # By a component of UnifiedLoss, of its own or another name.
    read |= {name for cls in COMPONENTS for name in (cls.switch, *cls.renamed.values())}
    unread = {(owner, n) for tree in TREES.values() for owner, n in fields(tree) if n not in read}
    for p in FUNCTIONS:
        owner, _, method = p.values[0].partition(".")
        if method == "__init__":
            stored = {
                one.attr
                for one in nodes(p.values[1], ast.Attribute)
                if isinstance(one.ctx, ast.Store)
            }
            unread |= {(owner, n) for n in parameters(p.values[1]) if n in stored - read}
    assert unread == set(UNREAD)


def test_a_sink_would_be_found():
    (name, node), *_ = functions(ast.parse("def f(x, mask=None, **kwargs):\n    return x"))
    with pytest.raises(AssertionError, match="f takes and does not use mask, kwargs"):
        test_every_argument_is_used(name, node)
    with pytest.raises(pytest.fail.Exception, match=r"f takes \*\*kwargs and neither"):
        test_keywords_by_any_name_are_passed_on_or_refused(name, node)
