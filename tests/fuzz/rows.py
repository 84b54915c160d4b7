# SPDX-License-Identifier: BSD-3-Clause
"""Random rows of logits with labels, masks, weights and every keyword, as a function gets them and
as the reference does."""

import torch
from accuracy_cross_entropy import STATISTICS

from masked_loss_ext.reference.cross_entropy import counted_rows
from tests.fuzz.choices import CONVERTED, INTEGERS, laid, mask_values, poisoned, used_by

CLASSES = (2, 3, 5, 8, 1, 9, 16, 17, 33)
WIDE = (1024, 1025, 2049)
NARROW = ("target", "mask", "segment_ids")  # may be [1, S] for [B, S]


def row_shape(c):
    sizes = [c.pick((3, 2, 1, 5, 4, 1, 7, 0)) for _ in range(3)]
    return tuple(sizes[: c.pick((2, 1, 2, 2, 3, 0))])


def numbers(c):
    """The keywords that are numbers; a tensor by lot where one may be."""
    wanted, options = c.byte(), {}
    if wanted & 1:
        options["label_smoothing"] = c.pick((0.1, 0.5, 1.0, 0.0, 1))
    temperature, as_tensor = c.pick((0.5, 2.0, 1.0, 0.7, 0.05, 30, 2)), c.below(2)
    if wanted & 2:
        options["temperature"] = torch.tensor(temperature) if as_tensor else temperature
    if wanted & 4:
        options["softcap"] = c.pick((3.0, 30.0, 0.5, 1000))
    if wanted & 8:
        options["z_loss"] = c.pick((1e-3, 0.3, 0.0, 1))
    if wanted & 16:
        options["focal_gamma"] = c.pick((2.0, 0.5, 1.0, 5.0, 0.0, 1.5))
    if wanted & 32:
        options["shift"] = c.pick((1, 2, 0, 3, 9))
    return options


def labels_of(c, g, rows, classes, banned=None):
    """Labels of any integer dtype, and the number that says a row is ignored."""
    dtype = c.pick((*INTEGERS[:2], *INTEGERS, *CONVERTED)) if classes < 100 else torch.int64
    signed = dtype in INTEGERS[:4]
    ignore = c.pick((-100 if signed else 120, -100 if signed else 120, 0, classes - 1, 77))
    labels = torch.randint(0, classes, rows, generator=g)
    if banned is not None:  # a label that is banned makes the loss infinite: tested apart
        labels = torch.where(banned[labels], 0, labels)
    share = c.pick((0.0, 0.3, 0.6, 1.0))
    labels = torch.where(torch.rand(rows, generator=g) < share, ignore, labels)
    return labels, dtype, ignore


