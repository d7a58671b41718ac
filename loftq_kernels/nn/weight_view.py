"""`QuantizedWeight`, what `layer.weight` returns: a tensor to look at, read and multiply by, never to write to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    import numpy


def read_only_error(layer: Any, attempt: str) -> RuntimeError:
    """What a write to the weight of a layer (a `QuantLoRAModule`) raises; ``attempt`` says what was tried."""
    return RuntimeError(f"{attempt} is refused: {_explain(layer)}")


def _explain(layer: Any) -> str:
    name = type(layer).__name__
    return (
        f"{name}.weight is read-only, decoded from the packed weight at every read; train lora_A and lora_B, fold the "
        f"adapter in with merge_adapter(requantize=True), or take a dense copy with {layer.dense_copy}()"
    )


class ReadOnly(Tensor):
    """A decoded weight, or a view of one: memory of a temporary copy, which a write would change for nothing.

    Results that share this memory are ReadOnly, too, all others plain tensors. Any write raises RuntimeError.
    """

    _is_hf_initialized = True  # What transformers asks before it writes random values into the weights of a module.
    _explanation = "the tensor is a view of a decoded weight, which is read-only"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return _HANDLERS.get(func, _read)(func, args, kwargs or {})

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(Tensor, name):  # nn.Parameter sets one; the others would be lost with this object
            raise self._refusal(f"setting the attribute {name}")
        super().__setattr__(name, value)

    def set_(self, *args, **kwargs) -> NoReturn:  # the one in-place method that asks no `__torch_function__`
        raise self._refusal("set_")

    def __deepcopy__(self, memo: dict) -> Tensor:
        memo[id(self)] = copied = self._values().clone()
        return copied

    def __reduce_ex__(self, protocol: int):
        return self._values().clone().__reduce_ex__(protocol)

    def _values(self) -> Tensor:
        """The numbers as a plain tensor, detached."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach().as_subclass(Tensor)

    def _refusal(self, attempt: str) -> RuntimeError:
        return RuntimeError(f"{attempt} is refused: {self._explanation}")


