"""Models whose weights are quantized to 2-4 bits plus a low-rank adapter, at hardware speed.

y = x @ (codebook[codes] * scale + offset).T  +  scaling * (x @ lora_A.T) @ lora_B.T  +  bias
"""

from loftq_kernels.allocate import plan_bits, solve_plan
from loftq_kernels.calibration import ActivationStatistics, collect_activations
from loftq_kernels.checkpoint import load_quantized, save_quantized
from loftq_kernels.config import QuantConfig
from loftq_kernels.convert import QuantizationReport, merge_adapters, quantize_model, train_only_adapters
from loftq_kernels.formats import PackedTensor, format_names, quantize
from loftq_kernels.initializers import (
    AdapterInit,
    InputStatistics,
    aser_init,
    eora_init,
    initializer_names,
    loftq_init,
    loftq_init_batch,
    qalora_init,
    qlora_init,
    weighted_low_rank,
)
from loftq_kernels.nn import (
    QuantLoRAConv1d,
    QuantLoRAConv2d,
    QuantLoRAEmbedding,
    QuantLoRALinear,
    QuantLoRALinearGroup,
)
from loftq_kernels.ops import available_backends, qlora_linear
from loftq_kernels.plan import BitPlan, first_layers
from loftq_kernels.rilq import RilqConfig, RilqResult, rilq_tune
from loftq_kernels.teacher import cache_teacher

__version__ = "0.1.0"

__all__ = [
    "ActivationStatistics",
    "AdapterInit",
    "BitPlan",
    "InputStatistics",
    "PackedTensor",
    "QuantConfig",
    "QuantLoRAConv1d",
    "QuantLoRAConv2d",
    "QuantLoRAEmbedding",
    "QuantLoRALinear",
    "QuantLoRALinearGroup",
    "QuantizationReport",
    "RilqConfig",
    "RilqResult",
    "aser_init",
    "available_backends",
    "cache_teacher",
    "collect_activations",
    "eora_init",
    "first_layers",
    "format_names",
    "initializer_names",
    "load_quantized",
    "loftq_init",
    "loftq_init_batch",
    "merge_adapters",
    "plan_bits",
    "qalora_init",
    "qlora_init",
    "qlora_linear",
    "quantize",
    "quantize_model",
    "rilq_tune",
    "save_quantized",
    "solve_plan",
    "train_only_adapters",
    "weighted_low_rank",
]
