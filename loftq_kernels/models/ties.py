"""Output heads that share their weight with the embedding, and what comes apart when they are quantized.

transformers' models tie the two by their config: ``config.tie_word_embeddings``, the pairs of names being in
``all_tied_weights_keys``. A quantized layer has no weight to share, so that both have to say that nothing is tied. They
are read and written by name here: transformers is not imported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.wrappers import named_modules

_FLAG, _PAIRS = "tie_word_embeddings", "all_tied_weights_keys"


def reason_against_untying(model: nn.Module, weights: set[str]) -> str | None:
    """Why the owners of a shared weight, by name, cannot come apart in a transformers model; None where they can.

    ``config.tie_word_embeddings`` is all or nothing. So a model that ties more by it than these, as encoder-decoders
    and masked language models do, has to stay tied.
    """
    for prefix, _, pairs in _tying(model):
        named = {f"{prefix}{name}" for pair in pairs.items() for name in pair}
        if named & weights and (others := sorted(named - weights)):
            return f"its config.{_FLAG} ties {others[0]}, too"
    return None


def untie(model: nn.Module) -> None:
    """Where a quantized layer had a tied weight: let config and model say that nothing is tied. Other models stay."""
    for _, module, pairs in _tying(model):
        kept = {t: s for t, s in pairs.items() if not (_is_quantized(module, t) or _is_quantized(module, s))}
        if len(kept) == len(pairs):
            continue
        setattr(module, _PAIRS, kept)
        if any(getattr(config, _FLAG, False) for config in _configs(module)):
            _own_config(model, module)
        for config in _configs(module):
            if getattr(config, _FLAG, False):
                setattr(config, _FLAG, False)


def _own_config(model: nn.Module, module: nn.Module) -> None:
    """Give a module, and what reads the same config in its model, a copy of it: other models may share the object."""
    copies: dict[int, Any] = {}
    copy.deepcopy(module.config, copies)
    for _, part in named_modules(model):
        config = vars(part).get("config")
        if id(config) in copies:
            part.config = copies[id(config)]


def _tying(model: nn.Module) -> Iterator[tuple[str, nn.Module, Mapping[str, str]]]:
    """(prefix of names, module, pairs of names without it) of every module that ties weights as transformers do."""
    for name, module in named_modules(model):
        pairs = getattr(module, _PAIRS, None)
        if isinstance(pairs, Mapping) and pairs:
            yield f"{name}." if name else "", module, pairs


def _is_quantized(module: nn.Module, tensor: str) -> bool:
    """Whether a tensor's name, below a module, is that of a quantized layer's weight."""
    owner, _, leaf = tensor.rpartition(".")
    try:
        return leaf == "weight" and isinstance(module.get_submodule(owner), QuantLoRAModule)
    except AttributeError:  # of a name that stands for several modules, or for none
        return False


def _configs(module: nn.Module) -> list[Any]:
    """A model's config, and that of its text model, which has an entry of its own."""
    config = getattr(module, "config", None)
    of_text = getattr(config, "get_text_config", None)
    return [config, of_text(decoder=True)] if callable(of_text) else [config]
