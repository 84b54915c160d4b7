# SPDX-License-Identifier: BSD-3-Clause
"""Ragged -> padded + mask, and back; masks -> labels; image masks -> token masks."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from ._checks import (
    as_integers,
    as_mask,
    check_device,
    check_flags,
    check_int,
    check_integers,
    check_length,
    check_like,
    check_mask,
    check_mask_dtype,
    check_rank,
    check_tensor,
    is_readable,
    refusal,
    shape_text,
)
from .reference.cross_entropy import counted_rows

PATCH = 16  # pixels per latent token and side: 8 by the autoencoder, 2 by packing


def lengths_to_mask(
    lengths: torch.Tensor | Sequence[int], max_len: int | None = None, *, clip: bool = False
) -> torch.Tensor:
    """Mask of right-padded rows: ``mask[b, t] = t < lengths[b]``.

    >>> lengths_to_mask([1, 3])
    tensor([[ True, False, False],
            [ True,  True,  True]])

    Args:
        lengths: ``[B]`` integer tensor, or a list, range or NumPy array of ints; not negative.
        max_len: T. None takes the longest, which waits for the device where lengths is on a GPU.
        clip: cut lengths above max_len to it; otherwise they are refused. Lengths on a GPU are not
            looked at, nor while tracing: there they are always cut.

    Returns:
        ``[B, T]`` bool, on the device of lengths.

    Raises:
        ValueError: a length that is negative, or above max_len without ``clip``.
    """
    name = "lengths_to_mask"
    check_flags(name, {"clip": clip})
    counts = lengths if isinstance(lengths, torch.Tensor) else _tensor_of(name, lengths)
    check_integers(name, "lengths", counts)
    check_rank(name, "lengths", counts, 1, "[B]")
    if max_len is not None:
        check_length(name, "max_len", max_len)
    elif counts.device.type == "meta":
        raise ValueError(f"{name}: max_len must be given where lengths has no data (device meta)")
    counts = counts.to(torch.int64)  # unsigned ones have no maximum
    if is_readable(counts) and counts.numel():
        check_length(name, "lengths", int(counts.min()), most=None)
        longest = int(counts.max())
        if max_len is not None and longest > max_len and not clip:
            rule = f"be at most max_len {max_len}"
            raise refusal(name, "lengths", rule, f"{longest}; clip=True cuts them")
    if max_len is None:
        max_len = int(counts.max()) if counts.numel() else 0
        check_length(name, "lengths", max_len)
    if not isinstance(lengths, torch.Tensor):
        counts = counts.to(torch.empty(0).device)  # the default, as torch.compile can trace it
    return torch.arange(max_len, device=counts.device) < counts.unsqueeze(1)


def _tensor_of(function, lengths):
    """Ints of the host as a tensor there, in a dtype of their kind, so that 1.5 is not cut to 1."""
    # An array of NumPy may be what tensors cannot be: reversed, read-only, of the other byte order.
    array = hasattr(lengths, "tolist")
    values = lengths.tolist() if array else lengths
    if isinstance(values, (list, tuple, range)):
        if not values:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        if bool in map(type, values):  # beside ints it would become one
            raise refusal(function, "lengths", "be integers", torch.bool)
    elif not array:
        rule, got = "be a tensor or a list of ints", type(lengths).__name__
        raise refusal(function, "lengths", rule, got, TypeError)
    try:
        return torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        rule, got = "be ints of at most 64 bits", f"a list: {error}"
        raise refusal(function, "lengths", rule, got) from None


def pad_latents_for_multi_res(
    latents: Iterable[torch.Tensor], max_seq_len: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack latents of unequal length, zero-padded on the right, with the mask of what is real.

    >>> padded, mask = pad_latents_for_multi_res([torch.ones(1, 2), torch.ones(3, 2)])
    >>> padded.shape, mask.sum(1).tolist()
    (torch.Size([2, 3, 2]), [1, 3])

    Args:
        latents: list of ``[n_i, C]`` tensors. dtype and device of the first win; it must be able to
            hold the others (no float becomes an integer, no complex number a real one).
        max_seq_len: T. None takes the longest.

    Returns:
        padded ``[B, T, C]``, differentiable in the latents, and mask ``[B, T]`` bool.
    """
    name = "pad_latents_for_multi_res"
    if isinstance(latents, torch.Tensor) or not hasattr(latents, "__iter__"):
        got = type(latents).__name__
        raise refusal(name, "latents", "be a list of tensors", got, TypeError)
    latents = list(latents)
    if not latents:
        raise ValueError(f"{name}: Cannot pad empty latent list: latents must hold at least one")
    first = latents[0]
    for i, latent in enumerate(latents):
        one = f"latents[{i}]"
        check_tensor(name, one, latent)
        if latent.dim() != 2:
            raise ValueError(
                f"{name}: Expected 2D latent tensor [n, C] at index {i}, got {shape_text(latent)}"
            )
        if latent.shape[1] != first.shape[1]:
            rule = f"have {first.shape[1]} channels like the first"
            raise refusal(name, f"Channel mismatch: {one}", rule, latent.shape[1])
        if _kind(latent) > _kind(first):
            rule = f"be of a dtype that fits that of the first {first.dtype}"
            raise refusal(name, one, rule, latent.dtype)
        if latent.device.type == "meta" != first.device.type:
            check_device(name, one, latent, "latents[0]", first)
    if max_seq_len is not None:
        check_length(name, "max_seq_len", max_seq_len)
    lengths = [latent.shape[0] for latent in latents]
    length = max(lengths) if max_seq_len is None else max_seq_len
    for i, n in enumerate(lengths):
        if n > length:
            raise ValueError(f"{name}: latents[{i}] of length {n} exceeds max_seq_len {length}")
    padded = torch.nn.utils.rnn.pad_sequence([x.to(first) for x in latents], batch_first=True)
    padded = F.pad(padded, (0, 0, 0, length - max(lengths)))
    return padded, lengths_to_mask(torch.tensor(lengths, device=first.device), length)


