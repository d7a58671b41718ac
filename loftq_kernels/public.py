"""The public names: what ``import loftq_kernels`` offers. Importing them registers the ops with torch."""
# ruff: noqa: F401

from loftq_kernels.calibration.activations import ActivationStatistics
from loftq_kernels.calibration.collect import collect_activations
from loftq_kernels.checkpoints.adapter_file import load_adapter, save_adapter
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
from loftq_kernels.integrations.register import register_all as _register_all
from loftq_kernels.models.allocate import plan_bits
from loftq_kernels.models.config import QuantConfig
from loftq_kernels.models.convert import quantize_model
from loftq_kernels.models.plan import BitPlan
from loftq_kernels.models.report import QuantizationReport
from loftq_kernels.models.solve import solve_plan
from loftq_kernels.nn import (
    QuantLoRAConv1d,
    QuantLoRAConv2d,
    QuantLoRAEmbedding,
    QuantLoRALinear,
    QuantLoRALinearGroup,
)
from loftq_kernels.nn.adapters import merge_adapters, train_only_adapters
from loftq_kernels.nn.blocks import first_layers
from loftq_kernels.nn.named_adapters import delete_adapter, set_adapter, use_adapters
from loftq_kernels.ops import available_backends
from loftq_kernels.tuning.rilq import rilq_tune
from loftq_kernels.tuning.teacher import cache_teacher
from loftq_kernels.tuning.tuner import RilqConfig, RilqResult

_register_all()
