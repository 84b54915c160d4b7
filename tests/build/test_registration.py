# SPDX-License-Identifier: BSD-3-Clause
"""Every operator, as the dispatcher lists them, has all its parts."""

import re
from pathlib import Path

import pytest
import torch

import masked_loss_ext
from masked_loss_ext.build import sources

TESTS = Path(__file__).resolve().parents[1]
SOURCES = sources.csrc_dir()
NAMESPACE = "masked_loss_ext"
# One function for all devices.
WITHOUT_KERNELS = {"_half_products", "_snapshot", "_version", "cpu_capability"}
# Families of operators, all integer: nothing to differentiate, no .inc per instruction set.
FAMILIES = {
    "block_mask": {"interval_block_lists", "nested_dropout_plan", "packed_rows"},
    "repetition": {"repetition_counts", "repetition_links"},
}
ROOMS = {
    "masked_squared_error": "elementwise",
    "masked_cross_entropy": "cross_entropy",
    "vocab_parallel_cross_entropy": "cross_entropy",
    "vocab_parallel_linear_cross_entropy": "linear_cross_entropy",
}
FORMULAS = {"linear_cross_entropy": "cross_entropy"}  # the room whose formulas those are
INTEGER = {name: family for family, names in FAMILIES.items() for name in names}
REFERENCE = {
    "block_mask": "attention",
    "linear_cross_entropy": "masked_linear_cross_entropy",
    "vocab_parallel_cross_entropy": "masked_cross_entropy",  # of whole rows
    "vocab_parallel_linear_cross_entropy": "masked_linear_cross_entropy",
}
# Both forms stand in one module.
MODULES = dict.fromkeys([name for name in REFERENCE if "parallel" in name], "vocab_parallel")


def operators():
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.split("::")[1].split(".")[0] for n in names if n.startswith(NAMESPACE + "::")})


def family(name):
    return INTEGER.get(name) or base_name(name)


TENSOR_OPERATORS = [name for name in operators() if name not in WITHOUT_KERNELS]


def has_kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def source_text(pattern):
    return "\n".join(p.read_text() for p in sorted(SOURCES.rglob(pattern)))


def base_name(name):
    name = name.removeprefix("_").removesuffix("_")
    for step in ("_backward", "_sweep", "_scale_gradient", "_sums"):
        name = name.removesuffix(step)
    return name


def test_the_operators_are_these():
    assert operators() == [
        "_cross_entropy_terms_backward",
        "_half_products",
        "_linear_cross_entropy_backward",
        "_linear_cross_entropy_sweep",
        "_masked_cross_entropy_backward",
        "_masked_cross_entropy_backward_",
        "_masked_cross_entropy_scale_gradient_",
        "_masked_cross_entropy_sweep",
        "_masked_cross_entropy_sweep_",
        "_masked_squared_error_backward",
        "_snapshot",
        "_version",
        "_vocab_parallel_cross_entropy_backward",
        "_vocab_parallel_cross_entropy_backward_",
        "_vocab_parallel_cross_entropy_sums",
        "_vocab_parallel_linear_cross_entropy_backward",
        "_vocab_parallel_linear_cross_entropy_sums",
        "cpu_capability",
        "cross_entropy_terms",
        "interval_block_lists",
        "linear_cross_entropy",
        "masked_cross_entropy",
        "masked_squared_error",
        "nested_dropout_plan",
        "packed_rows",
        "repetition_counts",
        "repetition_links",
        "vocab_parallel_cross_entropy",
        "vocab_parallel_linear_cross_entropy",
    ]


@pytest.mark.parametrize("name", TENSOR_OPERATORS)
def test_cpu_kernel_fake_and_derivative(name):
    assert has_kernel(name, "CPU")
    assert has_kernel(name, "Meta"), "no fake"
    # A derivative, or one that refuses: without it a gradient would be lost in silence.
    if name in INTEGER:
        arguments = getattr(torch.ops.masked_loss_ext, name).default._schema.arguments
        assert not any("float" in str(a.type) for a in arguments)
    else:
        assert has_kernel(name, "Autograd"), "no derivative"


@pytest.mark.parametrize("name", TENSOR_OPERATORS)
def test_cuda_kernel(name):
    library = sources.PACKAGE / sources.LIBRARY
    built_with_cuda = library.is_file() and sources.read_build_info(library)["cuda"] != "none"
    if masked_loss_ext._library_kind == "aot" and built_with_cuda:
        assert has_kernel(name, "CUDA")
    texts = [p.read_text() for p in SOURCES.rglob("*") if p.suffix in (".cu", ".h")]
    registered = re.compile(rf'm\.impl\(\s*"{name}"')
    assert any(registered.search(text) for text in texts), f"no source registers {name} for CUDA"


@pytest.mark.parametrize("name", TENSOR_OPERATORS)
def test_one_name_in_every_layer(name):
    base = family(name)
    room = SOURCES / ROOMS.get(base, base)
    assert (SOURCES / FORMULAS.get(room.name, room.name) / "formula.h").is_file()
    assert (room / "call.h").is_file()
    assert list(room.glob("cpu/*.cpp")) and list(room.glob("cuda/*.cu"))
    assert (sources.PACKAGE / "ops" / f"{MODULES.get(base, base)}.py").is_file()
    assert hasattr(masked_loss_ext.reference, REFERENCE.get(base, base))


@pytest.mark.parametrize("name", TENSOR_OPERATORS)
def test_every_operator_has_its_tests(name):
    called = re.compile(rf"torch\.ops\.{NAMESPACE}\.{name}(\.default)?$", re.MULTILINE)
    for kind, what in (("compile", "opcheck"), ("errors", "test of its errors")):
        texts = [path.read_text() for path in TESTS.glob(f"*/test_*{kind}.py")]
        assert any(called.search(text) for text in texts), f"no {what}"


def test_each_schema_is_written_once():
    schemas = (SOURCES / "schemas.cpp").read_text()
    everything = source_text("*.cpp") + source_text("*.h") + source_text("*.cu*")
    for name in operators():
        declared = re.compile(rf'"{name}\([^"]*')
        assert len(declared.findall(schemas)) == 1, name
        assert len(declared.findall(everything)) == 1, name
    package = "\n".join(p.read_text() for p in sources.PACKAGE.rglob("*.py"))
    assert "library.define" not in package and "custom_op" not in package


def test_inputs_are_declared_read_only():
    """But for what an operator overwrites that says so by its name."""
    for name in TENSOR_OPERATORS:
        schema = getattr(torch.ops.masked_loss_ext, name).default._schema
        assert schema.is_mutable == name.endswith("_")
        arguments = (*schema.arguments, *schema.returns)
        aliased = [a.name for a in arguments if a.alias_info is not None]
        overwritten = "grad_logits" if "scale" in name else "logits"
        assert aliased == ([overwritten] if name.endswith("_") else [])


def test_version():
    assert torch.ops.masked_loss_ext._version() == masked_loss_ext.__version__
