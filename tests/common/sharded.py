# SPDX-License-Identifier: BSD-3-Clause
"""The operators of shards of a vocabulary, of all shards in one process, as one operator of whole
rows: what simulated_cross_entropy.check() and simulated_linear.check() compare with the reference.

Every shard's results are held to be the first one's, to the bit; gradients of columns and classes
are put side by side, the shares of hidden states are added up.
"""

import itertools

import torch
from accuracy import assert_same_bits
from cuda_sim import ORDERS
from simulated_cross_entropy import DIFFERENTIABLE, OUTPUTS, Call, SimulatedCrossEntropy
from simulated_linear import NEEDS, LinearCall, SimulatedLinear, named


def shards_of(cuts, classes):
    """(vocab_start, columns) of each; cuts: shares of the classes, of which some may be 0."""
    bounds = [round(classes * c / sum(cuts)) for c in itertools.accumulate(cuts, initial=0)]
    return [(a, b - a) for a, b in itertools.pairwise(bounds)]


class _Rows:
    """What the two forms have in common."""

    def same_results(self, every):
        first, *others = [[self.sim.download(x) for x in results] for results in every]
        for other in others:
            for name, a, b in zip(OUTPUTS, first, other, strict=True):
                assert_same_bits(a, b, name)
        return dict(zip(OUTPUTS, first, strict=True))

    def gathered(self, messages):
        return self.upload(torch.stack([self.sim.download(m) for m in messages]))

    def incoming(self, call, upstream):
        """The backward's arguments before those of the forward."""
        wide = call.results["loss"].dtype
        grads = [upstream.get(name) for name in DIFFERENTIABLE]
        grads = [None if g is None else self.upload(g.to(wide)) for g in grads]
        names = ("row_sums", "entropy", "log_prob", "smooth_distance", "totals")
        return [*grads, *[self.upload(call.results[name]) for name in names]]


class ShardedCrossEntropy(_Rows, SimulatedCrossEntropy):
    def __init__(self, cuts, device=None):
        super().__init__(device)
        self.cuts = cuts

    def __call__(self, logits, target, mask=None, *, order=ORDERS[0], statistics=True, **options):
        call = _ShardedCall(self, logits, target, mask, options)
        shared = (*call.tensors[1:], *call.numbers(), statistics, None)
        with self.sim.order(order):
            sums = self.ops._vocab_parallel_cross_entropy_sums
            messages = self.gathered([sums(x, *shared, *at) for x, *at in call.shards])
            results = self.ops.vocab_parallel_cross_entropy
            every = [results(x, *shared, *at, messages) for x, *at in call.shards]
        call.results = self.same_results(every)
        return call


class _ShardedCall(Call):
    def __init__(self, op, logits, target, mask, options):
        super().__init__(op, logits, target, mask, options)
        cuts = shards_of(op.cuts, logits.shape[-1])
        self.columns = [logits[..., start : start + n] for start, n in cuts]
        at = [(start, logits.shape[-1]) for start, _ in cuts]
        uploaded = [op.upload(x.contiguous()) for x in self.columns]
        self.shards = [(x, *place) for x, place in zip(uploaded, at, strict=True)]

    def backward(self, upstream, order=ORDERS[0], needs=(True, True), in_place=False):
        op, found = self.op, []
        before = op.incoming(self, upstream)
        shared = (*self.inputs[1:], None, *self.numbers(), False, None)
        with op.sim.order(order):
            for x, (logits, *at) in zip(self.columns, self.shards, strict=True):
                if in_place:
                    over = op.sim.upload(x.contiguous(), writable=True)
                    backward = op.ops._vocab_parallel_cross_entropy_backward_
                    weights = backward(*before, over, *shared, *at, needs[1])
                    found.append((over, weights))
                else:
                    backward = op.ops._vocab_parallel_cross_entropy_backward
                    found.append(backward(*before, logits, *shared, *at, *needs))
        found = [[op.sim.download(x) for x in grads] for grads in found]
        for _, weights in found[1:]:
            assert_same_bits(weights, found[0][1], "grad token_weight")
        return {
            "logits": torch.cat([logits for logits, _ in found], -1),
            "token_weight": found[0][1],
        }


class ShardedLinear(_Rows, SimulatedLinear):
    def __init__(self, cuts, device=None):
        super().__init__(device)
        self.cuts = cuts

    def __call__(self, hidden, weight, target, mask=None, *, order=ORDERS[0], **options):
        call = _ShardedLinearCall(self, hidden, weight, target, mask, options)
        with self.sim.order(order):
            sums = self.ops._vocab_parallel_linear_cross_entropy_sums
            results = self.ops.vocab_parallel_linear_cross_entropy
            messages = self.gathered([sums(*a) for a in call.every(call.tensors, True)])
            every = [results(*a, messages) for a in call.every(call.tensors, True)]
        call.results = self.same_results(every)
        return call

    def sweep(self, *args, **options):
        """There is none: the ordinary ways for an incoming gradient of 1."""
        call = self(*args, **options)
        one = {"loss": torch.ones((), dtype=call.results["loss"].dtype)}
        return call.results | call.backward(one)


class _ShardedLinearCall(LinearCall):
    def __init__(self, op, hidden, weight, target, mask, options):
        super().__init__(op, hidden, weight, target, mask, options)
        self.bounds, self.classes = shards_of(op.cuts, weight.shape[0]), weight.shape[0]
        cut = [slice(start, start + n) for start, n in self.bounds]
        layer = (weight, options.get("bias"))
        parts = [[None if x is None else x[one].clone() for x in layer] for one in cut]
        self.layers = [list(map(op.upload, part)) for part in parts]

    def every(self, tensors, statistics):
        """The arguments of each shard."""
        for (start, _), layer in zip(self.bounds, self.layers, strict=True):
            given = (tensors[0], *layer, *tensors[3:])
            yield *given, *self.numbers(), statistics, *self.more(), start, self.classes

    def backward(self, upstream, order=ORDERS[0], needs=NEEDS):
        op = self.op
        before = op.incoming(self, upstream)
        backward = op.ops._vocab_parallel_linear_cross_entropy_backward
        with op.sim.order(order):
            tensors = [*self.inputs, None]
            found = [backward(*before, *a, *needs) for a in self.every(tensors, False)]
        hidden, weight, bias, weights = zip(
            *[[op.sim.download(x) for x in grads] for grads in found], strict=True
        )
        for other in weights[1:]:
            assert_same_bits(other, weights[0], "grad token_weight")
        return named((sum(hidden), torch.cat(weight), torch.cat(bias), weights[0]))
