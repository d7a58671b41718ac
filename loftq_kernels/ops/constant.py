"""`Constant`: a parameter that is never trained and that no averaging changes, as the packed weight is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

REMEDY = (
    "average or update the adapters alone, which are the parameters that lk.train_only_adapters(model) leaves trainable"
)
ROUNDINGS = 4  # units in the last place within which a computed value counts as the old one

_OPERATORS = ("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
_IN_PLACE_OPERATORS = ("__setitem__", *(f"__i{name}__" for name in _OPERATORS))
# These end in an underscore and write no value.
_NO_WRITES = frozenset(
    ("detach_", "rename_", "requires_grad_", "retain_grad_", "set_", "share_memory_", "module_load_")
    + ("resize_", "resize_as_", "resize_as_sparse_", "sparse_resize_", "sparse_resize_and_clear_", "as_strided_")
    + ("squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "t_", "transpose_")
)


def _writes(name: str) -> bool:
    """Whether the function of this name writes into its first argument."""
    if name in _IN_PLACE_OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES


def plain(value: Any) -> Any:
    """The value itself; of a `Constant` or an alias of one, a plain tensor on the same memory."""
    if isinstance(value, (Constant, _Alias)):
        with torch._C.DisableTorchFunctionSubclass():
            return Tensor.detach(value)
    return value


def _allplain(value: Any) -> Any:
    """`plain` of every tensor in nested lists, tuples and dicts."""
    if type(value) in (list, tuple):
        return type(value)(_allplain(item) for item in value)
    if type(value) is dict:
        return {key: _allplain(item) for key, item in value.items()}
    return plain(value)


def _alias(tensor: Tensor) -> _Alias:
    return Tensor._make_subclass(_Alias, tensor)


def _rounding(tensor: Tensor) -> float:
    """The unit in the last place of 1.0 in the dtype that the tensor was computed in."""
    return torch.finfo(tensor.dtype if tensor.is_floating_point() else torch.float64).eps


def _change(old: Tensor, new: Tensor, rounding: float) -> float:
    """The largest |new - old|, or 0 where no element moved by more than rounding explains."""
    if new.shape != old.shape:
        return float("nan")
    old, new = old.double(), new.double()
    # A code of 0 is as exact as one of 1; a float of 0 is reproduced exactly by an average of zeros.
    magnitude = old.abs()
    difference = (new - old).abs().masked_fill_(new == old, 0.0)
    if (difference <= ROUNDINGS * rounding * magnitude).all():
        return 0.0
    return difference.max().item()


def _settle(target: Tensor, value: Tensor, rounding: float, name: str) -> None:
    """Leave the constant `target` exactly as it is if `value` is it up to rounding; raise RuntimeError otherwise."""
    if target.is_meta or value.is_meta:
        return
    change = _change(target, value.to(target.device), rounding)
    if change != 0:
        raise RuntimeError(
            f"{name} would change a {target.dtype} part {tuple(target.shape)} of a packed weight, which is constant, "
            f"by up to {change:.3g}: {REMEDY}"
        )


def _copy(target: Tensor, source: Any, name: str = "copy_", *, exact: bool) -> bool:
    """Whether `source` is to be written into `target`: only values of its own dtype and shape are.

    Unless ``exact``, values of a float dtype that are the old ones up to rounding are an average's, and not written.
    """
    source = torch.as_tensor(source, device=target.device)
    if source.dtype != target.dtype or source.shape != target.shape:
        _settle(target, source.expand(target.shape), _rounding(source), name)
        return False
    if exact or target.is_meta or source.is_meta or not target.is_floating_point():
        return True
    return _change(target, source, _rounding(source)) != 0


def _on_copies(func: Callable, target: Tensor, args: Iterable, kwargs: dict) -> tuple[Any, float]:
    """What func leaves in a float64 copy of `target`, its first argument, and the rounding of what it computed with."""
    roundings = [torch.finfo(torch.float64).eps]

    def copied(value: Any) -> Any:
        own = plain(value)
        if not isinstance(own, Tensor):
            return value
        if own is value and own.ndim:  # an operand that was computed outside, in its own precision
            roundings.append(_rounding(own))
        return own.double() if own.is_floating_point() or own.dtype == target.dtype else own

    wide = target.double().clone()
    try:
        func(wide, *tree_map(copied, tuple(args)), **tree_map(copied, kwargs))
    except (RuntimeError, TypeError, IndexError):  # no such function of float64, as of bits; or a true error, again
        wide = target.clone()
        func(wide, *_allplain(tuple(args)), **_allplain(kwargs))
    return wide, max(roundings)


def _write(func: Callable, name: str, target: Tensor, args: tuple, kwargs: dict, *, exact: bool = False) -> None:
    """Apply the in-place func to the constant whose memory is `target`: a copy, or nothing, or RuntimeError."""
    if target.is_meta:
        return
    with torch.no_grad():
        if name == "copy_":
            source = args[0] if args else kwargs["src"]
            exact = exact or isinstance(source, (Constant, _Alias))
            if _copy(target, plain(source), exact=exact):
                target.copy_(plain(source))
            return
        value, rounding = _on_copies(func, target, args, kwargs)
        _settle(target, value, rounding, name)


def _entry(value: Any, index: int | list[int], count: int) -> Any:
    """Of a list with an item per tensor, those items; any other argument as it is."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return value
    return [value[i] for i in ([index] if isinstance(index, int) else index)]


