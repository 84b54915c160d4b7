# SPDX-License-Identifier: BSD-3-Clause
"""Arguments of check_padding that would be taken and not used, or end in somebody else's error."""

import math

import pytest
import torch

from masked_loss_ext import check_padding

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
X = torch.arange(8.0).reshape(2, 4)


def step(batch):
    return (batch["x"] * batch["mask"]).sum() / batch["mask"].sum()


def check(step=step, batch=None, mask=MASK, **options):
    batch = {"x": X, "mask": MASK} if batch is None else batch
    return check_padding(step, batch, mask, **dict(nonfinite=False) | options)


def nested(rows):
    return torch.nested.nested_tensor(list(rows.float()), layout=torch.jagged)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (dict(step=None), TypeError, "step must be callable, got NoneType"),
        (dict(step="step"), TypeError, "step must be callable, got str"),
        (dict(nonfinite="no"), ValueError, "nonfinite must be True or False, got 'no'"),
        (dict(nonfinite=None), ValueError, "nonfinite must be True or False, got None"),
        (dict(trim="no"), ValueError, "trim must be True or False, got 'no'"),
        (dict(trim=torch.ones(2)), ValueError, "trim must be True or False, got tensor"),
        (dict(ignore_index=1.5), TypeError, "ignore_index must be an int, got float"),
        (dict(ignore_index="0"), TypeError, "ignore_index must be an int, got str"),
        (dict(ignore_index=True), TypeError, "ignore_index must be an int or None, got bool"),
        (dict(ignore_index=2**63), ValueError, "ignore_index must fit int64, got 9223372036854775"),
        (
            dict(mask=MASK.float().to_sparse()),
            ValueError,
            "mask must be a dense tensor, got layout",
        ),
        (dict(mask=nested(MASK)), ValueError, "mask must be a plain tensor, got a nested one"),
        (dict(mask=MASK.to("meta")), ValueError, "mask must hold data, got a tensor on the device"),
        (dict(mask=MASK * math.nan), ValueError, "mask must be on where it is not 0, got NaN"),
        (dict(mask=MASK.to(torch.float8_e8m0fnu)), ValueError, "mask must be bool, integer or"),
        (dict(batch={"x": X.to("meta"), "mask": MASK}), ValueError, "mask must have the first dim"),
    ],
)
def test_arguments(arguments, error, text):
    with pytest.raises(error, match="^check_padding: " + text):
        check(**arguments)


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, "1e-3", True, 1j, torch.tensor(0.1)])
def test_tolerances(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^check_padding: {name} must be a "):
        check(**{name: value})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.uint64, torch.float8_e4m3fn])
def test_dtypes_of_masks(dtype):
    assert check(mask=MASK.to(torch.float32).to(dtype), trim=True)
    assert not check(lambda batch: batch["x"].sum(), mask=MASK.to(torch.float32).to(dtype))


def test_an_ignore_index_of_a_tensor():
    """As a tokenizer's pad_token_id comes from somebody's configuration."""
    labels = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])

    def by_value(batch):
        return batch["labels"][batch["labels"] != 0].double().mean()

    assert not check(by_value, {"labels": labels})
    assert check(by_value, {"labels": labels}, ignore_index=torch.tensor(0))
