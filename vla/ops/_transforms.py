"""Operators under the transforms of `torch.func`: first derivatives and `vmap`, in any order, unless compiled."""

from types import SimpleNamespace

import torch
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.utils._pytree import tree_flatten, tree_unflatten


def transform(operator, *args):
    """The operator of these arguments, while a transform is active."""
    if peek_interpreter_stack().key() == TransformType.Functionalize:
        return operator._overload(*args)
    return _Forward.apply(operator, *args)


class _Forward(torch.autograd.Function):
    """An operator in the form that transforms want; that which `torch.library` gives its autograd is another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator, *args):
        return operator._overload(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.operator, *args = inputs
        ctx.operator._setup_context(ctx, args, output)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_Backward.apply(ctx.operator, ctx.constants, len(grads), *grads, *ctx.saved_tensors)


class _Backward(torch.autograd.Function):
    """Gradients by `_Forward`, in a function of their own: to a transform around it they would be constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator, constants: list, count: int, *tensors):
        saved = SimpleNamespace(constants=constants, saved_tensors=tensors[count:])
        return operator._autograd_backward(saved, *tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.name = inputs[0].name

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(f"{ctx.name}: has no second derivatives")


def register_vmap(overload) -> None:
    """Lets `torch.vmap` call an operator of `torch.library` once for each index, and stack the results."""

    def rule(info, in_dims: tuple, *args):
        leaves, structure = tree_flatten(args)
        dims = tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]
        results = []
        if info.batch_size == 0:
            # What one index would give tells the shapes of none.
            leaves = [
                leaf if dim is None else leaf.new_zeros(leaf.movedim(dim, 0).shape[1:]).unsqueeze(dim)
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
        for i in range(max(1, info.batch_size)):
            own = (leaf if dim is None else leaf.select(dim, i) for leaf, dim in zip(leaves, dims, strict=True))
            results.append(tree_flatten(overload(*tree_unflatten(own, structure))))
        tensors = zip(*(tensors for tensors, _ in results), strict=True)
        stacked = [torch.stack(values)[: info.batch_size] for values in tensors]
        outputs = results[0][1]
        return tree_unflatten(stacked, outputs), tree_unflatten([0] * len(stacked), outputs)

    torch.library.register_vmap(overload, rule)
