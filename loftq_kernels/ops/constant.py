"""`Constant`: a parameter that is never trained and that no averaging changes, as the packed weight is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from loftq_kernels.ops import constant_writes as rule
from loftq_kernels.ops.constant_writes import Guarded, all_plain, loading, plain


def _alias(tensor: Tensor) -> _Alias:
    made = Tensor._make_subclass(_Alias, tensor)
    made.held = tensor
    return made


def _entry(value: Any, index: int | list[int], count: int) -> Any:
    """Of a list with an item per tensor, those items; any other argument as it is."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return value
    return [value[i] for i in ([index] if isinstance(index, int) else index)]


def _of_one(func: Callable) -> Callable:
    return lambda tensor, *args, **kwargs: func([tensor], *args, **kwargs)


def _write_each(func: Callable, name: str, args: tuple, kwargs: dict) -> None:
    """Apply torch._foreach_*_ or torch._fused_*_: to ordinary tensors together, to each constant by `rule.write`."""
    targets, rest, count = args[0], args[1:], len(args[0])
    constants = [i for i, target in enumerate(targets) if isinstance(target, Guarded)]
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
    """Apply func with `out=`, which is or holds constants."""
    out = kwargs.pop("out")
    args, kwargs = all_plain((args, kwargs))
    results = func(*args, **kwargs)
    pairs = [(out, results)] if isinstance(out, Tensor) else list(zip(out, results, strict=True))
    for target, result in pairs:
        if isinstance(target, Guarded):
            rule.settle(plain(target), result, rule.rounding_of(result), f"{name}(out=)")
    for target, result in pairs:
        if not isinstance(target, Guarded):
            target.resize_(result.shape).copy_(result)
    return out


class _GuardedTensor(Guarded, Tensor):
    """Applies the constant's rule to every function that writes into it.

    Reading it gives plain tensors, except that views of its memory are guarded too.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():  # a compiled function reads the packed weight
                return func(*args, **kwargs)
            return _apply(func, args, kwargs)

    def set_(self, *args, **kwargs) -> Tensor:  # the one in-place method that asks no `__torch_function__`
        with torch._C.DisableTorchFunctionSubclass():
            super().set_(*all_plain(args), **kwargs)
            self.held = Tensor.detach(self)
        return self


class _Alias(_GuardedTensor):
    """What `Constant.detach()`, `Constant.data` and views are: the constant's memory, with its rule for writes."""

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), plain(self).clone())

    def __reduce_ex__(self, protocol):
        return plain(self).__reduce_ex__(protocol)


def _name(func: Callable) -> str:
    """Its name, by whose end `rule.writes` tells what writes; collectives and the like may do so unguarded."""
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        namespace, name = str(func).split(".")[:2]
        return name if namespace == "aten" else f"{func}()"
    return getattr(func, "__name__", str(func))


def _listed(value: Any) -> list | tuple:
    return value if isinstance(value, (list, tuple)) else [value]


def _apply(func: Callable, args: tuple, kwargs: dict) -> Any:
    name = _name(func)
    if any(isinstance(out, Guarded) for out in _listed(kwargs.get("out"))):
        return _write_out(func, name, args, kwargs)
    if not rule.writes(name) and kwargs.get("inplace") is not True:
        return _read(func, name, args, kwargs)
    if not args:  # as torch.nn.init passes it
        args = (kwargs.pop(next(iter(kwargs))),)
    if isinstance(args[0], (list, tuple)):
        return _write_each(func, name, args, kwargs)
    if not isinstance(args[0], Guarded):  # The constant is only an operand.
        return func(*all_plain(args), **all_plain(kwargs))
    rule.write(func, name, plain(args[0]), args[1:], kwargs)
    return None if name == "__setitem__" else args[0]


_OF_THE_OBJECT = ("__get__", "_is_view")  # What another tensor on the same memory may answer differently.


def _read(func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """Apply func, which writes no values."""
    own = args[0] if args and isinstance(args[0], Guarded) else None
    if name == "requires_grad_" or func == Tensor.requires_grad.__set__:
        rule.refuse_gradient((*args[1:], *kwargs.values(), True)[0])
        return own
    if own is None:
        return func(*all_plain(args), **all_plain(kwargs))
    if name in _OF_THE_OBJECT:
        return _guarded(func(own), own)
    if name == "__iter__":
        return iter(_guarded(plain(own).unbind(0), own))
    if name == "__set__" or name.endswith("_") and not name.endswith("__"):  # of the shape or the memory, not of values
        func(own, *all_plain(args[1:]), **all_plain(kwargs))
        own.held = Tensor.detach(own)
        return own
    return _guarded(func(*all_plain(args), **all_plain(kwargs)), own)


def _guarded(result: Any, constant: Tensor) -> Any:
    """The result, in which tensors on the constant's memory are aliases, or the constant itself again."""
    if type(result) in (list, tuple):
        return type(result)(_guarded(item, constant) for item in result)
    if type(result) is not Tensor or not torch._C._is_alias_of(result, constant):
        return result
    return constant if result is constant.held else _alias(result)  # `to` and `contiguous` return what they are given


def _rebuild(data: Tensor) -> Constant:
    return Constant(data)


class Constant(_GuardedTensor, nn.Parameter):
    """A frozen parameter [any shape, any dtype] that only a copy of its own dtype and shape changes.

    Sharding, moving and saving treat it as the parameter that it is, and so do operators, `torch.compile` and
    `torch.export`. What would compute a new value for it in place (averaging of models above all) is computed in
    float64 on the side: the constant stays exactly as it is if that is the old value up to rounding, and RuntimeError
    says what to do otherwise. So do `detach()` and `data`, through which averaging writes. `copy_` of a tensor of the
    same dtype and shape writes, but a float tensor that is the old one within 4 units in the last place is taken for
    an average of it, and not written; only `loading()`, as `load_state_dict` of the layers does, writes that too.

    Views are guarded as well; so are lists of constants in torch._foreach_*, `out=`, `inplace=True` and torch.ops.aten.

    Not guarded, so that they write: compiled and exported functions; `data` under a `TorchDispatchMode`; `set_`; what
    reaches the memory without torch's Python functions (`numpy()`, DLPack, `untyped_storage()`, collectives such as
    DDP's broadcast, C++ extensions); ops outside torch.ops.aten; a function that writes another argument than its first
    and `out`, as `embedding(max_norm=...)` does; `held`, for ops; DTensors, which `fully_shard` makes of it.
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


def plain_program(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program itself, now with ordinary frozen parameters in the place of its `Constant`s, on the same memory.

    `torch.export.save` pickles tensors of other classes, so that only a process with this package could load the file.
    """
    for name, tensor in program.state_dict.items():
        if isinstance(tensor, Constant):
            program.state_dict[name] = nn.Parameter(plain(tensor), requires_grad=False)
    return program
