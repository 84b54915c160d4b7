# SPDX-License-Identifier: BSD-3-Clause
"""Where the rows and the classes of a DTensor lie, and what lies with them: local parts in,
DTensors out. All by the public functions of torch.distributed.tensor, so that gradients and
torch.compile follow by themselves.

A mesh dimension may shard a dimension of the rows, or the last dimension (the "columns": classes or
channels), or nothing. Several may shard one dimension of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .._checks import check_tensor, is_dtensor, placements_text, refusal, shape_text


def is_supported(placement: Any) -> bool:
    """The strided Shard is derived from neither."""
    return isinstance(placement, (Shard, Replicate))


class Placed:
    """A DTensor of which the first ``dims`` dimensions are rows."""

    def __init__(self, function: str, name: str, tensor: Any, dims: int) -> None:
        self.function, self.name, self.tensor, self.dims = function, name, tensor, dims
        self.mesh, self.rows_shape = tensor.device_mesh, tensor.shape[:dims]
        self.rows: list[Any] = []  # the placements of what has one entry per row
        self.columns: list[int] = []  # the mesh dimensions that shard the last dimension
        for n, placement in enumerate(tensor.placements):
            if not is_supported(placement):
                rule = "be Shard or Replicate over each mesh dimension"
                got = f"{placements_text(tensor)}: redistribute it before"
                raise refusal(function, name, rule, got)
            of_rows = isinstance(placement, Shard) and placement.dim < dims
            self.rows.append(placement if of_rows else Replicate())
            if isinstance(placement, Shard) and not of_rows:
                self.columns.append(n)
        self.shards_rows = any(isinstance(placement, Shard) for placement in self.rows)

    def shards(self, dim: int) -> bool:
        """Whether dimension ``dim`` of the rows is cut."""
        return any(isinstance(p, Shard) and p.dim == dim for p in self.rows)

    def check_sequences(self, argument: str, rule: str, value: Any, instead: str = "") -> None:
        """Of what looks along the sequence, the last dimension of the rows."""
        if self.dims and self.shards(self.dims - 1):
            rule = f"{rule} where the sequence is sharded"
            got = f"{value} with {self.name} {placements_text(self.tensor)}{instead}"
            raise refusal(self.function, argument, rule, got)

    # --- in ---------------------------------------------------------------------------------------

    def local(self) -> torch.Tensor:
        """The part that is here; its gradient is placed as the whole."""
        return self.tensor.to_local()

    def operand(self, name: str, value: Any, first: int = 0) -> Any:
        """What of a tensor belongs to the rows that are here: of a DTensor or of a plain one, taken
        to be the same on all ranks of the mesh. Its dimension d goes with ``first`` + d of the
        rows; a size of 1 stands for any.

        No message, but where a DTensor lies otherwise and for the gradient of a whole tensor.
        """
        if value is None:
            return None
        self._check_fits(name, value, first)
        placements = [self._of_operand(placement, value, first) for placement in self.rows]
        whole = [Replicate()] * len(placements)
        if not is_dtensor(value):
            if placements == whole and not value.requires_grad:
                return value
            value = DTensor.from_local(value, self.mesh, whole, run_check=False)
        self.check_mesh(name, value)
        if list(value.placements) != placements:
            value = value.redistribute(placements=placements)
        pairs = zip(placements, self.rows, strict=True)
        # Each rank has what its own rows add to the gradient of an entry that stands for many.
        parts = [
            Partial() if isinstance(row, Shard) and not isinstance(p, Shard) else p
            for p, row in pairs
        ]
        return value.to_local(grad_placements=parts)

    def _of_operand(self, placement, value, first):
        if isinstance(placement, Shard):
            for dim in range(value.dim()):  # a placement's dim is no constant to torch.compile
                if placement.dim == first + dim:
                    whole = value.shape[dim] == self.rows_shape[first + dim]
                    return Shard(dim) if whole else Replicate()
        return Replicate()

    def row_operand(self, name: str, value: Any) -> Any:
        """An operand with one entry per row ``[...]``, or sizes of 1 in their place."""
        if isinstance(value, torch.Tensor) and value.dim() != self.dims:
            raise self._unfit(name, value)
        return self.operand(name, value)

    def _check_fits(self, name, value, first):
        """Of the whole's sizes, not of those that are here."""
        check_tensor(self.function, name, value)
        sizes = self.rows_shape[first:][: value.dim()]
        pairs = zip(value.shape, sizes, strict=False)
        if len(sizes) != value.dim() or any(n not in (1, size) for n, size in pairs):
            raise self._unfit(name, value)

    def _unfit(self, name, value):
        rule = f"have the shape of {self.name} {shape_text(self.tensor)}"
        rule += " without the last dimension" * (self.dims < self.tensor.dim())
        whole = " (of the whole, as that of a DTensor is)" * (not is_dtensor(value))
        return refusal(self.function, name, rule, shape_text(value) + whole)

    def number(self, name: str, value: Any) -> Any:
        """A number or a 0-d tensor, the same on all ranks."""
        if not is_dtensor(value):
            return value
        self.check_mesh(name, value)
        return value.full_tensor()  # no message but for what is still to be added up

    def check_mesh(self, name: str, value: Any) -> None:
        """Of a DTensor beside it, which must not have to be added up either."""
        if value.device_mesh != self.mesh:
            rule = f"be on the mesh of {self.name} {self.mesh}"
            raise refusal(self.function, name, rule, value.device_mesh)
        for placement in value.placements if value.dim() else ():
            if not is_supported(placement):
                rule = "be Shard or Replicate over each mesh dimension"
                raise refusal(self.function, name, rule, placements_text(value))

    # --- out --------------------------------------------------------------------------------------

    def spread(self, local: torch.Tensor | None, dims: int | None = None):
        """What is one per row (of the first ``dims`` dimensions of the rows) as a DTensor that lies
        as they do."""
        if local is None:
            return None
        shape = self.rows_shape[:dims]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.rows, run_check=False, shape=shape, stride=stride
        )

    def total(self, local: torch.Tensor) -> DTensor:
        """The sum of each rank's share, on all of them: an all-reduce of one number where the rows
        are sharded. Not left Partial, of which item() gives each rank its own share for the loss,
        without a word."""
        parts: list[Any] = [Partial() if isinstance(p, Shard) else p for p in self.rows]
        total = DTensor.from_local(local, self.mesh, parts, run_check=False)
        return total.redistribute(placements=[Replicate()] * len(parts))

    def whole(self, local: torch.Tensor) -> DTensor:
        """What is the same on all ranks."""
        placements = [Replicate()] * len(self.rows)
        return DTensor.from_local(local, self.mesh, placements, run_check=False)