def _of_one(func: Callable) -> Callable:
    return lambda tensor, *args, **kwargs: func([tensor], *args, **kwargs)


def _write_each(func: Callable, name: str, args: tuple, kwargs: dict) -> None:
    """Apply torch._foreach_* in place: to the ordinary tensors as ever, to each constant by `_write`."""
    targets, rest, count = args[0], args[1:], len(args[0])
    constants = [i for i, target in enumerate(targets) if isinstance(target, _Alias)]
    others = [i for i in range(count) if i not in set(constants)]

    def of(index: int | list[int]) -> tuple[list, dict]:
        return [_entry(a, index, count) for a in rest], {k: _entry(v, index, count) for k, v in kwargs.items()}

    for i in constants:
        entry_args, entry_kwargs = of(i)
        if name == "_foreach_copy_":
            _write(Tensor.copy_, "copy_", plain(targets[i]), (entry_args[0][0],), {})
        else:
            _write(
                lambda wide, *a, **k: func([wide], *a, **k), name, plain(targets[i]), tuple(entry_args), entry_kwargs
            )
    if others:  # after the constants, so that a refusal changes nothing
        entry_args, entry_kwargs = of(others)
        func([targets[i] for i in others], *_allplain(entry_args), **_allplain(entry_kwargs))


def _write_out(func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """Apply func with `out=`, in which a constant may be."""
    out = kwargs.pop("out")
    args, kwargs = _allplain((args, kwargs))
    results = func(*args, **kwargs)
    pairs = [(out, results)] if isinstance(out, Tensor) else list(zip(out, results, strict=True))
    for target, result in pairs:
        if isinstance(target, _Alias):
            _settle(plain(target), result, _rounding(result), f"{name}(out=)")
    for target, result in pairs:
        if not isinstance(target, _Alias):
            target.resize_(result.shape).copy_(result)
    return out


class _Alias(Tensor):
    """What `Constant.detach()` and `Constant.data` return: the constant's memory, with the constant's rule for writes.

    Reading it gives plain tensors, except those that are the constant itself again (`detach`, `view_as`, `to`).
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.compiler.is_compiling():  # a compiled function reads the packed weight
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if _writes(name) and not args:  # as torch.nn.init passes it
            args = (kwargs.pop(next(iter(kwargs))),)
        with torch._C.DisableTorchFunctionSubclass():
            if kwargs.get("out") is not None:
                return _write_out(func, name, args, kwargs)
            if name.startswith("_foreach_") and _writes(name):
                return _write_each(func, name, args, kwargs)
            if _writes(name) and args and isinstance(args[0], _Alias):
                _write(func, name, plain(args[0]), args[1:], kwargs)
                return None if name == "__setitem__" else args[0]
            result = func(*_allplain(args), **_allplain(kwargs))
            return _same(result, args[0]) if args and isinstance(args[0], _Alias) else result

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), plain(self).clone())

    def __reduce_ex__(self, protocol):
        return plain(self).__reduce_ex__(protocol)


def _same(result: Any, constant: _Alias) -> Any:
    """The result, as an alias again if it is all of the constant's memory in the constant's shape and dtype."""
    if type(result) is not Tensor or result.dtype != constant.dtype or result.shape != constant.shape:
        return result
    return _alias(result) if torch._C._is_alias_of(result, constant) else result


def _rebuild(data: Tensor) -> Constant:
    return Constant(data)


class Constant(nn.Parameter):
    """A frozen parameter [any shape, any dtype] that only a copy of its own dtype and shape changes.

    Sharding, moving and saving treat it as the parameter that it is, and so do operators, `torch.compile` and
    `torch.export`. What would compute a new value for it in place (averaging of models above all) is computed in
    float64 on the side: the constant stays exactly as it is if that is the old value up to rounding, and RuntimeError
    says what to do otherwise. So do `detach()` and `data`, through which averaging writes. `copy_` of a tensor of the
    same dtype and shape writes, as `load_state_dict` needs it; through `detach()` or `data` a float tensor that
    is the old one within 4 units in the last place is taken for an average of it, and not written.

    Raises RuntimeError when it is to require a gradient.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False):
        if requires_grad:
            raise RuntimeError(f"a packed weight is constant and takes no gradient: {REMEDY}")
        data = plain(data)
        if type(data) in (Tensor, nn.Parameter):
            return Tensor._make_subclass(cls, data, False)
        return nn.Parameter(data, requires_grad=False)  # a DTensor or fake tensor has a class of its own

    def detach(self) -> Tensor:
        return Tensor.detach(self) if torch.compiler.is_compiling() else _alias(plain(self))

    @property
    def data(self) -> Tensor:
        if torch.compiler.is_compiling():
            return Tensor.detach(self)
        # The compiler's check of custom operators accepts data of the exact type torch.Tensor alone.
        compiler = sys._getframe(1).f_globals.get("__name__", "").startswith("torch._")
        return plain(self) if compiler else _alias(plain(self))

    @data.setter
    def data(self, new: Tensor) -> None:
        old, new = plain(self), plain(new)
        if old.dtype != new.dtype:
            _settle(old, new, _rounding(new), f"data = a {new.dtype} tensor")
            new = old.to(new.device)
        moved = old.device != new.device or old.shape != new.shape or torch._C._is_alias_of(old, new)
        if moved or _copy(old, new, exact=False):
            Tensor.data.__set__(self, new)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Constant:
        if requires_grad:
            raise RuntimeError(f"a packed weight is constant and takes no gradient: {REMEDY}")
        return self

    def __deepcopy__(self, memo: dict) -> Constant:
        if id(self) not in memo:
            memo[id(self)] = type(self)(plain(self).clone(memory_format=torch.preserve_format))
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _rebuild, (plain(self),)