class Problem:
    """given: what the function gets, by name. plain: the same for the reference, without strides,
    broadcasting, and dtypes that say the same. on: the rows that count."""

    def __init__(self, c, aggregations=(), values="logits"):
        self.c, self.values = c, values
        rows, classes = row_shape(c), c.pick(CLASSES)
        if c.chance(0.01):
            classes = c.pick(WIDE)
        self.rows, self.classes = rows, classes
        self.g = g = c.generator()
        self.options = numbers(c)
        if not rows:  # no sequence to shift along
            self.options.pop("shift", None)
        self.given, self.plain = {}, {}
        self._logits(c, g, (*rows, classes))
        self._tensors(c, g, rows, classes)
        self._reduction(c, aggregations)
        self.on = counted_rows(
            torch.empty(*rows, 0),
            self.plain["target"],
            self.plain.get("mask"),
            self.options.get("ignore_index", -100),
            self.options.get("shift", 0),
            self.plain.get("segment_ids"),
        )[1]
        self._temperatures(c, g)

    def for_statistics(self, labelled=True):
        """What row statistics take: no weights, no reduction; without labels none is ignored."""
        for name in ("weight", "token_weight", "segment_ids"):
            self.given.pop(name, None)
            self.plain.pop(name, None)
        kept = {"temperature", "softcap", "ignore_index"}
        self.options = {k: v for k, v in self.options.items() if k in kept} | {"reduction": "none"}
        if not labelled:
            self.plain["target"] = torch.zeros_like(self.plain["target"])
            self.options.pop("ignore_index", None)
        _, self.on = counted_rows(
            torch.empty(*self.rows, 0),
            self.plain["target"],
            self.plain.get("mask"),
            self.options.get("ignore_index", -100),
        )
        if "temperature" in self.plain:
            values = self.plain["temperature"].nan_to_num(0.8).masked_fill(~self.on, torch.nan)
            self.plain["temperature"] = self.given["temperature"] = values

    def _logits(self, c, g, shape):
        self.dtype, layout = c.dtype(), c.layout()
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        spread, banned = c.pick((2.0, 0.1, 10.0, 30.0)), c.chance(0.1)
        logits = torch.randn(shape, generator=g, dtype=torch.float64) * spread
        self.banned = None
        if banned:
            self.banned = torch.rand(shape[-1], generator=g) < 0.3
            self.banned[:1] = False
            self.options.pop("label_smoothing", None)  # it would be infinite
            logits = logits.masked_fill(self.banned, -torch.inf)
        self.put("logits", logits.to(self.dtype), layout)

    def put(self, name, tensor, layout="contiguous", dtype=None, narrow=False):
        """dtype: of what is given, which the reference has as it is."""
        if narrow and tensor.dim() > 1 and tensor.shape[0] > 1:
            tensor = tensor[:1]
        given = tensor if dtype is None else tensor.to(dtype)
        self.given[name] = laid(given, layout)
        rows = self.rows if name in NARROW else tensor.shape
        self.plain[name] = tensor.expand(rows)

    def _tensors(self, c, g, rows, classes):
        labels, dtype, ignore = labels_of(c, g, rows, classes, self.banned)
        wanted, narrow, layout = c.byte(), c.byte() & c.byte(), c.layout()
        if ignore != -100:
            self.options["ignore_index"] = ignore
        self.put("target", labels, layout, dtype, narrow & 1)
        kind, share = c.mask_dtype(), c.pick((0.6, 0.9, 0.2, 0.0, 1.0))
        if wanted & 1:
            on = torch.rand(rows, generator=g) < share
            self.put("mask", on, layout, None, narrow & 2)
            self.given["mask"] = laid(
                mask_values(on[:1] if narrow & 2 and on.dim() > 1 else on, kind), layout
            )
        weight_kind = c.pick((self.dtype, torch.float32, torch.int64))
        if wanted & 2:
            weight = torch.rand(classes, generator=g) * c.pick((1.0, 3.0))
            weight = weight.masked_fill(torch.rand(classes, generator=g) < 0.1, 0)
            weight = weight.to(weight_kind).to(self.dtype)
            self.put("weight", weight)
        if wanted & 4:
            values = torch.randn(rows, generator=g).to(self.dtype)
            self.put("token_weight", values, layout)
        if wanted & 8 and rows:
            ids = (torch.rand(rows, generator=g) < 0.4).cumsum(-1)
            self.put("segment_ids", ids, layout, c.pick((*INTEGERS, torch.uint16)), narrow & 4)

    def _reduction(self, c, aggregations):
        self.options["reduction"] = c.pick(("mean", "sum", "none", "mean", *aggregations))
        value, as_tensor = c.pick((7.5, 1, 0.25, 0.0, 123)), c.below(2)
        if self.options["reduction"] not in ("sum", "none") and c.chance(0.3):
            self.options["normalizer"] = torch.tensor(value) if as_tensor else value

    def _temperatures(self, c, g):
        """One per row by lot, NaN where that does not count."""
        if not c.chance(0.15) or not self.rows:
            return
        self.options.pop("temperature", None)
        values = torch.rand(self.rows, generator=g) + 0.5
        self.put("temperature", values.masked_fill(~self.on, torch.nan), "contiguous")

    def upstream(self, statistics):
        """Incoming gradients; those of rows that do not count are garbage in ``bad``."""

        def values(shape):
            return torch.randn((*shape, 2), generator=self.g)[..., 1]

        shape = self.rows if self.options["reduction"] == "none" else ()
        up = {"loss": values(shape)}
        if statistics:
            up |= {name: values(self.rows) for name in STATISTICS}
        rows = [name for name in up if name != "loss" or shape == self.rows]
        for name in rows:
            up[name] = torch.where(self.on, up[name], 0)
        garbage = {name: torch.where(self.on, up[name], torch.nan) for name in rows}
        return up, up | (garbage if self.options["reduction"] == "none" else {})

    def read(self):
        """Which positions hold the label and the weight of a row that counts."""
        shift = self.options.get("shift", 0)
        if shift == 0:
            return self.on
        read = torch.zeros_like(self.on)
        if self.on.dim():
            length = max(self.on.shape[-1] - shift, 0)
            read[..., shift:] = self.on[..., :length]
        return read

    def dressed(self, c):
        """The same values in other strides, and integers and masks of other dtypes."""
        found, kind, dtype = {}, c.mask_dtype(), c.pick(INTEGERS[:3])
        for name, tensor in self.given.items():
            if name == "mask":
                on = self.plain["mask"]
                on = on[:1] if tensor.shape != on.shape else on
                tensor = mask_values(on, kind)
            elif not tensor.dtype.is_floating_point and name != "weight":
                tensor = tensor.long().to(dtype)
            found[name] = laid(
                tensor.contiguous(), c.layout() if name != "weight" else "contiguous"
            )
        return found

    def with_garbage(self, kind, given=None):
        """given, with garbage in all that no row that counts has to do with."""
        bad, read = dict(given or self.given), self.read()
        bad[self.values] = poisoned(bad[self.values], ~self.on.unsqueeze(-1), kind)
        if "token_weight" in bad:
            bad["token_weight"] = poisoned(bad["token_weight"], ~read, kind)
        if "temperature" in bad:
            bad["temperature"] = poisoned(bad["temperature"], ~self.on, kind)
        if "mask" in bad:  # else the label itself says which rows count
            used = (self.plain["mask"] != 0) | read
            target = bad["target"]
            bad["target"] = poisoned(target, ~used_by(used, target.shape), kind)
        return bad

    def say(self, **more):
        said = self.c.said
        for name, value in (*self.given.items(), *self.options.items(), *more.items()):
            if isinstance(value, torch.Tensor) and value.dim():
                value = f"{str(value.dtype)[6:]}{list(value.shape)}/{value.stride()}"
            said[name] = value
        return self
