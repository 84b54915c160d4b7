# SPDX-License-Identifier: BSD-3-Clause
"""Numbers that anyone can check on paper, for every public function and for the reference.

The squared differences of the token losses, B = 2, T = 3, C = 2:

    token        d        d^2      sum   mean over C
    [0, 0]     1,  2     1,  4       5   2.5      kept, foreground (m = 1)
    [0, 1]     3, -1     9,  1      10   5        kept, background (m = 0)
    [0, 2]     9,  9    81, 81     162   81       padding
    [1, 0]     2,  0     4,  0       4   2        kept, half (m = 0.5)
    [1, 1]     7,  7    49, 49      98   49       padding
    [1, 2]     5,  5    25, 25      50   25       padding

With fg = 2 and bg = 1 the edit weights of the kept tokens are 2, 1 and 2 * 0.5 + 1 * 0.5 = 1.5.
"""

import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext import reference

NAN = float("nan")
DIFFERENCE = [[[1.0, 2], [3, -1], [9, 9]], [[2, 0], [7, 7], [5, 5]]]
ATTENTION = torch.tensor([[1, 1, 0], [1, 0, 0]])
EDIT = torch.tensor([[1.0, 0, 1], [0.5, 1, 0]])
OMEGA = torch.tensor([[[1.0], [3], [5]], [[2], [7], [9]]])  # [B, T, 1]
BOTH = pytest.mark.parametrize("module", [mle, reference], ids=["native", "reference"])


@pytest.fixture
def pair():
    """prediction (a leaf) and target with the differences above."""
    target = torch.tensor([[[10.0, 20], [30, 40], [50, 60]], [[1, 2], [3, 4], [5, 6]]])
    return (target + torch.tensor(DIFFERENCE)).requires_grad_(), target


def check(loss, expected):
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), torch.tensor(expected), rtol=1e-6, atol=0)


@BOTH
def test_token_loss_mean(module, pair):
    f = module.masked_edit_token_mean_loss
    check(f(*pair), (2.5 + 5 + 81 + 2 + 49 + 25) / 6)  # no mask: plain MSE
    check(f(*pair, ATTENTION), (2.5 + 5 + 2) / 3)
    check(f(*pair, ATTENTION, EDIT), (2 * 2.5 + 5 + 1.5 * 2) / 3)
    check(f(*pair, ATTENTION, EDIT, OMEGA), (2 * 2.5 + 3 * 5 + 2 * 1.5 * 2) / 3)
    check(f(*pair, ATTENTION, EDIT, None, 4.0, 0.5), (4 * 2.5 + 0.5 * 5 + 2.25 * 2) / 3)
    channels = torch.tensor([1.0, 10])  # (1 + 40) / 2, (9 + 10) / 2, (4 + 0) / 2
    check(f(*pair, ATTENTION, None, channels), (20.5 + 9.5 + 2) / 3)


@BOTH
def test_token_loss_reductions_and_default(module, pair):
    f = module.masked_edit_token_mean_loss
    check(f(*pair, ATTENTION, reduction="sum"), 9.5)
    check(f(*pair, ATTENTION, reduction="none"), [[2.5, 5, 0], [2, 0, 0]])
    check(f(*pair, ATTENTION, EDIT, reduction="sum"), 13.0)
    check(f(*pair, ATTENTION, edit_mask_default="foreground"), 2 * 9.5 / 3)
    check(f(*pair, torch.zeros(2, 3)), 0.0)
    check(f(*pair, torch.zeros(2, 3), reduction="sum"), 0.0)
    check(f(*pair, torch.zeros(2, 3), reduction="none"), [[0.0] * 3] * 2)


@BOTH
def test_token_loss_gradients(module, pair):
    prediction, target = pair[0], pair[1].requires_grad_()
    omega = OMEGA.clone().requires_grad_()
    module.masked_edit_token_mean_loss(prediction, target, ATTENTION, EDIT, omega).backward()
    # 2 * omega * w * d / (C * N) with C * N = 6; omega * w is 2, 3 and 3
    expected = [[[4 / 6, 8 / 6], [3.0, -1], [0, 0]], [[2, 0], [0, 0], [0, 0]]]
    check(prediction.grad, expected)
    check(-target.grad, expected)
    # w * sum of d^2 over C / 6
    check(omega.grad, [[[2 * 5 / 6], [10 / 6], [0]], [[1.5 * 4 / 6], [0], [0]]])


@pytest.mark.parametrize("cls", [mle.AttentionMaskMseLoss, mle.ChannelInvariantTokenLoss])
def test_token_loss_module(cls, pair):
    check(cls()(*pair, ATTENTION), 9.5 / 3)
    check(cls()(*pair, ATTENTION, EDIT), 13 / 3)
    check(cls(4.0, 0.5)(*pair, ATTENTION, EDIT), 17 / 3)  # 10 + 2.5 + 4.5
    check(cls(reduction="sum")(*pair, ATTENTION, EDIT, OMEGA), 26.0)
    check(cls(reduction="none")(*pair, ATTENTION), [[2.5, 5, 0], [2, 0, 0]])
    check(cls(edit_mask_default="foreground")(*pair, ATTENTION), 19 / 3)
    check(cls()(*pair, ATTENTION, weighting=2.0), 19 / 3)