def _constant_method(name: str) -> Callable:
    func = getattr(Tensor, name)

    def method(self, *args, **kwargs):
        _write(func, name, plain(self), args, kwargs, exact=True)
        return None if name == "__setitem__" else self

    method.__name__ = name
    return method


for _name in dir(Tensor):
    if _writes(_name) and not _name.startswith("_") or _name in _IN_PLACE_OPERATORS:
        setattr(Constant, _name, _constant_method(_name))

# A pickle of a Constant names this function; torch.load(weights_only=True) is to accept it.
torch.serialization.add_safe_globals([_rebuild])


def keep_dtypes(fn: Callable[[Tensor], Tensor], module: nn.Module, names: Iterable[str]) -> Callable[[Tensor], Tensor]:
    """For `Module._apply`: fn, but of the module's parameters of these names only the change of device.

    By identity, as a sharded one is a DTensor and no `Constant` any more.
    """
    constants = {id(module._parameters.get(name)) for name in names}

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if id(tensor) not in constants or moved.dtype == tensor.dtype:
            return moved
        return plain(tensor).to(moved.device)

    return apply


def restore_constants(module: nn.Module, names: Iterable[str]) -> None:
    """Make the module's parameters of these names `Constant` again, after a change of device or an assignment.

    torch then puts an `nn.Parameter` in their place, which is of the alias's class if it was made from `data`. Sharded
    ones (DTensor) stay as they are.
    """
    for name in names:
        parameter = module._parameters.get(name)
        if type(parameter) in (nn.Parameter, _Alias):
            module._parameters[name] = Constant(parameter)
