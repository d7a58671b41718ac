"""Models inside wrappers (torch.compile, DDP, checkpointing): the model itself, and names without the wrappers'."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Where torch.compile, activation checkpointing and FSDP keep what they wrap: these parts show in names.
_IN_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_MODULE = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel")  # keep it as .module


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside `torch.compile`, DDP, DataParallel, FSDP, checkpointing wrappers and `AveragedModel`."""
    while isinstance(inner := _inner(model), nn.Module):
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    for name in _IN_NAMES:
        if name in model._modules:
            return model._modules[name]
    mine = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("torch.")}
    return model._modules.get("module") if mine.intersection(_MODULE) else None


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether the module was given to `fully_shard`, which makes a class of its FSDPModule and the module's own."""
    return type(module).__mro__[1].__name__ == "FSDPModule"


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as it was written."""
    return type(module).__mro__[2 if is_fully_sharded(module) else 0]


def plain_name(name: str) -> str:
    """A module's or tensor's name without the parts that wrappers of inner modules add to it."""
    return ".".join(part for part in name.split(".") if part not in _IN_NAMES)


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`nn.Module.named_modules` of the unwrapped model, names and modules without wrappers' own."""
    for name, module in unwrapped(model).named_modules(remove_duplicate=remove_duplicate):
        if _inner(module) is None:
            yield plain_name(name), module


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of a plain name. Raises AttributeError where there is none."""
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        if part not in module._modules:
            raise AttributeError(f"{type(module).__name__} has no module {part!r} (of {name!r})")
        module = unwrapped(module._modules[part])
    return module


def set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one of a plain name; a wrapper around that one stays around the new one."""
    parent, _, attribute = name.rpartition(".")
    owner, place = submodule(model, parent), attribute
    while _inner(owner._modules[place]) is not None:
        owner = owner._modules[place]
        place = next((key for key in _IN_NAMES if key in owner._modules), "module")
    setattr(owner, place, new)