@BOTH
def test_multi_resolution(module, pair):
    f = module.compute_loss_multi_resolution
    check(f(*pair, ATTENTION), 19 / 6)  # (5 + 10 + 4) / (3 * 2)
    check(f(*pair, ATTENTION, EDIT), 13 / 3)
    check(f(*pair, ATTENTION, None, OMEGA), (2.5 + 3 * 5 + 2 * 2) / 3)
    check(f(*pair, torch.zeros(2, 3)), 0.0)


def test_mask_edit_loss(pair):
    for f in (mle.MaskEditLoss(), reference.mask_edit_loss):
        check(f(*pair), 2 * 329 / 12)  # all foreground; 5 + 10 + 162 + 4 + 98 + 50 = 329
        # weights by token 2, 1, 2; 1.5, 2, 1
        total = 2 * 5 + 10 + 2 * 162 + 1.5 * 4 + 2 * 98 + 50
        check(f(*pair, None, EDIT, "sum"), total)
        check(f(*pair, edit_mask=EDIT), total / 12)
        check(f(*pair, edit_mask=EDIT, attention_mask=ATTENTION), (10 + 10 + 6) / 6)
        check(f(*pair, OMEGA, EDIT, "sum", attention_mask=ATTENTION), 10.0 + 30 + 12)
        none = f(*pair, edit_mask=EDIT, reduction="none", attention_mask=ATTENTION)
        check(none, [[[2.0, 8], [9, 1], [0, 0]], [[6, 0], [0, 0], [0, 0]]])
    check(mle.MaskEditLoss(forground_weight=3.0)(*pair), 3 * 329 / 12)
    check(mle.MaskEditLoss(3.0, 1.0)(*pair), 3 * 329 / 12)


def test_mse_loss(pair):
    for f in (mle.MseLoss(), reference.mse_loss):
        check(f(*pair), 329 / 12)
        check(f(*pair, OMEGA), (5 + 30 + 5 * 162 + 8 + 7 * 98 + 9 * 50) / 12)
        check(f(torch.tensor(3.0), torch.tensor(1.0)), 4.0)  # any rank
        check(f(torch.tensor([3.0, 1]), torch.tensor([1.0, 0])), 2.5)
    check(mle.MseLoss("sum")(*pair), 329.0)
    check(mle.MseLoss("none")(*pair)[0], [[1.0, 4], [9, 1], [81, 81]])


