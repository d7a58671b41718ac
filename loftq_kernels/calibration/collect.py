"""`collect_activations`: the statistics of every layer's input over calibration data, streamed through hooks."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from loftq_kernels.calibration.activations import ActivationStatistics
from loftq_kernels.calibration.collector import Collector, Layer
from loftq_kernels.calibration.provenance import Provenance
from loftq_kernels.models.config import QuantConfig
from loftq_kernels.models.patterns import check_patterns
from loftq_kernels.models.select import Context
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.kinds import kind_of
from loftq_kernels.nn.wrappers import unwrapped
from loftq_kernels.progress import progress_bar


def collect_activations(
    model: nn.Module,
    batches: Iterable[Any],
    cfg: QuantConfig | None = None,
    *,
    progress: bool | None = None,
    device: torch.device | str | None = None,
    share_inputs: bool = True,
) -> ActivationStatistics:
    """Run the model over batches and return the statistics of the inputs of the layers that cfg selects.

    Of a layer's tokens x_t [K]: S = sum_t x_t x_t^T / n, means of x and |x|, max |x|, n. Products are made in float32
    (float64 for float64 inputs), 1024 tokens at a time, and summed in float64; results are float32. Memory does not
    grow with the number of tokens: 8 K^2 bytes for each different input until the end, 4 K^2 after. Where a whole model
    is too much, collect some of the layers in one run (``cfg.include``), quantize these, and go on.

    Layers that have all been given the same tensor objects (q, k and v), in any order, have one input: its products
    are made once. They take 8 K^2 bytes more from the first of these layers to the last. Layers that shared their
    inputs until one of them was given another, or missed one, get sums of their own then: 8 K^2 bytes for each part,
    and one product per part from then on. Either way each layer's statistics are those of its own inputs. Layers also
    part where one is more than four inputs ahead of another within a batch, which bounds what is kept.

    Args:
        model: with nn.Linear, transformers' Conv1D or `QuantLoRALinear` layers; run in eval mode without gradients, and
            left as it was, hooks and training flags included, also after an error or Ctrl-C.
        batches: each a tensor (model(x)), a tuple or list (model(*batch)) or a mapping (model(**batch)); tensors are
            moved to the model's device. The argument "attention_mask" says which tokens count. [batch, tokens] holds 0
            for padding, or negative numbers if it is added to scores; in [batch, ..., queries, tokens] padding is what
            no query attends to. It applies to inputs [batch, tokens, K] (perhaps with an axis of heads),
            [tokens, batch, K] and [batch * tokens, K]; others, such as a pooler's, count whole, with a warning if
            these are all. Where batch = tokens, [batch, tokens] is assumed unless the layer had a batch of
            [tokens, batch] before. In encoder-decoder models it is the mask of the encoder's layers and of what the
            decoder is given of the encoder's output; the decoder's own tokens count as "decoder_attention_mask" says,
            all without one.
        cfg: which layers, by ``include``, ``exclude`` and ``overrides``; default `QuantConfig()`.
        progress: None shows a bar where somebody watches (a terminal, a notebook), True also plain lines where standard
            error is redirected.
        device: where the sums are kept; default: where the inputs are.
        share_inputs: False treats every layer on its own: the same statistics, at the cost of one product and one
            object per layer.

    Inputs that do not depend on the batch (see `Provenance`), such as DeBERTa's relative positions, are left out,
    except in layers that have no others. Compiled models are run uncompiled. Layers that no token reached, such as
    experts never chosen, have no entry: they are in `ActivationStatistics.unreached`, with a warning. Also warns of
    layers with fewer tokens than channels: S is singular then, which the initializers here can do with, but it says
    nothing about most directions.

    Raises ValueError when no layer is selected, for no batch or no token, for NaN, Inf or squares beyond float32 in a
    layer's input (naming layer and batch), for an encoder-decoder model whose encoder is not to be found
    (``get_encoder()``) where a mask could be either's, for a pattern that matches no layer, for a mask with numbers of
    both signs; TypeError for a batch of another kind.
    """
    cfg = cfg or QuantConfig()
    if not isinstance(cfg, QuantConfig):
        raise TypeError(f"cfg must be a QuantConfig, got {cfg!r}")
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}")
    model = unwrapped(model)
    check_patterns(model, cfg)
    encoder = _encoder(model)
    layers = _selected(model, cfg, encoder)
    if not layers:
        raise ValueError(f"no linear layer to observe: include={cfg.include}, exclude={cfg.exclude}")
    collector = Collector(layers.values(), share_inputs, device)
    target = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))  # offloaded ones are
    total = len(batches) if isinstance(batches, Sized) else None
    with _observing(model, layers, encoder, collector) as provenance:
        for number, batch in enumerate(
            progress_bar(batches, desc="calibrate", unit="batch", total=total, show=progress)
        ):
            arguments, keywords = _arguments(_to_device(batch, target))
            named = _named_arguments(model, arguments, keywords)
            collector.start(number, named, _is_encoder_decoder(model, named), encoder is not None)
            with provenance:
                model(*arguments, **keywords)
            collector.finish()
            provenance.forget_dead()
    with torch.inference_mode(False), torch.no_grad():
        return collector.results()


def _selected(model: nn.Module, cfg: QuantConfig, encoder: nn.Module | None) -> dict[nn.Module, Layer]:
    """The layers that cfg lets `quantize_model` quantize, and those that it has quantized already."""
    context = Context(model, cfg)
    encoding = set() if encoder is None else set(encoder.modules())
    return {
        module: Layer(names[0], module in encoding)
        for module, names in context.names_of.items()
        if _is_observed(module, cfg) and context.reason_of_name(module, names, cfg.for_layer(*names)) is None
    }


def _is_observed(module: nn.Module, cfg: QuantConfig) -> bool:
    """As `quantize_model`, which leaves subclasses of nn.Linear alone."""
    kind = kind_of(module)
    if kind is None or not kind.observed or kind.layer_type not in cfg.layer_types:
        return False
    return isinstance(module, QuantLoRAModule) or kind.why_not(module) is None


def _is_encoder_decoder(model: nn.Module, keywords: Mapping[str, Any]) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) or "decoder_input_ids" in keywords


def _encoder(model: nn.Module) -> nn.Module | None:
    """As transformers' models tell it, which return themselves if they have none."""
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if callable(get_encoder) else None
    if not isinstance(encoder, nn.Module) or encoder is model:
        return None
    return unwrapped(encoder)


