"""`Constant`: a parameter that is never trained and that no averaging changes, as the packed weight is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from loftq_kernels.ops import constant_writes as rule
from loftq_kernels.ops.constant_writes import Guarded, all_plain, loading, plain


def _alias(tensor: Tensor) -> _Alias:
    return Tensor._make_subclass(_Alias, tensor)


def _entry(value: Any, index: int | list[int], count: int) -> Any:
    """Of a list with an item per tensor, those items; any other argument as it is."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return value
    return [value[i] for i in ([index] if isinstance(index, int) else index)]


def _of_one(func: Callable) -> Callable:
    return lambda tensor, *args, **kwargs: func([tensor], *args, **kwargs)


def _write_each(func: Callable, name: str, args: tuple, kwargs: dict) -> None:
    """Apply torch._foreach_* in place: to ordinary tensors together, to each constant by `constant_writes.write`."""
    targets, rest, count = args[0], args[1:], len(args[0])
    constants = [i for i, target in enumerate(targets) if isinstance(target, _Alias)]
    others = [i for i in range(count) if i not in set(constants)]

    def of(index: int | list[int]) -> tuple[list, dict]:
        return [_entry(a, index, count) for a in rest], {k: _entry(v, index, count) for k, v in kwargs.items()}

    for i in constants:
        entry_args, entry_kwargs = of(i)
        if name == "_foreach_copy_":
            rule.write(Tensor.copy_, "copy_", plain(targets[i]), ([*entry_args, *entry_kwargs.values()][0][0],), {})
        else:
            rule.write(_of_one(func), name, plain(targets[i]), tuple(entry_args), entry_kwargs)
    if others:  # after the constants, so that a refusal changes nothing
        entry_args, entry_kwargs = of(others)
        func([targets[i] for i in others], *all_plain(entry_args), **all_plain(entry_kwargs))


def _write_out(func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """Apply func with `out=`, which may hold constants."""
    out = kwargs.pop("out")
    args, kwargs = all_plain((args, kwargs))
    results = func(*args, **kwargs)
    pairs = [(out, results)] if isinstance(out, Tensor) else list(zip(out, results, strict=True))
    for target, result in pairs:
        if isinstance(target, _Alias):
            rule.settle(plain(target), result, rule.rounding_of(result), f"{name}(out=)")
    for target, result in pairs:
        if not isinstance(target, _Alias):
            target.resize_(result.shape).copy_(result)
    return out


class _Alias(Guarded, Tensor):
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
        if rule.writes(name) and not args:  # as torch.nn.init passes it
            args = (kwargs.pop(next(iter(kwargs))),)
        with torch._C.DisableTorchFunctionSubclass():
            if kwargs.get("out") is not None:
                return _write_out(func, name, args, kwargs)
            if not rule.writes(name):
                return _read(func, name, args, kwargs)
            if name.startswith("_foreach_"):
                return _write_each(func, name, args, kwargs)
            if not isinstance(args[0], _Alias):  # The constant is only an operand.
                return func(*all_plain(args), **all_plain(kwargs))
            rule.write(func, name, plain(args[0]), args[1:], kwargs)
            return None if name == "__setitem__" else args[0]

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), plain(self).clone())

    def __reduce_ex__(self, protocol):
        return plain(self).__reduce_ex__(protocol)


