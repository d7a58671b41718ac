"""Models whose weights are quantized to 2-4 bits plus a low-rank adapter, at hardware speed.

y = x @ (codebook[codes] * scale + offset).T  +  scaling * (x @ lora_A.T) @ lora_B.T  +  bias
"""

from loftq_kernels.calibration.activations import ActivationStatistics
from loftq_kernels.calibration.collect import collect_activations
from loftq_kernels.checkpoints.native import load_quantized, save_quantized
from loftq_kernels.formats import PackedTensor, format_names, qlora_linear, quantize
from loftq_kernels.initializers import (
    AdapterInit,
    InputStatistics,
    LayerConfig,
    aser_init,
    eora_init,
    initializer_names,
    loftq_init,
    loftq_init_batch,
    qalora_init,
    qlora_init,
    weighted_low_rank,
)
from loftq_kernels.models.allocate import plan_bits, solve_plan
from loftq_kernels.models.config import QuantConfig
from loftq_kernels.models.convert import quantize_model
from loftq_kernels.models.plan import BitPlan
from loftq_kernels.models.report import QuantizationReport
from loftq_kernels.nn import (
    QuantLoRAConv1d,
    QuantLoRAConv2d,
    QuantLoRAEmbedding,
    QuantLoRALinear,
    QuantLoRALinearGroup,
)
from loftq_kernels.nn.adapters import merge_adapters, train_only_adapters
from loftq_kernels.nn.blocks import first_layers
from loftq_kernels.ops import available_backends
from loftq_kernels.tuning.rilq import rilq_tune
from loftq_kernels.tuning.teacher import cache_teacher
from loftq_kernels.tuning.tuner import RilqConfig, RilqResult

__version__ = "0.1.0"

__all__ = [
    "ActivationStatistics",
    "AdapterInit",
    "BitPlan",
    "InputStatistics",
    "LayerConfig",
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
