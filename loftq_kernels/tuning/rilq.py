"""RILQ (Lee et al., AAAI 2025): tune the adapters of all layers together so that the model's final states match.

    L = weight * mean (h_student - h_teacher)^2  +  (1 - weight) * cross-entropy of the next token

with h the hidden states after the last norm. At 2 bits the error of one layer says little about that of the
model. Through this loss each adapter also corrects errors of other layers, so small ranks suffice.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loftq_kernels.nn.adapters import adapter_parameters
from loftq_kernels.nn.blocks import checkpointed_blocks
from loftq_kernels.nn.named_adapters import active_adapters
from loftq_kernels.nn.wrappers import unwrapped
from loftq_kernels.tuning.state import RilqPoint
from loftq_kernels.tuning.teacher import Batch, Hidden, LiveTeacher, TeacherCache, cache_teacher, check_batches
from loftq_kernels.tuning.tuner import RilqConfig, RilqResult, Tuner, adapted_layers

Teacher = nn.Module | Callable[[], nn.Module] | str | Path


def rilq_tune(
    model: nn.Module,
    teacher: Teacher,
    batches: Iterable[Batch],
    cfg: RilqConfig | None = None,
    *,
    validation: Iterable[Batch] | None = None,
    hidden: Hidden | None = None,
    cache: str | Path | None = None,
    state_dir: str | Path | None = None,
    progress: bool | Callable[[RilqPoint], None] | None = None,
    plot: str | Path | None = None,
) -> RilqResult:
    """Tune all adapters of a quantized model, in place, towards the teacher's final hidden states (see the module).

    Gradients run through the packed weights: nothing dense is built. Dropout is off. At the end, even after an
    exception, the model holds the adapters of least loss on held-out batches; the initial ones are among them.

    Args:
        model: has adapters of either kind, from any start (LoftQ, EoRA, zero). All else is frozen during the call.
        teacher: the full-precision model; or a function that loads it, called only if its states are not in ``cache``
            yet and dropped before tuning; or the folder that `cache_teacher` wrote, with which the teacher need never
            be in memory together with the model.
        batches: token ids [B, T], or mappings with ``input_ids`` and, if need be, ``attention_mask`` and ``labels``
            (-100: ignored), or whatever ``hidden`` takes.
        cfg: default `RilqConfig()`.
        validation: held-out batches; None holds out the last of ``batches``.
        hidden: function of (model, batch) that returns final hidden states, or (hidden states, logits), used for
            teacher and model. None serves transformers models, and models that return these themselves.
        cache: folder for the teacher's states. Without it, a teacher that is a model computes its states anew each
            time, and the states of a teacher that a function loads go into a temporary folder.
        state_dir: folder for the state that resuming needs, saved at each validation. A call with the same arguments
            goes on from there and ends with the same bits (``cfg.steps`` may be larger). A finished run is returned at
            once. The model must hold the adapters that the run began with, or those that an earlier call left in it.
        progress: None shows a bar where somebody watches (a terminal, a notebook), True also plain lines where standard
            error is redirected; a function is called with the `RilqPoint` of each update.
        plot: where to write the loss curves as a PNG.

    Raises ValueError for empty data, a model without adapters, with all of them disabled or with user adapters that are
    active, weight < 1 with a transformers model that does not predict the next token (encoder-decoder, masked, no
    head), states of another shape than the teacher's, a cache or state that does not belong to these arguments;
    TypeError for objects of other kinds; FloatingPointError, naming the update, when a loss is not finite.
    """
    cfg, model = cfg or RilqConfig(), unwrapped(model)
    train, held_out = _split(batches, validation, cfg)
    adapters = adapter_parameters(model)
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no adapters: quantize_model with a rank first")
    if not any(layer.has_adapter for layer in adapted_layers(model).values()):
        raise ValueError(
            "all adapters are disabled, and tuning would change nothing: call enable_adapter of the layers"
        )
    if active := active_adapters(model):
        raise ValueError(
            f"the user adapter {active[0]!r} is active, and tuning would fit to it: set_adapter(model, None)"
        )
    if cfg.weight < 1:
        _check_causal(model)
    with contextlib.ExitStack() as stack:
        source = _teacher(teacher, train + held_out, hidden, cache, stack)
        del teacher  # No name here may keep a loaded model alive.
        tuner = Tuner(model, adapters, source, train, held_out, cfg, hidden, state_dir)
        stack.enter_context(_only(adapters, model))
        if cfg.gradient_checkpointing:
            stack.enter_context(_checkpointed(model))
        result = tuner.run(progress)
    if plot is not None:
        result.plot(plot)
    return result


def _check_causal(model: nn.Module) -> None:
    """Raise ValueError for a transformers model in which position t does not predict token t + 1."""
    config, can_generate = getattr(model, "config", None), getattr(model, "can_generate", None)
    if config is None or not callable(can_generate):
        return
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "is an encoder-decoder model, whose decoder inputs are labels shifted already"
    elif not can_generate():
        reason = "has no causal head"
    else:  # heads of BERT's kind: causal only where the config asks for it
        modules = [sys.modules[c.__module__] for c in type(model).__mro__ if c.__module__.startswith("transformers.")]
        masked = any(name.endswith("ForMaskedLM") for module in modules for name in vars(module))
        if masked and not getattr(config, "is_decoder", False):
            reason = "looks at later tokens, too, as its config.is_decoder is not set"
    if reason is not None:
        raise ValueError(
            f"{type(model).__name__} {reason}: there are no logits of a next token for the cross-entropy; weight=1 "
            "tunes on the hidden states alone"
        )


def _split(batches: Iterable[Batch], validation: Iterable[Batch] | None, cfg: RilqConfig) -> tuple[list, list]:
    train = check_batches(batches)
    if validation is not None:
        return train, check_batches(validation, "validation")
    if len(train) < 2:
        raise ValueError("one batch cannot be split into training and held-out ones: give more, or validation=")
    count = min(len(train) - 1, math.ceil(cfg.validation_share * len(train)))
    return train[:-count], train[-count:]


def _teacher(
    teacher: Teacher, batches: list[Batch], hidden: Hidden | None, cache: str | Path | None, stack: contextlib.ExitStack
) -> LiveTeacher | TeacherCache:
    if isinstance(teacher, str | Path):
        if cache is not None and Path(cache) != Path(teacher):
            raise ValueError(f"teacher={str(teacher)!r} is a cache already, but cache={str(cache)!r} names another")
        return TeacherCache(teacher, batches)
    if isinstance(teacher, nn.Module) and cache is None:
        return LiveTeacher(teacher, hidden)
    if not callable(teacher):
        raise TypeError(f"teacher must be a model, a function that loads one, or a folder; got {teacher!r}")
    if cache is None:
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="loftq-teacher-"))
    cache_teacher(teacher, batches, cache, hidden=hidden, progress=False)
    return TeacherCache(cache, batches)


@contextlib.contextmanager
def _only(adapters: Mapping[str, nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Within this context only the adapters get gradients, and dropout is off."""
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    chosen = {id(parameter) for parameter in adapters.values()}
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)
        for parameter in adapters.values():
            parameter.grad = None
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Recompute the model's blocks in the backward.

    transformers' own switch works in training mode only, which would turn dropout on, so it is not used.
    """
    # A block with a forward of its own, somebody else's, must stay as it is.
    blocks = [block for block in checkpointed_blocks(model) if "forward" not in block.__dict__]

    def recomputed(forward: Callable) -> Callable:
        def run(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return run

    try:
        for block in blocks:
            block.forward = recomputed(block.forward)  # This attribute of the instance hides the method.
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
