# SPDX-License-Identifier: BSD-3-Clause
"""Ragged -> padded + mask, and back; masks -> labels; image masks -> token masks."""

import torch
import torch.nn.functional as F

from ._checks import (
    check_int,
    check_integers,
    check_length,
    check_mask,
    check_rank,
    check_tensor,
    shape_text,
)

PATCH = 16  # pixels per latent token and side: 8 by the autoencoder, 2 by packing


def lengths_to_mask(lengths, max_len=None):
    """Mask of right-padded rows: ``mask[b, t] = t < lengths[b]``.

    >>> lengths_to_mask([1, 3])
    tensor([[ True, False, False],
            [ True,  True,  True]])

    Args:
        lengths: ``[B]`` integer tensor, or a list of ints.
        max_len: T. None takes the longest, which waits for the device where lengths is on a GPU.

    Returns:
        ``[B, T]`` bool, on the device of lengths.
    """
    name = "lengths_to_mask"
    if not isinstance(lengths, torch.Tensor):
        if not isinstance(lengths, (list, tuple)):
            raise TypeError(
                f"{name}: lengths must be a tensor or a list of ints, got {type(lengths).__name__}"
            )
        # Its own dtype, so that 1.5 is refused below instead of cut to 1.
        lengths = torch.as_tensor(lengths) if lengths else torch.zeros(0, dtype=torch.int64)
    check_rank(name, "lengths", lengths, 1, "[B]")
    check_integers(name, "lengths", lengths)
    if max_len is None:
        max_len = int(lengths.max()) if lengths.numel() else 0
    else:
        check_length(name, "max_len", max_len)
    return torch.arange(max_len, device=lengths.device) < lengths.unsqueeze(1)


def pad_latents_for_multi_res(latents, max_seq_len=None):
    """Stack latents of unequal length, zero-padded on the right, with the mask of what is real.

    >>> padded, mask = pad_latents_for_multi_res([torch.ones(1, 2), torch.ones(3, 2)])
    >>> padded.shape, mask.sum(1).tolist()
    (torch.Size([2, 3, 2]), [1, 3])

    Args:
        latents: list of ``[n_i, C]`` tensors. dtype and device of the first win.
        max_seq_len: T. None takes the longest.

    Returns:
        padded ``[B, T, C]``, differentiable in the latents, and mask ``[B, T]`` bool.
    """
    name = "pad_latents_for_multi_res"
    if isinstance(latents, torch.Tensor) or not hasattr(latents, "__iter__"):
        raise TypeError(f"{name}: latents must be a list of tensors, got {type(latents).__name__}")
    latents = list(latents)
    if not latents:
        raise ValueError(f"{name}: Cannot pad empty latent list: latents must hold at least one")
    for i, latent in enumerate(latents):
        check_tensor(name, f"latents[{i}]", latent)
        if latent.dim() != 2:
            raise ValueError(
                f"{name}: Expected 2D latent tensor [n, C] at index {i}, got {shape_text(latent)}"
            )
        if latent.shape[1] != latents[0].shape[1]:
            raise ValueError(
                f"{name}: Channel mismatch: latents[{i}] must have {latents[0].shape[1]} channels "
                f"like the first, got {latent.shape[1]}"
            )
    if max_seq_len is not None:
        check_length(name, "max_seq_len", max_seq_len)
    lengths = [latent.shape[0] for latent in latents]
    length = max(lengths) if max_seq_len is None else max_seq_len
    for i, n in enumerate(lengths):
        if n > length:
            raise ValueError(f"{name}: latents[{i}] of length {n} exceeds max_seq_len {length}")
    first = latents[0]
    padded = torch.nn.utils.rnn.pad_sequence([x.to(first) for x in latents], batch_first=True)
    padded = F.pad(padded, (0, 0, 0, length - max(lengths)))
    return padded, lengths_to_mask(torch.tensor(lengths, device=first.device), length)


