"""transformers' ``save_pretrained`` asks what a model is when it is saved: a part alone may have been quantized.

transformers goes by ``model.hf_quantizer`` and ``model.config.quantization_config``, which quantizing a whole model
sets. Where the decoder layers, or the language model of a vision model, were quantized, the model around them has no
quantizer; and a dense model that shares its config with a quantized one has a config that says more than is true.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from transformers import modeling_utils

from loftq_kernels.integrations import attention
from loftq_kernels.integrations.quantizer import LoftqConfig
from loftq_kernels.integrations.transformers import adopt
from loftq_kernels.nn.adapters import quantized_layers

_OURS = "_loftq_kernels"  # marks the method that stands in the place of transformers'


def register() -> None:
    """What our layers need of ``transformers.modeling_utils``. Calling it again changes nothing."""
    if not attention.__spec__._initializing:  # else it registers itself at its end
        attention.register()
    original = modeling_utils.PreTrainedModel.save_pretrained
    if hasattr(original, _OURS):
        return

    @functools.wraps(original)
    def save_pretrained(self: modeling_utils.PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with _told(self):
            return original(self, *args, **kwargs)

    setattr(save_pretrained, _OURS, True)
    modeling_utils.PreTrainedModel.save_pretrained = save_pretrained


@contextlib.contextmanager
def _told(model: modeling_utils.PreTrainedModel) -> Iterator[None]:
    """Give a model with quantized layers our quantizer; let the config of one without say nothing of us."""
    said = vars(model.config).get("quantization_config")
    if getattr(model, "hf_quantizer", None) is not None:
        yield
    elif quantized_layers(model):
        adopt(model, said.config if isinstance(said, LoftqConfig) else None)
        yield
    elif isinstance(said, LoftqConfig):
        del model.config.quantization_config
        try:
            yield
        finally:
            model.config.quantization_config = said
    else:
        yield


register()