def _read(func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """Apply func, which writes no values. What is the constant itself again stays an alias."""
    if name == "requires_grad_" or func == Tensor.requires_grad.__set__:
        rule.refuse_gradient((*args[1:], *kwargs.values(), True)[0])
        return args[0]
    if name == "__set__":  # of an attribute, such as data: of this alias alone
        return func(args[0], *all_plain(args[1:]))
    result = func(*all_plain(args), **all_plain(kwargs))
    return _guarded_again(result, args[0]) if args and isinstance(args[0], _Alias) else result


def _guarded_again(result: Any, constant: _Alias) -> Any:
    """The result, as an alias again if it is all of the constant's memory in the constant's shape and dtype."""
    if type(result) is not Tensor or result.dtype != constant.dtype or result.shape != constant.shape:
        return result
    return _alias(result) if torch._C._is_alias_of(result, constant) else result


def _rebuild(data: Tensor) -> Constant:
    return Constant(data)


class Constant(Guarded, nn.Parameter):
    """A frozen parameter [any shape, any dtype] that only a copy of its own dtype and shape changes.

    Sharding, moving and saving treat it as the parameter that it is, and so do operators, `torch.compile` and
    `torch.export`. What would compute a new value for it in place (averaging of models above all) is computed in
    float64 on the side: the constant stays exactly as it is if that is the old value up to rounding, and RuntimeError
    says what to do otherwise. So do `detach()` and `data`, through which averaging writes. `copy_` of a tensor of the
    same dtype and shape writes, but a float tensor that is the old one within 4 units in the last place is taken for
    an average of it, and not written; only `loading()`, as `load_state_dict` of the layers does, writes that too.

    Not guarded: views of a part, lists of constants themselves (rather than of `detach()`) in torch._foreach_*, writes
    in compiled functions, `data` under a `TorchDispatchMode`, and DTensors, which `fully_shard` makes of it.
    `nn.Parameter(constant)` is a RuntimeError of torch's; `Constant(constant)` makes another one on the same memory.

    Raises RuntimeError when it is to require a gradient.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False):
        rule.refuse_gradient(requires_grad)
        data = plain(data)
        if type(data) not in (Tensor, nn.Parameter):  # a DTensor or fake tensor has a class of its own
            return nn.Parameter(data, requires_grad=False)
        made = Tensor._make_subclass(cls, data, False)
        # Kept, so that ops are given it without an op of its own, which transforms of torch.func would want to trace.
        made.held = data if type(data) is Tensor else Tensor.detach(data)
        return made

    def detach(self) -> Tensor:
        return Tensor.detach(self) if torch.compiler.is_compiling() else _alias(plain(self))

    @property
    def data(self) -> Tensor:
        if torch.compiler.is_compiling():
            return Tensor.detach(self)
        # The dispatch mode in which torch.compile checks custom operators takes data of the type torch.Tensor alone.
        return plain(self) if is_in_torch_dispatch_mode() else _alias(plain(self))

    @data.setter
    def data(self, new: Tensor) -> None:
        old, new = plain(self), plain(new)
        if old.dtype != new.dtype:
            rule.settle(old, new, rule.rounding_of(new), f"data = a {new.dtype} tensor")
            new = old.to(new.device)
        moved = old.device != new.device or old.shape != new.shape or torch._C._is_alias_of(old, new)
        if moved or rule.admits_copy(old, new):
            Tensor.data.__set__(self, new)
            self.held = new

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Constant:
        rule.refuse_gradient(requires_grad)
        return self

    def module_load(self, other: Tensor, assign: bool = False) -> Constant:
        with loading():
            return Constant(other if assign else self.copy_(other))

    def __repr__(self) -> str:
        return f"Constant containing:\n{plain(self)!r}"

    def __deepcopy__(self, memo: dict) -> Constant:
        if id(self) not in memo:
            memo[id(self)] = type(self)(plain(self).clone(memory_format=torch.preserve_format))
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _rebuild, (plain(self),)


def _constant_method(name: str) -> Callable:
    func = getattr(Tensor, name)

    def method(self, *args, **kwargs):
        rule.write(func, name, plain(self), args, kwargs)
        return None if name == "__setitem__" else self

    method.__name__ = name
    return method


for _name in dir(Tensor):
    if rule.writes(_name) and not _name.startswith("_") or _name in rule.IN_PLACE_OPERATORS:
        setattr(Constant, _name, _constant_method(_name))

# A pickle of a Constant names this function; torch.load(weights_only=True) is to accept it.
torch.serialization.add_safe_globals([_rebuild])


def keep_dtypes(fn: Callable[[Tensor], Tensor], module: nn.Module, names: Iterable[str]) -> Callable[[Tensor], Tensor]:
    """For `Module._apply`: fn, but of the module's parameters of these names only the change of device.

    By identity, as a sharded one is a DTensor and no `Constant` any more.
    """
    constants = {id(module._parameters.get(name)) for name in names}

    def apply(tensor: Tensor) -> Tensor:
        moved = plain(fn(tensor))  # torch makes no nn.Parameter of a Constant, as where it swaps tensors
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