class QuantizedWeight(ReadOnly):
    """The weight W = Q + scaling * lora_B @ lora_A of a layer, in the dense layer's shape, dtype and device; no memory.

    * Metadata (shape, dtype, device, ...) decode nothing. They are those of the moment when ``layer.weight`` was read,
      the values are the layer's of today.
    * `torch.nn.functional.linear(x, layer.weight, bias)` is the product with the packed weight and the adapter,
      differentiable in x, lora_A, lora_B and bias; nothing dense is made. Like the layer, it returns the dtype of x.
    * Any other read decodes W, differentiable in lora_A and lora_B where gradients are enabled, except of
      ``.detach()`` and ``.data``, which are read-only as well. Copies, pickles and NumPy arrays hold plain values.
    * Any write (in-place methods, ``out=``, ``.data = ``, ``requires_grad_()``, nn.Parameter(layer.weight), ...), also
      to a view such as ``layer.weight.T``, raises RuntimeError that says what to do instead, and so does asking for
      the memory (``data_ptr()``).
    """

    _is_hf_initialized = True  # What transformers' own initializers ask of a weight before they write to it.

    @staticmethod
    def __new__(cls, layer: Any, detached: bool = False) -> QuantizedWeight:
        # To the dispatcher it is a meta tensor. C++ code that asks no subclass, such as that of
        # `other.data = layer.weight`, then raises instead of sharing memory that is not there.
        self = Tensor._make_wrapper_subclass(
            cls, layer._weight_shape, dtype=layer.dtype, device="meta", dispatch_device=True
        )
        self.__dict__.update(_layer=layer, _detached=detached, _device=layer.codes.device)
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """What code reaches that bypasses `__torch_function__`, such as `torch.as_tensor`."""
        if func is torch.ops.prim.device.default:
            return args[0]._device
        return _read(func, args, kwargs or {})

    def __repr__(self) -> str:
        layer = self._layer
        return (
            f"QuantizedWeight({type(layer).__name__}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, format={layer.format.name})"
        )

    @property
    def _explanation(self) -> str:
        return _explain(self._layer)

    def _decode(self) -> Tensor:
        """The dense W as a plain tensor, in memory of its own."""
        detach = self._detached or not torch.is_grad_enabled()
        if torch.is_inference_mode_enabled():  # tensors that are made there do not count writes
            with torch.inference_mode(False), torch.no_grad():
                dense = self._layer.dense_weight()
        else:
            dense = self._layer.dense_weight(detach=detach)
        return dense.to(device=self._device, dtype=self.dtype)

    def _values(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            return self._decode()


def _names(*names: str) -> Iterator[Callable]:
    """The methods of Tensor, and the getters of its properties, of these names; those that this torch has."""
    for name in names:
        attribute = getattr(Tensor, name, None)
        if attribute is not None:
            yield attribute if callable(attribute) else attribute.__get__


# Answered by the tensor without memory itself. Hooks are among them: it needs no gradient, and torch says so.
_METADATA = frozenset(
    (
        *_names("shape", "dtype", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "names"),
        *_names("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_sparse_csr", "is_quantized"),
        *_names("is_nested", "is_mkldnn", "itemsize", "nbytes", "output_nr", "_version", "_base", "retains_grad"),
        *_names("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "storage_offset"),
        *_names("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_inference", "get_device"),
        *_names("has_names", "__len__", "__hash__", "__format__", "dim_order", "__dir__", "_is_view"),
        *_names("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward"),
        *(torch.is_floating_point, torch.is_complex, torch.is_signed, torch.is_inference, torch.numel),
    )
)
_MEMORY = (
    *_names("data_ptr", "untyped_storage", "storage", "_typed_storage", "storage_type", "__dlpack__"),
    *_names("__cuda_array_interface__", "is_set_to"),
)
_IN_PLACE_DUNDERS = frozenset(
    f"__{name}__"
    for name in (
        *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"),
        *("ilshift", "irshift", "setitem", "set", "delete"),
    )
)


def _metadata(func: Callable, args: Sequence, kwargs: Mapping) -> Any:
    return func(*args, **kwargs)


def _device(func: Callable, args: Sequence, kwargs: Mapping) -> torch.device:
    (one,) = args
    return one._device if isinstance(one, QuantizedWeight) else func(one)


def _linear(func: Callable, args: Sequence, kwargs: Mapping) -> Tensor:
    """F.linear, whose arguments have names and may be given by them."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False), **kwargs)
    x, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    if not isinstance(weight, QuantizedWeight) or isinstance(x, QuantizedWeight):
        return _read(func, args, kwargs)
    if isinstance(bias, QuantizedWeight) or weight.dim() != 2:  # a convolution's kernel has more
        return _read(func, args, kwargs)
    return weight._layer.product(x, bias, detach=weight._detached)


def _detach(func: Callable, args: Sequence, kwargs: Mapping) -> Tensor:
    if isinstance(args[0], QuantizedWeight):
        return QuantizedWeight(args[0]._layer, detached=True)
    return _read(func, args, kwargs)


def _type(func: Callable, args: Sequence, kwargs: Mapping) -> Any:
    """Without arguments the name of the type, else a cast."""
    if len(args) > 1 or kwargs:
        return _read(func, args, kwargs)
    return torch.empty(0, dtype=args[0].dtype, device=args[0].device).type()


def _require_grad(func: Callable, args: Sequence, kwargs: Mapping) -> Any:
    """False asks for nothing: a QuantizedWeight is no leaf to be trained."""
    (wanted,) = (*args[1:], *kwargs.values()) or (True,)
    if wanted:
        raise args[0]._refusal("requires_grad=True")
    return args[0] if func is Tensor.requires_grad_ else None


def _memory(func: Callable, args: Sequence, kwargs: Mapping) -> NoReturn:
    raise args[0]._refusal(f"{_name(func)}, memory of a temporary copy (of clone() it would be your own),")


def _array(func: Callable, args: Sequence, kwargs: Mapping) -> numpy.ndarray:
    array = func(args[0]._values(), *args[1:], **kwargs)
    array.setflags(write=False)
    return array


_HANDLERS: dict[Callable, Callable[[Callable, Sequence, Mapping], Any]] = {
    **dict.fromkeys(_METADATA, _metadata),
    **dict.fromkeys(_MEMORY, _memory),
    Tensor.device.__get__: _device,
    **dict.fromkeys((Tensor.detach, torch.detach, Tensor.data.__get__), _detach),
    **dict.fromkeys((Tensor.numpy, Tensor.__array__), _array),
    **dict.fromkeys((Tensor.requires_grad_, Tensor.requires_grad.__set__), _require_grad),
    Tensor.type: _type,
    functional.linear: _linear,
}


def _read(func: Callable, args: Sequence, kwargs: Mapping) -> Any:
    """Call func with decoded weights; protect what shares their memory, and raise if func wrote to it."""
    _refuse_named_writes(func, args, kwargs)
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    ours = {id(leaf): leaf for leaf in leaves if isinstance(leaf, ReadOnly)}
    dense = {key: one._decode() if isinstance(one, QuantizedWeight) else one for key, one in ours.items()}
    args, kwargs = pytree.tree_unflatten([dense.get(id(leaf), leaf) for leaf in leaves], spec)
    versions = {key: one._version for key, one in dense.items()}
    result = func(*args, **kwargs)
    for key, one in dense.items():
        if one._version != versions[key]:
            raise ours[key]._refusal(f"a write by {_name(func)}")
    origins = {_storage_of(one): ours[key]._explanation for key, one in dense.items()}
    return pytree.tree_map_only(Tensor, lambda tensor: _protected(tensor, origins), result)


def _refuse_named_writes(func: Callable, args: Sequence, kwargs: Mapping) -> None:
    """Raise for writes that their names tell, before anything is decoded or other tensors are written to.

    PyTorch's in-place functions end in an underscore or are told so by ``inplace``, and write to their first argument:
    a tensor or a list of them.
    """
    name = _name(func)
    in_place = name in _IN_PLACE_DUNDERS or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
    written = [kwargs.get("out"), args[0] if in_place and args else None]
    for one in pytree.tree_leaves(written):
        if isinstance(one, ReadOnly):
            raise one._refusal("assigning to an attribute" if name in ("__set__", "__delete__") else name)


def _name(func: Callable) -> str:
    """Without the overload that ops of `torch.ops` have in theirs."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name.split(".")[0]


def _protected(tensor: Tensor, origins: Mapping[int | None, str]) -> Tensor:
    explanation = origins.get(_storage_of(tensor))
    if explanation is None or type(tensor) is not Tensor:  # ReadOnly already, or fake: that has nothing to lose
        return tensor
    view = tensor.as_subclass(ReadOnly)
    view.__dict__["_explanation"] = explanation
    return view


def _storage_of(tensor: Tensor) -> int | None:
    """What tells whether tensors share memory, also on the meta device; None for those that have none."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or wrapped by functorch
        return None
