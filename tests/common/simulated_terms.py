# SPDX-License-Identifier: BSD-3-Clause
"""cross_entropy_terms as its CUDA source computes it, run by the simulator of cuda_sim."""

import torch
from cases_terms import DIFFERENTIABLE, upstream_of
from cuda_sim import ORDERS
from simulated import Uploader

from masked_loss_ext import reference


class SimulatedTerms(Uploader):
    """The forward operator and its backward on tensors that are uploaded and downloaded again."""

    def __call__(self, arguments, upstream=None, order=ORDERS[0]):
        """As cases_terms.evaluate."""
        ops, up = torch.ops.masked_loss_ext_sim, self.upload
        a = dict(arguments)
        t = a.get("temperature")
        logits = a["logits"] if a["logits"].stride(-1) == 1 else a["logits"].contiguous()
        tensors = [logits, a["target"], a.get("mask")]
        tensors += [None if t is None else torch.as_tensor(t, dtype=torch.float64)]
        tensors += [a.get("classes"), *(a.get("links") or (None, None))]
        tensors = [up(tensor) for tensor in tensors]
        unscaled, ignore_index = a.get("unscaled", True), a.get("ignore_index", -100)
        asked = (
            True,
            True,
            unscaled,
            unscaled,
            tensors[4] is not None,
            *[tensors[5] is not None] * 2,
        )
        names = reference.CrossEntropyTerms._fields
        with self.sim.order(order):
            *outputs, sums = ops.cross_entropy_terms(*tensors, ignore_index, unscaled)
            results = {
                name: self.sim.download(out)
                for name, out, there in zip(names, outputs, asked, strict=True)
                if there
            }
            if upstream is None:
                upstream = upstream_like(results)
            grads = [upstream.get(name) for name in DIFFERENTIABLE]
            wide = results["scaled_log_prob"].dtype
            grads = [None if g is None else up(g.to(wide).contiguous()) for g in grads]
            grad = ops._cross_entropy_terms_backward(*grads, *tensors, sums, ignore_index)
            results["grad logits"] = self.sim.download(grad)
        return results


def upstream_like(results):
    """cases_terms.upstream_of by name."""
    fields = reference.CrossEntropyTerms._fields
    return upstream_of(reference.CrossEntropyTerms(*(results.get(name) for name in fields)))