def unpad(padded, mask):
    """The rows of a padded batch without their padding.

    >>> [row.tolist() for row in unpad(torch.tensor([[1, 2], [3, 0]]), lengths_to_mask([2, 1]))]
    [[1, 2], [3]]

    Sizes depend on the data, so this waits for the device on a GPU.

    Args:
        padded: ``[B, T, ...]``.
        mask: ``[B, T]`` any dtype, kept where not 0 (padding may be anywhere).

    Returns:
        list of B tensors ``[n_b, ...]``, differentiable in padded.
    """
    check_tensor("unpad", "padded", padded)
    check_tensor("unpad", "mask", mask)
    check_rank("unpad", "mask", mask, 2, "[B, T]")
    if padded.shape[:2] != mask.shape:
        raise ValueError(
            f"unpad: mask must have the first two dimensions of padded {shape_text(padded)}, "
            f"got {shape_text(mask)}"
        )
    keep = mask != 0
    return list(padded[keep].split(keep.sum(1).tolist()))


def mask_labels(labels, mask, *, ignore_index=-100):
    """Labels for a loss that takes no mask: ``ignore_index`` wherever the mask is off.

    >>> mask_labels(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]))
    tensor([[   5,    6,    7],
            [   8, -100, -100]])

    The same as ``labels.masked_fill(mask == 0, ignore_index)``:

    >>> expected = labels.masked_fill(attention_mask == 0, -100)
    >>> assert torch.equal(mask_labels(labels, attention_mask), expected)

    Labels that are ``ignore_index`` already (a prompt, say) stay so. Whoever counts the labels that
    are not ``ignore_index`` then counts exactly what the loss counts. The functions of this library
    take the mask itself and need no such labels.

    Args:
        labels: ``[...]`` integers of any width.
        mask: ``[...]``, the same shape, any dtype, a label stays where it is not 0.
        ignore_index: must fit the dtype of labels (-100 does not fit uint8: ValueError).

    Returns:
        ``[...]`` a new tensor in the dtype of labels.
    """
    name = "mask_labels"
    check_integers(name, "labels", labels)
    check_tensor(name, "mask", mask)
    check_mask(name, "mask", mask, "labels", labels, labels.dim())
    check_int(name, "ignore_index", ignore_index)
    limits = torch.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(
            f"{name}: ignore_index must fit the dtype of labels {labels.dtype}, "
            f"{limits.min} to {limits.max}, got {ignore_index}"
        )
    return torch.where(mask != 0, labels, ignore_index)


def map_mask_to_latent(image_mask):
    """Pixel mask -> one value per latent token of 16 x 16 pixels.

    8 x 8 average pooling (the autoencoder's stride; a rest of the image is dropped), then the
    maximum of each 2 x 2 group, flattened row by row:

    >>> mask = (torch.arange(32 * 48).reshape(1, 32, 48) % 7 == 0).float()
    >>> pooled = torch.nn.functional.avg_pool2d(mask[:, None], 8)
    >>> expected = torch.nn.functional.max_pool2d(pooled, 2).flatten(1)
    >>> torch.testing.assert_close(map_mask_to_latent(mask), expected)

    Args:
        image_mask: ``[B, H, W]``, H // 8 and W // 8 even. bool and integers count as 1 where not 0
            (so 0/255 image masks work); floating values are taken as they are, in [0, 1].

    Returns:
        ``[B, (H // 16) * (W // 16)]`` float32 (float64), in [0, 1]: an edit mask for the losses.
    """
    check_tensor("map_mask_to_latent", "image_mask", image_mask)
    check_rank("map_mask_to_latent", "image_mask", image_mask, 3, "[B, H, W]")
    if not image_mask.is_floating_point():
        image_mask = image_mask != 0
    height, width = image_mask.shape[1:]
    if height // 8 % 2 or width // 8 % 2:
        raise ValueError(
            f"map_mask_to_latent: image_mask must have H // 8 and W // 8 even, so that 8 x 8 cells "
            f"group two by two into {PATCH} x {PATCH} tokens, got {shape_text(image_mask)}"
        )
    if image_mask.dtype != torch.float64:
        image_mask = image_mask.to(torch.float32)
    if height < PATCH or width < PATCH:  # no token; the pooling functions refuse this
        return image_mask.new_zeros(image_mask.shape[0], 0)
    cells = F.avg_pool2d(image_mask.unsqueeze(1), 8)
    return F.max_pool2d(cells, 2).flatten(1)