def _arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise TypeError(f"a batch must be a tensor, a tuple, a list or a mapping, got {type(batch).__name__}")


def _named_arguments(model: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
    """All arguments by the names that the model's forward gives them: a mask may come by its position."""
    if not arguments:
        return keywords
    try:
        positional = inspect.signature(model.forward).bind_partial(*arguments).arguments
    except (TypeError, ValueError):  # the model itself says what is wrong with its arguments
        return keywords
    return {**positional, **keywords}


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to_device(own, device) for key, own in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to_device(own, device) for own in value)
    return value


def _uncompiled() -> contextlib.AbstractContextManager:
    """Compiled parts of a model run as they were written: what was compiled before does not call hooks of today."""
    if "torch._dynamo" not in sys.modules:  # then nothing has been compiled, and the import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def _observing(
    model: nn.Module, layers: Mapping[nn.Module, Layer], encoder: nn.Module | None, collector: Collector
) -> Iterator[Provenance]:
    """Hooks on, eval mode, no gradients, nothing compiled; all as before on the way out."""
    training = [(module, module.training) for module in model.modules()]
    handles = []
    provenance = Provenance(model)
    try:
        if encoder is not None:
            handles.append(encoder.register_forward_hook(functools.partial(_keep_encoded, collector)))
        for module, layer in layers.items():
            hook = functools.partial(_hook, collector, provenance, layer)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        model.eval()
        with _uncompiled(), torch.inference_mode(False), torch.no_grad():
            yield provenance
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag


def _hook(
    collector: Collector, provenance: Provenance, layer: Layer, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> None:
    x = args[0] if args else next(iter(kwargs.values()), None)
    with torch._C.DisableTorchFunction():  # provenance is of what the model computes
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0:  # the layer itself complains of other x
            with torch.autocast(x.device.type, enabled=False):
                collector.observe(layer, x, provenance.is_constant(x))


def _keep_encoded(collector: Collector, module: nn.Module, args: tuple, output: Any) -> None:
    state = getattr(output, "last_hidden_state", None)
    if state is None:
        state = output[0] if isinstance(output, tuple) and output else output
    collector.encoded = state if isinstance(state, Tensor) else None
