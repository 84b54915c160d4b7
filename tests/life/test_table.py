# SPDX-License-Identifier: BSD-3-Clause
"""The table that the tests of this room go through has every loss, and each has a gradient."""

import pytest
import torch
from life_cases import GRAPHS, MODULES, WITHOUT_GRADIENT, Call, is_module, named, of_public_calls
from life_cases import total as total_of
from public_calls import CALLS

import masked_loss_ext as mle


def test_every_public_module_is_in_it():
    made = {type(part) for life in MODULES for part in life.make().modules()}
    public = {getattr(mle, name) for name in mle.__all__ if is_module(name)}
    public |= {x for x in vars(mle.unified).values() if isinstance(x, type) and x in made}
    assert public <= made


@pytest.mark.parametrize("name", sorted(WITHOUT_GRADIENT))
def test_what_is_left_out_has_no_gradient(name):
    function, _, i = name.rpartition("_")
    inputs = of_public_calls()
    for x in inputs.values():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim():
            x.requires_grad_()
    if name != "packed_attention_2":  # FlexAttention has none on the CPU
        assert isinstance(total_of(Call(CALLS[function][int(i)])(inputs)), int)


@pytest.mark.parametrize(**named(GRAPHS))
def test_it_has_a_gradient_and_another_for_other_inputs(life):
    """Else the tests of this room would compare zeros."""
    module = life.make()
    found = [life.gradients(module, life.with_gradients(seed)) for seed in (0, 1)]
    assert any(g is not None and (g != 0).any() for g in found[0])