@BOTH
def test_masked_autoencoder_errors(module):
    # d = 1, -2, 3, 4 / 0, 5, NaN, 1; kept: 1, 3 / 5, 1: squares 1, 9, 25, 1 = 36 in 4 positions
    x = torch.zeros(2, 4)
    recon = torch.tensor([[1.0, -2, 3, 4], [0, 5, NAN, 1]], requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    for f, default in ((module.masked_sse, 18.0), (module.masked_mse, 9.0)):
        check(f(recon, x, mask), default)
        check(f(recon, x, mask, reduction="sum"), 36.0)
        check(f(recon, x, mask, reduction="batch_mean"), 36 / 2)
        check(f(recon, x, mask, reduction="mean"), 36 / 4)
        for reduction in ("sum", "batch_mean", "mean"):
            check(f(recon, x, torch.zeros_like(mask), reduction=reduction), 0.0)
    module.masked_mse(recon, x, mask).backward()
    check(recon.grad, [[0.5, 0, 1.5, 0], [0, 2.5, 0, 0.5]])  # 2 d / 4


@BOTH
def test_masked_autoencoder_tokens(module):
    # [B, L, D] with a [B, L] mask: the mean is over n * D elements
    recon = torch.tensor([[[1.0, 2], [NAN, 7], [3, 4]]])
    mask = torch.tensor([[1, 0, 1]])
    check(module.masked_mse(recon, torch.zeros(1, 3, 2), mask), 30 / 4)
    check(module.masked_sse(recon, torch.zeros(1, 3, 2), mask), 30.0)


@BOTH
def test_map_mask_to_latent(module):
    # 32 x 48 pixels = 4 x 6 cells of 8 x 8 = 2 x 3 tokens of 16 x 16
    image = torch.zeros(1, 32, 48)
    image[0, :8, :8] = 1  # one full cell of token 0: the strongest cell decides
    image[0, 0, 16:24] = 1  # 8 of the 64 pixels of a cell of token 1
    image[0, 4:12, 40:48] = 1  # 32 pixels in each of two cells of token 2
    image[0, 16:32, 0:16] = 0.25  # a soft token 3
    image[0, 31, 47] = 1  # one pixel of token 5
    check(module.map_mask_to_latent(image), [[1, 1 / 8, 1 / 2, 1 / 4, 0, 1 / 64]])


@BOTH
def test_map_mask_to_latent_drops_the_rest(module):
    image = torch.zeros(1, 19, 23)  # 2 x 2 whole cells: one token
    image[0, 16:, :] = 1
    image[0, :, 16:] = 1
    check(module.map_mask_to_latent(image), [[0.0]])


@BOTH
def test_map_mask_to_latent_of_byte_images(module):
    image = torch.zeros(1, 16, 16, dtype=torch.uint8)
    image[0, 0, :4] = 255  # 0/255 images are masks too: 4 of 64 pixels
    check(module.map_mask_to_latent(image), [[4 / 64]])
    check(module.map_mask_to_latent(image != 0), [[4 / 64]])


@BOTH
def test_padding_helpers(module):
    latents = [torch.tensor([[1.0, 2]]), torch.tensor([[3.0, 4], [5, 6], [7, 8]])]
    padded, mask = module.pad_latents_for_multi_res(latents)
    check(padded, [[[1.0, 2], [0, 0], [0, 0]], [[3, 4], [5, 6], [7, 8]]])
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    longer, mask = module.pad_latents_for_multi_res(latents, 4)
    assert longer.shape == (2, 4, 2) and mask.sum(1).tolist() == [1, 3]
    assert longer[:, 3].eq(0).all()
    lengths = module.lengths_to_mask(torch.tensor([2, 0, 1]))
    assert lengths.tolist() == [[True, True], [False, False], [True, False]]
    assert module.lengths_to_mask(torch.tensor([1]), 3).tolist() == [[True, False, False]]
    rows = module.unpad(padded, torch.tensor([[1, 0, 0], [1, 0, 1]]))
    assert [row.tolist() for row in rows] == [[[1.0, 2]], [[3.0, 4], [7.0, 8]]]


@BOTH
def test_masks_with_one_row_or_column(module, pair):
    f = module.masked_edit_token_mean_loss
    check(f(*pair, torch.tensor([[1, 0, 1]])), (2.5 + 81 + 2 + 25) / 4)
    check(f(*pair, torch.tensor([[0], [1]])), (2 + 49 + 25) / 3)
    check(f(*pair, None, torch.tensor([[1.0, 0, 0]])), (2 * 2.5 + 5 + 81 + 2 * 2 + 49 + 25) / 6)


@BOTH
def test_one_mask_for_all_channels(module):
    # [B, C, H, W] = [2, 2, 1, 2], mask [2, 1, 1, 2]: the first pixel of one image, the second of
    # the other, so 1, 9 and 36, 64; four elements count
    recon = torch.tensor([[[[1.0, NAN]], [[3, 4]]], [[[5, 6]], [[NAN, 8]]]], requires_grad=True)
    x, mask = torch.zeros(2, 2, 1, 2), torch.tensor([[[[1, 0]]], [[[0, 1]]]])
    check(module.masked_mse(recon, x, mask), 110 / 4)
    check(module.masked_sse(recon, x, mask), 110 / 2)
    module.masked_mse(recon, x, mask).backward()
    check(recon.grad, [[[[0.5, 0]], [[1.5, 0]]], [[[0, 3.0]], [[0, 4]]]])  # 2 d / 4


@BOTH
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.uint16])
def test_edit_masks_of_0_and_255(module, pair, dtype):
    edit = torch.tensor([[255, 0, 255], [0, 255, 0]]).to(dtype)
    f = module.masked_edit_token_mean_loss
    check(f(*pair, ATTENTION, edit), (2 * 2.5 + 5 + 2) / 3)
    elements = torch.full((1, 2), 255, dtype=torch.uint8)  # an edit mask per element
    op = mle.ops.masked_squared_error.masked_squared_error
    terms = op(torch.ones(1, 2), torch.zeros(1, 2), None, elements, reduction="none")
    check(terms, [[2.0, 2.0]])


def test_mse_loss_takes_what_the_other_losses_take(pair):
    check(mle.MseLoss()(*pair, attention_mask=ATTENTION), 19 / 6)
    check(mle.MseLoss("sum")(*pair, attention_mask=ATTENTION, edit_mask=EDIT), 19.0)
    check(mle.MseLoss()(*pair, None, attention_mask=None, edit_mask=EDIT), 329 / 12)
    keywords = {"attention_mask": ATTENTION, "edit_mask": None, "weighting": OMEGA}
    for loss, weight in (
        (mle.MseLoss(), 1),
        (mle.AttentionMaskMseLoss(), 1),
        (mle.MaskEditLoss(), 2),
    ):
        expected = weight * (5 + 3 * 10 + 2 * 4) / 6
        check(loss(model_pred=pair[0], target=pair[1], **keywords), expected)


def test_doubling_the_channels_changes_nothing(pair):
    prediction, target = pair
    twice = mle.AttentionMaskMseLoss()(
        prediction.repeat(1, 1, 2), target.repeat(1, 1, 2), ATTENTION
    )
    check(twice, 9.5 / 3)