def _kind(tensor):
    """What torch.can_cast, which torch.compile cannot trace, goes by: more does not fit less."""
    if tensor.is_complex():
        return 3
    if tensor.is_floating_point():
        return 2
    return 0 if tensor.dtype == torch.bool else 1


def unpad(padded: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The rows of a padded batch without their padding.

    >>> [row.tolist() for row in unpad(torch.tensor([[1, 2], [3, 0]]), lengths_to_mask([2, 1]))]
    [[1, 2], [3]]

    Sizes depend on the data, so this waits for the device on a GPU.

    Args:
        padded: ``[B, T, ...]``.
        mask: ``[B, T]`` any dtype, kept where not 0 (padding may be anywhere); a size of 1 stands
            for any.

    Returns:
        list of B tensors ``[n_b, ...]``, differentiable in padded.
    """
    check_tensor("unpad", "padded", padded)
    check_tensor("unpad", "mask", mask)
    check_rank("unpad", "mask", mask, 2, "[B, T]")
    check_mask("unpad", "mask", mask, "padded", padded, 2, broadcast=True)
    keep = (mask != 0).expand(padded.shape[:2])
    return list(padded[keep].split(keep.sum(1).tolist()))


def mask_labels(
    labels: torch.Tensor, mask: torch.Tensor, *, ignore_index: int = -100
) -> torch.Tensor:
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
        mask: ``[...]``, the same shape, any dtype, a label stays where it is not 0. A size of 1
            stands for any.
        ignore_index: must fit the dtype of labels (-100 does not fit uint8: ValueError).

    Returns:
        ``[...]`` a new tensor in the dtype of labels.
    """
    name = "mask_labels"
    check_integers(name, "labels", labels)
    check_tensor(name, "mask", mask)
    check_mask(name, "mask", mask, "labels", labels, labels.dim(), broadcast=True)
    _check_ignore_index(name, ignore_index, labels)
    return torch.where(mask != 0, labels, ignore_index)


def _check_ignore_index(function, ignore_index, labels):
    check_int(function, "ignore_index", ignore_index)
    limits = torch.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        rule = f"fit the dtype of labels {labels.dtype}, {limits.min} to {limits.max}"
        raise refusal(function, "ignore_index", rule, ignore_index)


def shift_labels(
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    *,
    shift: int = 1,
    ignore_index: int = -100,
) -> torch.Tensor:
    r"""Labels where they are predicted, to be made before a sequence is cut over ranks.

    .. math:: y'_t = y_{t+k} \text{ if } t + k < S,\ m_{t+k} \ne 0 \text{ and } s_t = s_{t+k},
        \text{ else ignore\_index}

    with k = ``shift``. A loss that shifts what a rank has (``shift=1``, a model's own) loses the
    label of the last token of every part, as that lies on the next rank. These go with ``shift=0``
    and without a mask, cut like the tokens in whatever way; a token_weight has to be moved alike:

    >>> tokens = torch.tensor([[5, 6, 7, 8]])
    >>> shifted = shift_labels(tokens)
    >>> shifted
    tensor([[   6,    7,    8, -100]])
    >>> [part.tolist() for part in shifted.chunk(2, dim=1)]
    [[[6, 7]], [[8, -100]]]

    Without a mask and segment_ids the same as:

    >>> assert torch.equal(shift_labels(labels), F.pad(labels[:, 1:], (0, 1), value=-100))

    The parts' losses add up to that of the whole where each is divided by the tokens of all parts:
    ``normalizer=global_token_count(labels=part)`` of ``masked_loss_ext.distributed``. transformers'
    models and ``causal_lm_loss`` take them under this name, ``shift_labels=``.

    Args:
        labels: ``[..., S]`` integers; those that are ignore_index stay so, at their new place.
        mask: ``[..., S]`` any dtype, of the labels: one counts where it is not 0. None: all.
        segment_ids: ``[..., S]`` integers, for packed rows: none predicts another's label.
            Dimensions of size 1 of mask and segment_ids stand for any.
        shift: k, by how much labels stand after the position that predicts them.
        ignore_index: must fit the dtype of labels.

    Returns:
        ``[..., S]`` a new tensor in the dtype of labels; the last ``shift`` are ignore_index.
    """
    name = "shift_labels"
    check_integers(name, "labels", labels)
    if labels.dim() == 0:
        raise refusal(name, "labels", "be [..., S]", "[]")
    if mask is not None:
        check_tensor(name, "mask", mask)
        check_mask(name, "mask", mask, "labels", labels, labels.dim(), broadcast=True)
        mask = as_mask(name, "mask", mask)
    if segment_ids is not None:
        check_integers(name, "segment_ids", segment_ids)
        check_like(name, "segment_ids", segment_ids, "labels", labels, broadcast=True)
        segment_ids = as_integers(segment_ids).expand(labels.shape)
    check_length(name, "shift", shift)
    _check_ignore_index(name, ignore_index, labels)
    rows, target = labels.unsqueeze(-1), as_integers(labels)
    target, on = counted_rows(rows, target, mask, ignore_index, shift, segment_ids)
    return torch.where(on, target, ignore_index).to(labels.dtype)


def map_mask_to_latent(image_mask: torch.Tensor) -> torch.Tensor:
    """Pixel mask -> one value per latent token of 16 x 16 pixels.

    8 x 8 average pooling (the autoencoder's stride; a rest of the image is dropped), then the
    maximum of each 2 x 2 group, flattened row by row:

    >>> mask = (torch.arange(32 * 48).reshape(1, 32, 48) % 7 == 0).float()
    >>> pooled = torch.nn.functional.avg_pool2d(mask[:, None], 8)
    >>> expected = torch.nn.functional.max_pool2d(pooled, 2).flatten(1)
    >>> torch.testing.assert_close(map_mask_to_latent(mask), expected)

    Args:
        image_mask: ``[B, H, W]``, H // 8 and W // 8 even. bool and integers count as 1 where not 0
            (so 0/255 image masks work); floating values are taken as they are, in [0, 1]. On the
            CPU, where that costs next to nothing, a mask of 0 to 255.0 is refused.

    Returns:
        ``[B, (H // 16) * (W // 16)]`` float32 (float64), in [0, 1]: an edit mask for the losses.
    """
    name = "map_mask_to_latent"
    check_tensor(name, "image_mask", image_mask)
    check_rank(name, "image_mask", image_mask, 3, "[B, H, W]")
    check_mask_dtype(name, "image_mask", image_mask)
    if not image_mask.is_floating_point():
        image_mask = as_mask(name, "image_mask", image_mask) != 0
    height, width = image_mask.shape[1:]
    if height // 8 % 2 or width // 8 % 2:
        rule = (
            "have H // 8 and W // 8 even, so that 8 x 8 cells group two by two into "
            f"{PATCH} x {PATCH} tokens"
        )
        raise refusal(name, "image_mask", rule, shape_text(image_mask))
    if image_mask.dtype != torch.float64:
        image_mask = image_mask.to(torch.float32)
    if height < PATCH or width < PATCH:  # no token; the pooling functions refuse this
        return image_mask.new_zeros(image_mask.shape[0], 0)
    cells = F.avg_pool2d(image_mask.unsqueeze(1), 8)
    tokens = F.max_pool2d(cells, 2).flatten(1)
    # Resampling an image may leave a little more than 1; two is another scale, and NaN is none.
    if is_readable(tokens) and tokens.numel() and not (tokens.max() <= 2 and tokens.min() >= -1):
        got = f"averages of 8 x 8 pixels from {tokens.min():g} to {tokens.max():g}"
        got += "; divide a mask of 0 to 255 by 255"
        raise refusal(name, "image_mask", "be in [0, 1]", got)
    return tokens
