"""Models whose weights are quantized to 2-4 bits plus a low-rank adapter, at hardware speed.

y = x @ (codebook[codes] * scale + offset).T  +  scaling * (x @ lora_A.T) @ lora_B.T  +  bias
"""

from loftq_kernels.checkpoint import load_quantized, save_quantized
from loftq_kernels.config import QuantConfig
from loftq_kernels.convert import QuantizationReport, merge_adapters, quantize_model, train_only_adapters
from loftq_kernels.formats import PackedTensor, format_names, quantize
from loftq_kernels.initializers import (
    AdapterInit,
    initializer_names,
    loftq_init,
    loftq_init_batch,
    qalora_init,
    qlora_init,
)
from loftq_kernels.nn import QuantLoRALinear
from loftq_kernels.ops import available_backends, qlora_linear
from loftq_kernels.rilq import RilqConfig, RilqResult, rilq_tune
from loftq_kernels.teacher import cache_teacher

__version__ = "0.1.0"

__all__ = [
    "AdapterInit",
    "PackedTensor",
    "QuantConfig",
    "QuantLoRALinear",
    "QuantizationReport",
    "RilqConfig",
    "RilqResult",
    "available_backends",
    "cache_teacher",
    "format_names",
    "initializer_names",
    "load_quantized",
    "loftq_init",
    "loftq_init_batch",
    "merge_adapters",
    "qalora_init",
    "qlora_init",
    "qlora_linear",
    "quantize",
    "quantize_model",
    "rilq_tune",
    "save_quantized",
    "train_only_adapters",
]
