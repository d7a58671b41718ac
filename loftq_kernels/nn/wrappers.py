"""Models inside wrappers (torch.compile, DDP, checkpointing): the model itself, and names without the wrappers'."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

# Where torch.compile, activation checkpointing and FSDP keep what they wrap.
_HOLDERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# Classes of torch that keep it as `.module`, a name that other modules use for parts of their own.
_MODULE = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel")


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside `torch.compile`, DDP, DataParallel, FSDP, checkpointing wrappers and `AveragedModel`."""
    while (place := _place(model)) is not None:
        model = model._modules[place]
    return model


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether the module was given to `fully_shard`, which makes a class of its FSDPModule and the module's own."""
    return type(module).__mro__[1].__name__ == "FSDPModule"


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as it was written."""
    return type(module).__mro__[2 if is_fully_sharded(module) else 0]


def _place(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds what it wraps; None for any other module."""
    for name in _HOLDERS:
        if isinstance(module._modules.get(name), nn.Module):
            return name
    classes = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
    return "module" if classes.intersection(_MODULE) and "module" in module._modules else None


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`nn.Module.named_modules` as it would be without the wrappers around the model and inside it."""
    yield from _walk(model, "", set() if remove_duplicate else None)


def _walk(module: nn.Module, name: str, seen: set[nn.Module] | None) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key, seen)


def named_tensors(model: nn.Module, *, persistent: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, by their names without wrappers, under every name of a shared one.

    ``persistent`` leaves out the buffers that a state_dict leaves out.
    """
    modules = list(named_modules(model, remove_duplicate=False))
    for kind in ("_parameters", "_buffers"):
        for name, module in modules:
            for key, tensor in getattr(module, kind).items():
                if tensor is not None and not (persistent and key in module._non_persistent_buffers_set):
                    yield f"{name}.{key}" if name else key, tensor


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of a name that `named_modules` gives. Raises AttributeError where there is none."""
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        if module._modules.get(part) is None:
            raise AttributeError(f"{type(module).__name__} has no module {part!r} (of {name!r})")
        module = unwrapped(module._modules[part])
    return module


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a name that `named_tensors` gives."""
    owner, _, key = name.rpartition(".")
    return getattr(submodule(model, owner), key)


def set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one of that name; a wrapper around that one stays around the new one."""
    parent, _, attribute = name.rpartition(".")
    owner = submodule(model, parent)
    setattr(owner, attribute, _rewrapped(owner._modules[attribute], new))


def _rewrapped(old: nn.Module, new: nn.Module) -> nn.Module:
    """new inside the wrappers around old."""
    place = _place(old)
    if place is None:
        return new
    inner = _rewrapped(old._modules[place], new)
    if hasattr(old, "dynamo_ctx"):  # of torch.compile, which binds the forward of what it wraps when it is made
        return type(old)(inner, old.dynamo_ctx).train(old.training)
    setattr(old, place, inner)
    return old
