"""`collect_activations`: the statistics of every layer's input over calibration data, streamed through hooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from loftq_kernels.calibration.activations import ActivationStatistics
from loftq_kernels.calibration.collector import Collector, Layer
from loftq_kernels.models.config import QuantConfig
from loftq_kernels.models.patterns import check_patterns
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.kinds import kind_of
from loftq_kernels.nn.wrappers import named_modules, unwrapped
from loftq_kernels.progress import tqdm


def collect_activations(
    model: nn.Module,
    batches: Iterable[Any],
    cfg: QuantConfig | None = None,
    *,
    progress: bool = True,
    device: torch.device | str | None = None,
    share_inputs: bool = True,
) -> ActivationStatistics:
    """Run the model over batches and return the statistics of the inputs of the layers that cfg selects.

    Of a layer's tokens x_t [K]: S = sum_t x_t x_t^T / n, means of x and |x|, max |x|, n. Products are made in float32
    (float64 for float64 inputs), 1024 tokens at a time, and summed in float64; results are float32. Memory does not
    grow with the number of tokens: 8 K^2 bytes for each different input until the end, 4 K^2 after. Layers that were
    given the same tensor object (q, k and v) have one input. Where a whole model is too much, collect some of the
    layers in one run (``cfg.include``), quantize these, and go on.

    Args:
        model: with nn.Linear, transformers' Conv1D or `QuantLoRALinear` layers; run in eval mode without gradients, and
            left as it was, hooks and training flags included, also after an error or Ctrl-C.
        batches: each a tensor (model(x)), a tuple or list (model(*batch)) or a mapping (model(**batch)); tensors are
            moved to the model's device. A mapping's "attention_mask" [batch, tokens] says which tokens count (those
            that are not 0), in layers whose input is [batch, tokens, K] or [batch * tokens, K]; others, such as a
            pooler's, count whole, and masks of other dimensions are left to the model. In encoder-decoder models it is
            the mask of the encoder's layers and of what the decoder is given of the encoder's output; the decoder's
            own tokens count as "decoder_attention_mask" says, all without one.
        cfg: which layers, by ``include``, ``exclude`` and ``overrides``; default `QuantConfig()`.
        progress: show a bar on standard error.
        device: where the sums are kept; default: where the inputs are.
        share_inputs: False treats every layer on its own, for models in which layers have a common input in one batch
            and different ones in the next.

    Layers that no token reached (experts never chosen) have no entry. Warns of layers with fewer tokens than channels:
    S is singular then, which the initializers here can do with, but it says nothing about most directions.
    Raises ValueError when no layer is selected, for no batch or no token, for NaN, Inf or squares beyond float32 in a
    layer's input (naming layer and batch), for an encoder-decoder model whose encoder is not to be found
    (``get_encoder()``) where a mask could be either's; TypeError for a batch of another kind.
    """
    cfg = cfg or QuantConfig()
    if not isinstance(cfg, QuantConfig):
        raise TypeError(f"cfg must be a QuantConfig, got {cfg!r}")
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}")
    model = unwrapped(model)
    check_patterns(model, cfg)
    collector = Collector(share_inputs, device)
    layers = {name: module for name, module in named_modules(model) if _is_selected(name, module, cfg)}
    if not layers:
        raise ValueError(f"no linear layer to observe: include={cfg.include}, exclude={cfg.exclude}")
    encoder = _encoder(model)
    target = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = len(batches) if isinstance(batches, Sized) else None
    with _observing(model, layers, encoder, collector):
        for number, batch in enumerate(
            tqdm(batches, desc="calibrate", unit="batch", total=total, disable=not progress)
        ):
            arguments, keywords = _arguments(_to_device(batch, target))
            collector.start(number, keywords, _is_encoder_decoder(model, keywords), encoder is not None)
            model(*arguments, **keywords)
            collector.finish()
    with torch.inference_mode(False), torch.no_grad():
        return collector.results()


def _is_selected(name: str, module: nn.Module, cfg: QuantConfig) -> bool:
    """As `quantize_model`, which leaves subclasses of nn.Linear alone."""
    kind = kind_of(module)
    if kind is None or not kind.observed or not (isinstance(module, QuantLoRAModule) or kind.why_not(module) is None):
        return False
    return cfg.selects(name) and not cfg.saves(name) and cfg.for_layer(name) is not None


def _is_encoder_decoder(model: nn.Module, keywords: Mapping[str, Any]) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) or "decoder_input_ids" in keywords


def _encoder(model: nn.Module) -> nn.Module | None:
    """As transformers' models tell it, which return themselves if they have none."""
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if callable(get_encoder) else None
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def _arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise TypeError(f"a batch must be a tensor, a tuple, a list or a mapping, got {type(batch).__name__}")


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to_device(own, device) for key, own in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to_device(own, device) for own in value)
    return value


@contextlib.contextmanager
def _observing(
    model: nn.Module, layers: Mapping[str, nn.Module], encoder: nn.Module | None, collector: Collector
) -> Iterator[None]:
    """Hooks on, eval mode, no gradients; all as before on the way out."""
    training = [(module, module.training) for module in model.modules()]
    handles = []
    encoding = set() if encoder is None else set(encoder.modules())
    try:
        if encoder is not None:
            handles.append(encoder.register_forward_hook(functools.partial(_keep_encoded, collector)))
        for name, module in layers.items():
            hook = functools.partial(_hook, collector, Layer(name, module in encoding))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        model.eval()
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag


def _hook(collector: Collector, layer: Layer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    x = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0:  # of anything else the layer itself complains
        with torch.autocast(x.device.type, enabled=False):
            collector.observe(layer, x)


def _keep_encoded(collector: Collector, module: nn.Module, args: tuple, output: Any) -> None:
    state = getattr(output, "last_hidden_state", None)
    if state is None:
        state = output[0] if isinstance(output, tuple) and output else output
    collector.encoded = state if isinstance(state, Tensor) else None
