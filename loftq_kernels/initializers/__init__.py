"""Ways to choose a quantized weight and its adapter; one file per method."""

from loftq_kernels.initializers.aser import aser_init
from loftq_kernels.initializers.config import LayerConfig, initializer_names
from loftq_kernels.initializers.drivers.gram import weighted_low_rank
from loftq_kernels.initializers.eora import eora_init
from loftq_kernels.initializers.loftq import loftq_init, loftq_init_batch
from loftq_kernels.initializers.qalora import qalora_init
from loftq_kernels.initializers.qlora import qlora_init
from loftq_kernels.initializers.registry import initialize
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics

__all__ = [
    "AdapterInit",
    "InputStatistics",
    "LayerConfig",
    "aser_init",
    "eora_init",
    "initialize",
    "initializer_names",
    "loftq_init",
    "loftq_init_batch",
    "qalora_init",
    "qlora_init",
    "weighted_low_rank",
]
