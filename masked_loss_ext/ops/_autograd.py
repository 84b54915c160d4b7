# SPDX-License-Identifier: BSD-3-Clause
"""The ways to an operator that has a derivative, made from its schema.

No single way to a native operator serves all of PyTorch:

- torch.compile and torch.export see ``torch.ops`` with ``register_fake`` and ``register_autograd``;
- torch.func needs an ``autograd.Function`` with ``setup_context`` and ``vmap``;
- forward-mode AD gets plain PyTorch: a jvp of our own would be right once, and 0 in silence within
  another;
- eager training takes the classic ``autograd.Function``, a third of that per call;
- without gradients the operator is called directly.

The backward operator is differentiable as well, through plain PyTorch: its gradients, vmap and
second derivative are those of the operator's plain form, which needs memory of the inputs' size.
Training does not come there.
"""

import collections
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from .._checks import refusal

# Private names, all in every torch that the library supports; without the first, the Python
# autograd kernel would run a second time in each call.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_is_active = torch._C._are_functorch_transforms_active
_is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor

# What the results of an operator look like: shape (None where it is left out) and dtype.
Like = tuple[Sequence[int] | None, torch.dtype]


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD may stand around the call."""
    return forward_ad._current_level >= 0 or _functorch_is_active()


def needs_plain() -> bool:
    """Whether plain PyTorch alone has all derivatives: in forward mode, and where torch.compile
    traces a transform, under which a registered operator loses tangents in silence."""
    if forward_ad._current_level >= 0:
        return True
    return _functorch_is_active() and torch.compiler.is_compiling()


def is_autocast(device: torch.device) -> bool:
    """Whether it is on there; of meta, which has none, asking that alone raises."""
    # Not by is_autocast_available(), which torch.compile of 2.10 does not trace.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_batch(grad: torch.Tensor | None) -> bool:
    """Whether a gradient is a batch of them (is_grads_batched): that is an older vmap, which
    torch.func does not know of."""
    return grad is not None and _is_legacy_batch(grad)


def refuse_two_devices(name: str, first: torch.Tensor, *others: Any) -> None:
    # One meta tensor among real ones brings the call to a fake, and the result would be real memory
    # that nobody has written.
    for other in others:
        if isinstance(other, torch.Tensor) and other.device != first.device:
            got = f"{first.device} and {other.device}"
            raise refusal(name, "all tensors", "be on one device", got)


def refuse_derivative(op: Any, instead: str) -> None:
    """For an operator without one: else the derivative would be lost in silence."""

    def refuse(*args):
        if torch.is_grad_enabled() and any(
            isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
        ):
            name = op._schema.name.partition("::")[2]
            raise RuntimeError(f"{name} has no derivative; call {instead}, or this under no_grad()")
        with _below_autograd():
            return op(*args)

    torch.library.impl(op._schema.name, "Autograd", refuse)


def _blank(tensor, like):
    shape, dtype = like
    return tensor.new_empty((0,) if shape is None else shape, dtype=dtype)


class Signature:
    """The arguments of an operator by name, from its schema; which of them are tensors."""

    def __init__(self, name: str):
        self.op = op = getattr(torch.ops.masked_loss_ext, name).default
        self.name = op._schema.name
        arguments = op._schema.arguments
        self.names = [a.name for a in arguments]
        self.results = [r.name for r in op._schema.returns]
        defaults = [a.default_value for a in arguments if a.has_default_value()]
        make: Any = collections.namedtuple
        self.arguments = make("Arguments", self.names, defaults=defaults)
        types = [str(a.type) for a in arguments]
        is_tensor = ["Tensor" in kind for kind in types]
        self.floats = [
            name for name, kind in zip(self.names, types, strict=True) if kind == "float"
        ]
        self.tensors = [i for i, yes in enumerate(is_tensor) if yes]
        self.options = [i for i, yes in enumerate(is_tensor) if not yes]
        order = self.tensors + self.options
        self._merged = [order.index(i) for i in range(len(order))]

    def split(self, args):
        return [args[i] for i in self.tensors], [args[i] for i in self.options]

    def merge(self, tensors, options):
        both = (*tensors, *options)
        return self.arguments(*[both[i] for i in self._merged])

    def call(self, *args):
        """The results in a tuple, of an operator with one result too."""
        found = self.op(*args)
        return (found,) if isinstance(found, torch.Tensor) else found

    def register_fake(self, likes: Callable[[Any], Iterable[Like]], name: str):
        def fake(*args, **kwargs):
            a = self.arguments(*args, **kwargs)
            # A schedule lies on the CPU, wherever the others are.
            names = [self.names[i] for i in self.tensors if self.names[i] != "schedule"]
            tensors = [t for t in (getattr(a, name) for name in names) if t is not None]
            refuse_two_devices(name, *tensors)
            found = tuple([_blank(tensors[0], like) for like in likes(a)])
            if len(found) > 1:
                return found
            return found[0] if found else None

        torch.library.register_fake(self.name, fake)


def _transformable(signature, saved_results, differentiable, plain, derivative):
    """The operator under torch.func, and its derivative for torch.compile.

    plain: arguments -> results, in plain PyTorch. derivative(transformed, grads, tensors, results,
    options, needs) gives the gradients by the position of the argument.
    """

    def setup_context(ctx, inputs, output):
        results = output if isinstance(output, tuple) else (output,)
        tensors, ctx.options = signature.split(inputs)
        ctx.save_for_backward(*tensors, *[results[i] for i in saved_results])
        ctx.mark_non_differentiable(*[r for i, r in enumerate(results) if i not in differentiable])
        ctx.set_materialize_grads(False)

    def backward(ctx, transformed, grads):
        gradients = [None] * len(ctx.needs_input_grad)
        if any(grad is not None for grad in grads):
            count = len(signature.tensors)
            tensors, results = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
            # The dispatcher leaves out trailing arguments that have their default.
            needs = (*ctx.needs_input_grad, *[False] * len(signature.names))
            found = derivative(transformed, grads, tensors, results, ctx.options, needs)
            for position, grad in found.items():
                if needs[position]:
                    gradients[position] = grad
        return tuple(gradients)

    torch.library.register_autograd(
        signature.name,
        lambda ctx, *grads: backward(ctx, False, grads),
        setup_context=setup_context,
    )
    set_up, back = setup_context, backward

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return signature.call(*args)

        setup_context = staticmethod(set_up)

        @staticmethod
        def backward(ctx, *grads):
            return back(ctx, True, grads)

        @staticmethod
        def vmap(info, in_dims, *args):
            tensors, options = signature.split(args)
            dims, _ = signature.split(in_dims)
            results = torch.vmap(lambda *t: plain(signature.merge(t, options)), tuple(dims))(
                *tensors
            )
            return results, (0,) * len(results)

    return Transformed


class Once(NamedTuple):
    """Another function in the place of the backward operator, for the eager backward that nobody
    differentiates again: once, as it destroys what it reads."""

    run: Callable[..., tuple[torch.Tensor, ...]] | None  # of the backward's arguments; None: spent
    refusal: str  # of another backward


class Differentiable:
    """An operator and the ways to it.

    ``name`` with ``_name_backward``, whose arguments are found by their names: ``grad_<result>`` is
    an incoming gradient, ``<result>`` one that the forward has made, ``needs_<argument>`` whether
    its gradient is asked for, and any other an argument of the forward. Its results are
    ``grad_<argument>``.

    Args:
        likes: arguments -> shape and dtype of each result.
        plain: arguments -> the results, in plain PyTorch; None, or fewer, where they are left out
            or only the backward operator reads them.
        gradient_likes: by argument, of those whose gradients the backward operator does not give in
            their own shape and dtype: arguments of the backward -> what it gives. That must reduce
            to the argument's shape by a sum.
    """

    def __init__(
        self,
        name: str,
        likes: Callable[[Any], Iterable[Like]],
        plain: Callable[[Any], tuple[torch.Tensor | None, ...]],
        gradient_likes: dict[str, Callable[[Any], Like]] | None = None,
    ):
        self.forward = forward = Signature(name)
        self.backward = backward = Signature(f"_{name}_backward")
        self.likes, self._given_plain, self.gradient_likes = likes, plain, gradient_likes or {}
        self.inputs = [result.removeprefix("grad_") for result in backward.results]
        given = [f"grad_{result}" for result in forward.results]
        self.differentiable = [i for i, grad in enumerate(given) if grad in backward.names]
        # A result may have the name of an argument; the backward then means the argument.
        saved = [r for r in forward.results if r in backward.names and r not in forward.names]
        self.saved_results = [forward.results.index(result) for result in saved]
        self.input_positions = [forward.names.index(x) for x in self.inputs]
        # Tensors that the backward reads: what other ranks have sent would be kept for nothing.
        self.read_again = [i for i in forward.tensors if forward.names[i] in backward.names]
        self.backward_order = self._backward_order(given, saved)
        self._pick_inputs = _pick(self.input_positions)
        self._call_op = forward.op._op  # what OpOverload.__call__ calls
        self._fits = [x in self.gradient_likes for x in self.inputs]
        forward.register_fake(likes, name)
        backward.register_fake(lambda b: [self.gradient_like(b, x) for x in self.inputs], name)
        self._transformed = _transformable(
            forward, self.saved_results, self.differentiable, self.plain, self._derivative
        )
        self._transformed_backward = _transformable(
            backward, [], range(len(self.inputs)), self._gradients, self._second_derivative
        )
        self._eager = _eager(self)

    def _backward_order(self, given, saved):
        """Where, in (*gradients of all results, *read_again, *saved results, *options, *needs), the
        backward operator's arguments are."""
        arguments = self.forward.names
        tensors = [arguments[i] for i in self.read_again]
        options = [arguments[i] for i in self.forward.options]
        needs = [f"needs_{x}" for x in self.inputs]
        pool = [*given, *tensors, *saved, *options, *needs]
        return [pool.index(argument) for argument in self.backward.names]

    def call(
        self, args: tuple[Any, ...], shown: int, once: Once | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The first ``shown`` results."""
        if (
            forward_ad._current_level >= 0
            or _functorch_is_active()
            or torch.compiler.is_compiling()
        ):
            return self._call_traced(args)[:shown]
        if torch.is_grad_enabled():
            for i in self.input_positions:
                if args[i] is not None and args[i].requires_grad:
                    return self._eager(*self._pick_inputs(args), (args, shown, once))
        with _below_autograd():
            return self._call_op(*args)[:shown]

    def _call_traced(self, args):
        if needs_plain():
            return self.plain(self.forward.arguments(*args))
        if torch.compiler.is_compiling():
            return self.forward.op(*args)
        return self._transformed.apply(*args)

    def run_backward(self, args, transformed):
        """The backward operator where it may be differentiated again."""
        if not transformed:
            return self.backward.call(*args)
        if needs_plain():
            return self._gradients(self.backward.arguments(*args))
        return self._transformed_backward.apply(*args)

    def fitted(self, i, gradient, argument):
        """That of the i-th input in its own shape and dtype."""
        if self._fits[i]:
            return gradient.sum_to_size(argument.shape).to(argument.dtype)
        return gradient

    def _derivative(self, transformed, grads, tensors, results, options, needs):
        a = self.forward.merge(tensors, options)
        # Of a result that was left out some callers have a gradient, of no elements.
        present = [shape is not None for shape, _ in self.likes(a)]
        grads = [grad if there else None for grad, there in zip(grads, present, strict=True)]
        needs = [needs[i] for i in self.input_positions]
        read_again = [a[i] for i in self.read_again]
        pool = (*grads, *read_again, *results, *options, *needs)
        args = [pool[i] for i in self.backward_order]
        found = self.run_backward(args, transformed)
        return {
            position: self.fitted(i, found[i], a[position])
            for i, position in enumerate(self.input_positions)
            if needs[i]
        }

    # --- in plain PyTorch -------------------------------------------------------------------------

    def plain(self, a):
        """All results: same shapes, same dtypes."""
        found = itertools.zip_longest(self._given_plain(a), self.likes(a))
        first = a[self.forward.tensors[0]]
        return tuple(
            [
                _blank(first, like).fill_(0) if x is None or like[0] is None else x
                for x, like in found
            ]
        )

    def gradient_like(self, b, name):
        argument = getattr(b, name)
        if name in self.gradient_likes:
            shape, dtype = self.gradient_likes[name](b)
        else:
            shape, dtype = argument.shape, argument.dtype
        return (shape if getattr(b, f"needs_{name}", True) else None), dtype

    def _pullback(self, b):
        """The gradients as a function of what has a second derivative: of the inputs, and of those
        incoming gradients that there are. With the names of all of these."""
        a = self.forward.arguments(
            **{name: getattr(b, name) for name in self.forward.names if hasattr(b, name)}
        )
        # As if all were needed: the gradient of one depends on the others.
        everything = b._replace(**{name: True for name in b._fields if name.startswith("needs_")})
        likes = {x: self.gradient_like(everything, x) for x in self.inputs}
        inputs = [x for x, (shape, _) in likes.items() if shape is not None]
        given = [
            i
            for i in self.differentiable
            if getattr(b, f"grad_{self.forward.results[i]}") is not None
        ]

        def gradients(*tensors):
            def results(*values):
                found = self.plain(a._replace(**dict(zip(inputs, values, strict=True))))
                return tuple(found[i] for i in given)

            values = [
                tensor.to(likes[x][1]).expand(likes[x][0])
                for x, tensor in zip(inputs, tensors[: len(inputs)], strict=True)
            ]
            found, pull = torch.func.vjp(results, *values)
            grads = zip(tensors[len(inputs) :], found, strict=True)
            return pull(tuple(grad.to(result.dtype) for grad, result in grads))

        return gradients, [*inputs, *[f"grad_{self.forward.results[i]}" for i in given]]

    def _gradients(self, b):
        """Same shapes, same dtypes."""
        function, names = self._pullback(b)
        found = dict(zip(names, function(*[getattr(b, name) for name in names]), strict=False))
        likes = {x: self.gradient_like(b, x) for x in self.inputs}
        first = getattr(b, self.inputs[0])
        return tuple(
            [_blank(first, like) if like[0] is None else found[x] for x, like in likes.items()]
        )

    def _second_derivative(self, transformed, upstream, tensors, results, options, needs):
        """Of the sum of upstream * gradients, by position among the backward's arguments."""
        b = self.backward.merge(tensors, options)
        function, names = self._pullback(b)
        found, pull = torch.func.vjp(function, *[getattr(b, name) for name in names])
        upstream = dict(zip(self.inputs, upstream, strict=True))
        given = []
        for x, gradient in zip(names, found, strict=False):
            u = upstream[x] if getattr(b, f"needs_{x}", True) else None
            given.append(torch.zeros_like(gradient) if u is None else u.to(gradient.dtype))
        positions = [self.backward.names.index(name) for name in names]
        return dict(zip(positions, pull(tuple(given)), strict=True))


def _pick(positions):
    """Entries of a tuple as a tuple, in C."""
    if len(positions) < 2:
        return lambda entries: tuple([entries[i] for i in positions])
    return operator.itemgetter(*positions)


def _eager(op):
    """The operator in training, where each microsecond counts. Its arguments go in one piece beside
    the inputs that may need gradients, as autograd looks at each argument of its own."""
    signature = op.forward
    forward_op, backward_op = op.forward.op._op, op.backward.op._op
    inputs = [op.read_again.index(i) for i in op.input_positions]  # among what is saved
    order, results, single = op.backward_order, len(signature.results), len(op.inputs) == 1
    pick_tensors, pick_options = _pick(op.read_again), _pick(signature.options)
    pick_results, sort = _pick(op.saved_results), _pick(order)
    # By the number of results that are shown: gradients of the others, those without one.
    padding = [(None,) * (results - shown) for shown in range(results + 1)]
    constant = [
        [i for i in range(shown) if i not in op.differentiable] for shown in range(results + 1)
    ]

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            args, shown, ctx.once = given[-1]
            with _below_autograd():
                found = forward_op(*args)
            ctx.save_for_backward(*pick_tensors(args), *pick_results(found))
            ctx.options = pick_options(args)
            ctx.set_materialize_grads(False)
            if constant[shown]:
                ctx.mark_non_differentiable(*[found[i] for i in constant[shown]])
            return found[:shown]

        @staticmethod
        def backward(ctx, *grads):
            once = ctx.once
            if once is not None and once.run is None:
                # Known by itself, as saved-tensor hooks hide the version of what is saved.
                raise RuntimeError(once.refusal)
            needs, gradients = ctx.needs_input_grad, [None] * (len(inputs) + 1)
            if grads[0] is None and not any([grad is not None for grad in grads]):
                return tuple(gradients)
            saved = ctx.saved_tensors
            pool = grads + padding[len(grads)] + saved + ctx.options + needs
            if (
                is_transformed()  # gradients with a tangent, say
                or torch.is_grad_enabled()  # create_graph=True
                or torch.compiler.is_dynamo_compiling()  # compiled autograd
            ):
                found = op.run_backward([pool[i] for i in order], is_transformed())
            elif once is None or not needs[0] or any(map(is_batch, grads)):
                with _below_autograd():
                    found = backward_op(*sort(pool))
                found = (found,) if single else found
            else:
                ctx.once = once._replace(run=None)
                with _below_autograd():
                    found = once.run(sort(pool))
            for i, at in enumerate(inputs):
                if needs[i]:
                    gradients[i] = op.fitted(i, found[i], saved[at])
            return tuple(gradients)

    # Not Function.apply: that is for torch.func, whose transforms do not come here.
    return super(torch.autograd.Function, Eager).apply
