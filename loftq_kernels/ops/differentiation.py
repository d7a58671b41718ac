"""How the ops take part in differentiation: where their derivatives are registered, and which are refused.

`torch.library.register_autograd` knows no forward mode, and what it makes does not compose with `torch.func`: the ops
have `torch.autograd.Function`s instead, which are applied where PyTorch applies any other: above the transforms of
`torch.func` (the key FuncTorchDynamicLayerFrontMode), and at the Autograd key where no transform is left. What the
packed weight is made of is a constant: a derivative with respect to it raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import (
    FuncTorchInterpreter,
    retrieve_current_functorch_interpreter,
    temporarily_clear_interpreter_stack,
)
from torch._functorch.utils import unwrap_dead_wrappers
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd import Function, forward_ad

from loftq_kernels.ops.schemas import NAMESPACE

_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # its registrations live as long as it does
_PACKED = ("codes", "scale", "offset", "codebook")


def forward_mode() -> bool:
    """Whether a tensor may carry a tangent: within `forward_ad.dual_level()`, which torch.func.jvp enters too.

    Also true under any dispatch mode, because a graph that is being traced enters the level without this counter.
    """
    return forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack() > 0


def apply(function: type[Function], *args) -> Tensor:
    """function.apply(*args), without the search for defaults in its signature, which takes tens of microseconds."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*unwrap_dead_wrappers(args))


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor and all that torch.func wrapped in it, except for the wrappers of vmap, which have no derivatives."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_batchedtensor(tensor):
            yield tensor
        tensor = functorch.get_unwrapped(tensor)
    yield tensor


def _has_tangent(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and forward_ad.unpack_dual(tensor, level=0).tangent is not None


def differentiated(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """The names of those that a derivative is wanted with respect to, backward or forward, by any transform."""
    backward, forward = torch.is_grad_enabled(), forward_mode()
    if not backward and not forward:
        return []
    return [
        name
        for name, tensor in tensors.items()
        if tensor is not None
        and any((backward and t.requires_grad) or (forward and _has_tangent(t)) for t in _layers(tensor))
    ]


def differentiable_jvp(jvp: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """jvp(ctx, saved, *tangents) as a `Function`'s, with derivatives of its own in an outer forward-mode transform.

    PyTorch turns forward mode off around a jvp, for the saved inputs carry tangents; with it off, the transforms around
    see none either, and the derivative of the derivative is lost (https://github.com/pytorch/pytorch/issues/197867).
    Here the inputs lose their tangents instead.
    """

    def whole(ctx, *tangents: Tensor | None) -> Tensor:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = (None if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors)
            return jvp(ctx, tuple(saved), *tangents)

    return whole


def refuse_constants(names: Sequence[str]) -> None:
    """Raise RuntimeError if a derivative is wanted for a part of a packed weight; names are those parts."""
    if names:
        raise RuntimeError(
            f"the packed weight is a constant: there is no derivative with respect to its {', '.join(names)}; "
            "detach() it"
        )


def refuse_multi(names: Sequence[str]) -> None:
    """Raise RuntimeError if a derivative is wanted for an argument of qlora_linear_multi; names are those arguments."""
    if names:
        raise RuntimeError(
            f"adapter_ids is for inference: {', '.join(names)} would need a gradient or carries a tangent; use "
            "torch.no_grad(), and no forward-mode transform"
        )


def refuse_adapter_grad(names: Sequence[str]) -> None:
    """Raise RuntimeError if a derivative is wanted for an argument of adapter_grad; names are those arguments."""
    if names:
        raise RuntimeError(
            f"adapter_grad has no derivative, but {', '.join(names)} would need a gradient or carries a tangent; use "
            "torch.no_grad(), or differentiate qlora_linear, which may be done twice"
        )


def to_quantize(name: str, weight: Tensor) -> Tensor:
    """The weight's values, without what torch.func wrapped around them; quantize them within `outside_transforms`.

    Raises RuntimeError where a transform wants a derivative of it or maps over it, or it carries a tangent. One that
    merely requires a gradient is taken: what is quantized is detached, as the replacement of a layer needs it.
    """
    if torch.compiler.is_compiling():  # which has no such tensors, and cannot trace the questions
        return weight.detach()
    wrapped = functorch.is_functorch_wrapped_tensor(weight)
    if _is_mapped(weight) or (wrapped and differentiated({name: weight})):
        found = "is an argument of a transform of torch.func"
    elif forward_mode() and _has_tangent(weight):
        found = "carries a tangent"
    else:
        return list(_layers(weight))[-1].detach()
    raise RuntimeError(
        f"{name} {found}, but choosing codes and adapters has no derivative: quantize outside of the transform"
    )


def _is_mapped(tensor: Tensor) -> bool:
    """Whether vmap has a dimension of the tensor, at any level."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def outside_transforms() -> AbstractContextManager:
    """Where tensors are plain ones, although a transform of torch.func is under way."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def refuse_packed(flags_or_tangents: Sequence[object]) -> None:
    """`refuse_constants` by the flags of needs_input_grad or the tangents of codes, scale, offset and codebook."""
    refuse_constants(
        [
            name
            for name, wanted in zip(_PACKED, flags_or_tangents, strict=True)
            if wanted is not None and wanted is not False
        ]
    )


def each_sample(op: Callable, info, in_dims: Sequence[int | None], args: Sequence) -> tuple[Tensor, int]:
    """The vmap rule of an op whose packed weight differs between the samples: one call per sample."""
    results = [
        op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return torch.stack(results), 0


def _functionalize(op: torch._ops.OpOverload, interpreter: FuncTorchInterpreter, args: tuple) -> Tensor:
    """What torch.func.functionalize does with an op that mutates nothing; it cannot handle a `Function`."""
    api = FunctorchFunctionalizeAPI(interpreter)
    args = api.unwrap_tensors(args)
    with api.redispatch_to_next():
        result = op(*args)
    return api.wrap_tensors(result)


def register_derivatives(op: torch._ops.OpOverload, function: type[Function]) -> None:
    """Give op the derivatives of function."""
    # As `apply` where no transform is active: transform_kernel has dealt with them by the Autograd key.
    apply_below = super(Function, function).apply

    def autograd_kernel(keyset, *args):
        if forward_mode() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return apply_below(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def transform_kernel(*args):
        interpreter = retrieve_current_functorch_interpreter()
        if interpreter.key() == functorch.TransformType.Functionalize:
            return _functionalize(op, interpreter, args)
        return function.apply(*args)

    _library.impl(op._opname, autograd_kernel, "Autograd", with_keyset=True)
    _library.impl(op._opname, transform_kernel, "FuncTorchDynamicLayerFrontMode")


def register_refusal(op: torch._ops.OpOverload, refuse: Callable[[Sequence[str]], None]) -> None:
    """Give op, which has no derivative, a kernel that raises where one would be lost."""
    names = [argument.name for argument in op._schema.arguments]

    def autograd_kernel(keyset, *args):
        if forward_mode() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            refuse(differentiated({n: arg for n, arg in zip(names, args, strict=True) if isinstance(arg, Tensor)}))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(op._opname, autograd_kernel, "Autograd", with_keyset=True)
